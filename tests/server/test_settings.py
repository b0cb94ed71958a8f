"""The options of `longforge serve`: they reach the server as given, and what cannot be is refused by name."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from longforge.cli.serve import serve
from longforge.errors import InputError
from longforge.server import launch
from longforge.server.settings import ServeSettings

GIVEN = """folder --name mine --host box.lan --port 7 --threads 2 --device cpu --dtype float32 --context 40
--pages 50 --drafts 1 --host-cache 0.5 --file-cache pages --file-cache-gib 2 --max-running 3 --max-requests 4
--max-queued-tokens 500 --api-key-file keys --allowed-host a --allowed-host b --max-body-mib 6
--drain-seconds 1.5"""
SETTINGS = ServeSettings(
    model="folder",
    name="mine",
    host="box.lan",
    port=7,
    threads=2,
    device="cpu",
    dtype="float32",
    context=40,
    pages=50,
    drafts=1,
    host_cache_bytes=2**29,
    file_cache=Path("pages"),
    file_cache_bytes=2 * 2**30,
    max_running=3,
    max_requests=4,
    max_queued_tokens=500,
    api_key_file=Path("keys"),
    allowed_hosts=("a", "b"),
    max_body_bytes=6 * 2**20,
    drain_seconds=1.5,
)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """What a server would have been started with."""
    served: list[ServeSettings] = []
    monkeypatch.setattr(launch, "serve", served.append)
    return served


def command(*words: str) -> None:
    app = typer.Typer()
    app.command()(serve)
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_every_option_reaches_the_server(served: list[ServeSettings]):
    command(*GIVEN.split())
    assert served == [SETTINGS]
    defaults = asdict(ServeSettings())
    same = [field.name for field in fields(SETTINGS) if getattr(SETTINGS, field.name) == defaults[field.name]]
    assert not same, "a setting at its default would not tell whether it was passed on"


def test_without_options_the_settings_are_the_defaults(served: list[ServeSettings]):
    command()
    assert served == [ServeSettings()]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"context": 1}, "context: expected at least 2 tokens, got 1"),
        ({"drain_seconds": -1.0}, "drain seconds: expected at least 0, got -1.0"),
        ({"drain_seconds": float("nan")}, "drain seconds: expected at least 0, got nan"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_name(wrong: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        ServeSettings(**wrong)
