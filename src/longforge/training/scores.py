"""Teacher-forced scores on held-out conversations: cheap enough to be taken every hundred steps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from longforge.model.causal_lm import CausalLM
from longforge.model.step import Phase
from longforge.training.data import ASSISTANT, Batch, Sample, pack
from longforge.training.losses import predecessors

__all__ = ["held_out_batches", "teacher_forced_scores"]


def held_out_batches(samples: Sequence[Sample], *, tokens: int, block_size: int) -> list[Batch]:
    """Samples in order, packed into batches of at most `tokens` (a longer sample alone)."""
    batches: list[Batch] = []
    waiting: list[Sample] = []
    for sample in samples:
        if waiting and sum(map(len, waiting)) + len(sample) > tokens:
            batches.append(pack(waiting, block_size))
            waiting = []
        waiting.append(sample)
    return [*batches, pack(waiting, block_size)] if waiting else batches


@torch.no_grad()
def teacher_forced_scores(
    model: CausalLM, batches: Sequence[Batch], *, phase: Phase = "sparse", bf16: bool = False
) -> dict[str, float]:
    """loss: nats per assistant token. tokens: share of them that greedy decoding would write. answers: share
    of last turns of which it would write every token, given the true history.
    """
    loss = right = count = whole = answers = 0.0
    for batch in batches:
        device = batch.ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            hidden = model.forward_packed(batch.ids, batch.layout, phase=phase).hidden
        previous = predecessors(batch.layout)
        spoken = torch.where((batch.weights >= ASSISTANT) & (previous >= 0))[0]
        logits = model.logits(hidden[previous[spoken]])
        loss += float(F.cross_entropy(logits, batch.ids[spoken], reduction="sum"))
        hits = torch.zeros_like(batch.ids, dtype=torch.bool)
        hits[spoken] = logits.argmax(-1) == batch.ids[spoken]
        right += float(hits.sum())
        count += len(spoken)
        ranges = [span for span in batch.answers if span[1] > span[0]]
        whole += sum(bool(hits[start:stop].all()) for start, stop in ranges)
        answers += len(ranges)
    return {"loss": loss / max(count, 1), "tokens": right / max(count, 1), "answers": whole / max(answers, 1)}
