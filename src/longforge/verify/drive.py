"""Drives an engine to the end of its work."""

from longforge.engine import Engine, GenerationRequest, RequestFailed, TokenEvent
from longforge.protocol import SamplingParams

__all__ = ["ALTERNATIVES", "Asked", "greedy", "ids", "request", "run", "sampled"]

ALTERNATIVES = 8
"""Likeliest tokens whose log-probabilities are compared at each place."""

Asked = list[GenerationRequest]


def greedy(tokens: int) -> SamplingParams:
    """The likeliest token each time."""
    return SamplingParams(max_tokens=tokens, temperature=0.0, top_logprobs=ALTERNATIVES)


def sampled(tokens: int, seed: int) -> SamplingParams:
    """Drawn from the whole distribution."""
    return SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, top_logprobs=ALTERNATIVES)


def request(
    name: str, prompt: tuple[int, ...], params: SamplingParams, *, tenant: str = "", cache: bool = True
) -> GenerationRequest:
    """A request of that name."""
    return GenerationRequest(name, prompt, params, tenant=tenant, cache=cache)


def run(engine: Engine, asked: Asked) -> dict[str, list[TokenEvent]]:
    """All tokens of each request by its id. Raises the error of a request that fails."""
    answers: dict[str, list[TokenEvent]] = {one.id: [] for one in asked}
    for one in asked:
        engine.submit(one)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, RequestFailed):
                raise event.error
            answers[event.request_id].append(event)
    return answers


def ids(events: list[TokenEvent]) -> tuple[int, ...]:
    """The tokens of an answer."""
    return tuple(event.token_id for event in events)
