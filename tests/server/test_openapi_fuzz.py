"""Requests made up from the server's own description of itself: never a 5xx, never a reply of another kind."""

import json
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.openapi import from_dict

from longforge.engine import Engine
from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from small_model import small_model, small_tokenizer

KINDS = ("application/json", "text/event-stream", "text/plain")
UNLESS_PAUSED = "/pause"
"""Takes no body; a paused server would answer nothing after it. `test_overload` has it."""


def described() -> dict[str, Any]:
    app = create_app(EngineLoop(Engine(small_model(), pages=4)), small_tokenizer(), "small")
    return json.loads(json.dumps(app.openapi()))


DESCRIPTION = described()
OPERATIONS = [
    (path, method)
    for path, methods in DESCRIPTION["paths"].items()
    for method in methods
    if path != UNLESS_PAUSED
]
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]


def short(body: Any) -> Any:
    """A body whose answer comes soon and is not merely refused for the name of its model."""
    if not isinstance(body, dict):
        return body
    wanted = dict(body)
    if isinstance(wanted.get("model"), str):
        wanted["model"] = "small"
    if "messages" in wanted or "prompt" in wanted or "input" in wanted:
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(wanted.get(name), int) and wanted[name] > 3:
                wanted[name] = 3
        if "max_completion_tokens" not in wanted and "input" not in wanted:
            wanted.setdefault("max_tokens", 2)
    if isinstance(wanted.get("n"), int):
        wanted["n"] = min(wanted["n"], 2)
    return wanted


def check(reply: httpx.Response, what: str) -> None:
    kind = reply.headers.get("content-type", "").partition(";")[0]
    assert reply.status_code < 500, f"{what}: {reply.status_code} {reply.text}"
    assert kind in KINDS, f"{what}: {kind}"
    if reply.status_code >= 400:
        message = reply.json()["error"]["message"]
        assert message and "\n" not in message, f"{what}: {message!r}"


def fuzz(served: Any, path: str, method: str, examples: int) -> None:
    operation = from_dict(DESCRIPTION)[path][method.upper()]
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in MODES])

    @seed(20261121)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def run(case: Any) -> None:
        case.body = short(case.body)
        what = f"{method} {path} {case.body!r}"
        check(case.call(base_url=served.url, timeout=60), what)

    run()
    assert httpx.get(f"{served.url}/ready", trust_env=False).status_code == 200


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda part: str(part).strip("/"))
def test_no_made_up_request_breaks_the_server(served: Any, path: str, method: str):
    fuzz(served, path, method, 20)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda part: str(part).strip("/"))
def test_no_made_up_request_of_many_breaks_the_server(served: Any, path: str, method: str):
    fuzz(served, path, method, 400)
