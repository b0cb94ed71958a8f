"""Drafts: they save steps and change nothing, and what they stand on is what it should be."""

import numpy as np
import torch
from torch import Tensor

from longforge.engine.draft_length import DraftCosts
from longforge.engine.request import GenerationRequest
from longforge.engine.runner import Runner, Stretch
from longforge.engine.sequence import Sequence
from longforge.kernels.layout import PackedLayout
from longforge.verify.check import Check
from longforge.verify.compare import Comparison
from longforge.verify.drive import greedy, ids, request, run, sampled
from longforge.verify.subject import Subject

__all__ = ["speculation_equals_plain", "verify_equals_decode"]

FREE = DraftCosts(rows=(1,), step=(1.0,), draft=(0.0,))
"""Drafts cost nothing: as many as allowed are always made."""
ANSWER = 24
"""Tokens of an answer."""
MOST = 3
CHAIN = MOST + 1
"""Tokens that are computed in one pass where as many drafts as can be are verified."""


def speculation_equals_plain(subject: Subject) -> Check:
    """Answers with one, two and three drafts, and without; and the states that drafts begin from."""
    name, config = "speculation_equals_plain", subject.model.config
    if not config.mtp_modules:
        return Check(name, True, "no MTP module: nothing to compare")
    if config.has("lightning"):
        return Check(name, True, "Lightning layers, with which nothing is drafted: nothing to compare")
    prompt = subject.prompt(ANSWER)
    asked = [request("greedy", prompt, greedy(ANSWER)), request("sampled", prompt, sampled(ANSWER, 3))]
    pages = 2 * (len(prompt) // subject.block + 3)
    found, rates = Comparison(subject), []
    with subject.engine(pages=pages) as engine:
        plain = run(engine, asked)
    for drafts in range(1, MOST + 1):
        with subject.engine(pages=pages, drafts=drafts, draft_costs=FREE) as engine:
            found.same(asked, run(engine, asked), plain, f"{drafts} drafts, ")
            stats = engine.stats()
        found.expect(stats.drafted_tokens > 0, f"{drafts} drafts: none were made")
        rates.append(f"{stats.accepted_tokens}/{stats.drafted_tokens}")
    _compare_tails(subject, found, prompt)
    return found.verdict(name, f"accepted with 1 to {MOST} drafts: {', '.join(rates)}")


def _compare_tails(subject: Subject, found: Comparison, prompt: tuple[int, ...]) -> None:
    """Each page keeps its last token's hidden state, from which drafts go on behind a page that was found."""
    block = subject.block
    ends = torch.arange(block - 1, len(prompt), block)
    if not len(ends):
        return
    pages = -(-len(prompt) // block)
    runner, sequence = _bare(subject, prompt, pages, drafts=True)
    middle = max(1, len(prompt) // 2)
    for start, end in ((0, middle), (middle, len(prompt))):
        if end > start:
            runner.run([Stretch(sequence, start, sequence.ids[start:end].tolist())])
    kept = torch.cat([runner.tail(page) for page in range(len(ends))])
    expected = _whole(subject, prompt)[ends.to(kept.device)]
    off = float((kept.double() - expected.double()).abs().max())
    allowed = subject.tolerance * max(1.0, float(expected.abs().max()))
    found.expect(off <= allowed, f"hidden states kept for drafts: off by {off:.1e}, allowed {allowed:.1e}")


def verify_equals_decode(subject: Subject) -> Check:
    """Log-probabilities behind a chain of tokens in one pass, and one token at a time."""
    name = "verify_equals_decode"
    prompt = subject.prompt(ANSWER)
    with subject.engine(pages=len(prompt) // subject.block + 3) as engine:
        chain = ids(run(engine, [request("chain", prompt, greedy(2 * CHAIN))])["chain"])
    path = prompt + chain
    pages = -(-len(path) // subject.block)
    ways: list[Tensor] = []
    for size in (CHAIN, 1):
        runner, sequence = _bare(subject, path, pages)
        runner.run([Stretch(sequence, 0, sequence.ids[: len(prompt)].tolist())])
        rows = []
        for start in range(len(prompt), len(path), size):
            hidden = runner.run([Stretch(sequence, start, sequence.ids[start : start + size].tolist())])
            rows.append(runner.logits(hidden).double().log_softmax(dim=-1))
        ways.append(torch.cat(rows))
    # What is all but impossible is not compared: its log-probability is a difference of large numbers.
    likely = ways[1] > -20
    off = (ways[0] - ways[1]).abs()
    largest = float(off.masked_fill(~likely, 0.0).max())
    detail = (
        f"{int(likely.sum())} log-probabilities behind {len(chain)} tokens, largest difference {largest:.1e}"
    )
    if not largest <= subject.tolerance:
        row = int(off.masked_fill(~likely, 0.0).amax(dim=-1).argmax())
        return Check(name, False, f"{detail} at token {row}, rounding explains {subject.tolerance:.0e}")
    return Check(name, True, f"{detail}; chains of {CHAIN}")


def _bare(
    subject: Subject, path: tuple[int, ...], pages: int, *, drafts: bool = False
) -> tuple[Runner, Sequence]:
    """A runner without an engine around it, and a sequence that holds its pages in order."""
    runner = Runner(subject.model, pages=pages, max_running=1, context=pages * subject.block, drafts=drafts)
    sequence = Sequence(GenerationRequest("bare", path), limit=len(path), seed=0, arrival=0)
    sequence.row, sequence.pages = 0, list(range(pages))
    runner.show_pages(sequence, 0)
    return runner, sequence


def _whole(subject: Subject, path: tuple[int, ...]) -> Tensor:
    """Hidden states [T, d] of a path in one pass without any cache."""
    model = subject.model
    layout = PackedLayout.from_lengths([len(path)], subject.block, model.device)
    with torch.inference_mode():
        return model.forward_packed(
            torch.from_numpy(np.array(path)).to(model.device), layout, expert_loads=False
        ).hidden
