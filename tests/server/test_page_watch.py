"""Pages that do not add up are found when the engine is idle, told, and take nobody with them."""

import logging
import threading
from typing import Any

import pytest

from load_server import eventually, serving
from longforge.server.page_watch import PageWatch
from small_server import HTTP

ASKED = {"model": "small", "prompt": [1, 2, 3], "max_tokens": 3, "temperature": 0}


def test_it_checks_after_work_only_and_not_too_often():
    checks: list[int] = []
    watch = PageWatch(lambda: checks.append(1), seconds=1000)
    wake = threading.Event()
    watch.check(wake)
    assert not checks, "nothing was done"
    watch.worked()
    watch.check(wake)
    watch.check(wake)
    assert len(checks) == 1
    watch.worked()
    wake.set()
    watch.check(wake)
    assert len(checks) == 1, "it is not time yet, and there is work to do"


def test_a_lost_page_is_counted_and_told_and_the_server_goes_on(caplog: Any):
    with serving() as (loop, url), caplog.at_level(logging.ERROR):
        whole = HTTP.post(f"{url}/v1/completions", json=ASKED).json()
        assert "longforge:page_check_failures_total" in HTTP.get(f"{url}/metrics").text
        assert loop.page_check_failures == 0 and not caplog.records
        loop.engine._cache.pool.take(1)  # nobody gives it back
        again = HTTP.post(f"{url}/v1/completions", json=ASKED)
        assert eventually(lambda: loop.page_check_failures == 1)
        assert again.json()["choices"] == whole["choices"]
        figures = HTTP.get(f"{url}/metrics").text
        assert 'longforge:page_check_failures_total{model_name="small"} 1.0' in figures
        assert HTTP.get(f"{url}/ready").status_code == 200
    (told,) = caplog.records
    assert "do not add up" in told.message and "\n" not in told.message


@pytest.mark.parametrize("wrong", [RuntimeError, KeyError])
def test_other_errors_are_not_taken_for_a_finding(wrong: type[Exception]):
    def check() -> None:
        raise wrong

    watch = PageWatch(check)
    watch.worked()
    with pytest.raises(wrong):
        watch.check(threading.Event())
