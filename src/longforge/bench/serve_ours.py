"""Our side: an engine stepped in this process."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from longforge.bench.serve_rates import Deadline
from longforge.engine import Engine
from longforge.engine.request import GenerationRequest, RequestFailed
from longforge.errors import CheckError
from longforge.model import CausalLM
from longforge.protocol import SamplingParams

__all__ = ["Answers", "engine_for", "first_token", "generate", "logit_gap", "random_prompts"]

_names = itertools.count()


@dataclass(frozen=True)
class Answers:
    """Of each request its tokens and when each was there, and when all began: seconds of `perf_counter`."""

    tokens: list[list[int]]
    times: list[list[float]]
    begun: float


def engine_for(
    model: CausalLM, batch: int, prompt: int, tokens: int, *, drafts: int = 0, cache: bool = False
) -> Engine:
    """An engine in which so many prompts of so many tokens go through together and are all continued."""
    pages = batch * (-(-(prompt + tokens + drafts) // model.config.block_size) + 1)
    return Engine(
        model,
        pages=pages,
        max_running=batch,
        max_batch_tokens=max(2048, batch * prompt if batch > 1 else batch),
        prefix_cache=cache,
        drafts=drafts,
    )


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, stops: tuple[int, ...] = ()
) -> Answers:
    """Greedy answers of at most `tokens` tokens, all requests at once. CheckError for one that fails."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, stop_token_ids=stops)
    answers = {f"bench-{next(_names)}": ([], []) for _ in prompts}
    begun = time.perf_counter()
    for name, prompt in zip(answers, prompts, strict=True):
        engine.submit(GenerationRequest(name, tuple(prompt), params))
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            if isinstance(event, RequestFailed):
                raise CheckError(f"bench serve: an answer expected, a request failed: {event.error}")
            ids, times = answers[event.request_id]
            ids.append(event.token_id)
            times.append(now)
    pairs = list(answers.values())
    return Answers([ids for ids, _ in pairs], [times for _, times in pairs], begun)


def first_token(
    engine: Engine, prompt: Sequence[int], deadline: Deadline | None = None
) -> tuple[float, int] | None:
    """Seconds until the first token, and prompt tokens found in the cache; None where the time was up."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    request = GenerationRequest(f"bench-{next(_names)}", tuple(prompt), params)
    begun = time.perf_counter()
    engine.submit(request)
    while True:
        for event in engine.step():
            if isinstance(event, RequestFailed):
                raise CheckError(f"bench serve: a first token expected, the request failed: {event.error}")
            return time.perf_counter() - begun, event.cached_tokens
        if deadline is not None and deadline.passed:
            engine.cancel(request.id)
            return None


def logit_gap(model: CausalLM) -> Callable[[Sequence[int], int, int], float]:
    """How far apart the logits of two next tokens are after some tokens, by this model."""

    def gap(ids: Sequence[int], one: int, other: int) -> float:
        with torch.inference_mode():
            logits = model(torch.tensor([list(ids)]))[0, -1]
        return abs(float(logits[one] - logits[other]))

    return gap


def random_prompts(model: CausalLM, batch: int, length: int, seed: int) -> list[list[int]]:
    """Token ids, each as likely as the other."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=rng).tolist()
