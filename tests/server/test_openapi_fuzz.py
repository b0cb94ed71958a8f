"""Requests made up from the server's own description: never a 5xx, never a reply of another kind."""

import json
import random
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


NEVER_RIGHT = ("/admin/weights", "/v1/models/{model}", "/tokenize")
"""What is made up is no model's folder and no model's name, and seldom names exactly one of two fields."""


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


NEEDED = frozenset({"model", "messages", "prompt", "input", "max_tokens", "tokens"})


def short(body: Any, kept: int) -> Any:
    """A body whose answer comes soon, and which is not merely refused for the name of its model or for two
    fields that do not go together: of those that are not needed, `kept` stay."""
    if not isinstance(body, dict):
        return body
    extra = sorted(set(body) - NEEDED)
    needless = {"prompt" if kept % 2 else "messages"} if {"prompt", "messages"} <= set(body) else set()
    stay = (NEEDED - needless).union(random.Random(kept).sample(extra, min(kept, len(extra))))
    wanted = {name: value for name, value in body.items() if name in stay}
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


def check(reply: schemathesis.Response, what: str) -> None:
    kind = reply.headers.get("content-type", [""])[0].partition(";")[0]
    assert reply.status_code < 500, f"{what}: {reply.status_code} {reply.text}"
    assert kind in KINDS, f"{what}: {kind}"
    if reply.status_code >= 400:
        message = reply.json()["error"]["message"]
        assert message and "\n" not in message, f"{what}: {message!r}"


def fuzz(served: Any, path: str, method: str, examples: int) -> list[int]:
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
    @given(case=cases, kept=st.integers(0, 6))
    def run(case: Any, kept: int) -> None:
        case.body = short(case.body, kept)
        what = f"{method} {path} {case.body!r}"
        reply = case.call(base_url=served.url, timeout=60)
        check(reply, what)
        answered.append(reply.status_code)

    answered: list[int] = []
    run()
    assert httpx.get(f"{served.url}/ready", trust_env=False).status_code == 200
    return answered


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda part: str(part).strip("/"))
def test_no_made_up_request_breaks_the_server(served: Any, path: str, method: str):
    fuzz(served, path, method, 20)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda part: str(part).strip("/"))
def test_no_made_up_request_of_many_breaks_the_server(served: Any, path: str, method: str):
    answered = fuzz(served, path, method, 150)
    named = "{" in path or "count_tokens" in path  # nothing of a made-up name is there to be served
    assert 200 in answered or named or path in NEVER_RIGHT, "some must be served, or nothing was tried"
