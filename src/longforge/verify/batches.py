"""Chunks, batches and interruptions: how work is cut up does not show."""

from longforge.verify.check import Check
from longforge.verify.compare import Comparison
from longforge.verify.drive import greedy, request, run, sampled
from longforge.verify.subject import Subject

__all__ = ["batched_equals_alone", "chunked_equals_one_shot", "preemption_equals_uninterrupted"]

ANSWER = 5
"""Tokens of an answer."""
TOGETHER = 5
"""Requests in a batch."""


def chunked_equals_one_shot(subject: Subject) -> Check:
    """Prompts in small chunks, whose borders fall everywhere in a page, and in one piece."""
    block = subject.block
    prompts = {"plain": subject.tokens(3 * block + 2, 11), "chat": subject.prompt(ANSWER)}
    asked = [request(f"{kind}, greedy", prompt, greedy(ANSWER)) for kind, prompt in prompts.items()]
    asked.append(request("plain, sampled", prompts["plain"], sampled(ANSWER, 11)))
    pages = sum(len(one.prompt_ids) // block + 2 for one in asked)
    found = Comparison(subject)
    small = block + block // 2 + 1
    with (
        subject.engine(pages=pages, max_batch_tokens=small) as chunked,
        subject.engine(pages=pages, max_batch_tokens=2 * len(prompts["chat"])) as whole,
    ):
        found.same(asked, run(chunked, asked), run(whole, asked))
        steps = chunked.stats().steps - whole.stats().steps
    found.expect(steps > 0, "the small budget took no more steps than the large one")
    return found.verdict("chunked_equals_one_shot", f"chunks of {small} tokens, {steps} steps more")


def batched_equals_alone(subject: Subject) -> Check:
    """Requests of all lengths together, and each of them alone."""
    block = subject.block
    asked = []
    for place in range(TOGETHER):
        prompt = subject.prompt(ANSWER) if place == 3 else subject.tokens(1 + place * (block - 1), 20 + place)
        params = sampled(ANSWER, place) if place % 2 else greedy(ANSWER)
        asked.append(request(f"request {place}", prompt, params))
    pages = sum(len(one.prompt_ids) // block + 2 for one in asked)
    found = Comparison(subject)
    with (
        subject.engine(pages=pages, max_running=TOGETHER) as batch,
        subject.engine(pages=pages, max_running=1) as alone,
    ):
        found.same(asked, run(batch, asked), run(alone, asked))
    return found.verdict("batched_equals_alone", f"batches of {TOGETHER}")


def preemption_equals_uninterrupted(subject: Subject) -> Check:
    """Three requests in a pool that is too small for their answers, and in one that is not."""
    block = subject.block
    asked = []
    for place in range(3):
        params = sampled(ANSWER + 1, place) if place else greedy(ANSWER + 1)
        asked.append(request(f"request {place}", subject.tokens(2 * block - 2, 30 + place), params))
    found = Comparison(subject)
    with (
        subject.engine(pages=8, max_running=3) as tight,
        subject.engine(pages=20, max_running=3) as roomy,
    ):
        found.same(asked, run(tight, asked), run(roomy, asked))
        times = tight.stats().preemptions
    found.expect(times > 0, "the small pool was never short of pages")
    return found.verdict("preemption_equals_uninterrupted", f"{times} preemptions")
