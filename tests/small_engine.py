"""An engine driven to the end of its work, its pages checked after every step."""

import random
from typing import Any

from longforge.engine import Engine, GenerationRequest, TokenEvent
from longforge.protocol import SamplingParams

GREEDY = SamplingParams(max_tokens=9, temperature=0.0)


def tokens(count: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(280) for _ in range(count))


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[TokenEvent]]:
    for request in requests:
        engine.submit(request)
    answers: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            assert isinstance(event, TokenEvent)
            answers[event.request_id].append(event)
        engine.check_pages()
    return answers


def one(
    engine: Engine, prompt: tuple[int, ...], params: SamplingParams = GREEDY, **rest: Any
) -> list[TokenEvent]:
    return run(engine, GenerationRequest("one", prompt, params, **rest))["one"]


def ids(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]
