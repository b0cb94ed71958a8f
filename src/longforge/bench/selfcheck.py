"""A quick check of our path against the reference, before a number is worth telling.

The same layer shape and dtype over a few blocks, memory that holds no token filled with NaN. Wanted is what
the references give in float64 on the CPU for the same (rounded) numbers.
"""

from dataclasses import replace

import torch
from torch import Tensor

from longforge.bench.work import Phase, Shape
from longforge.errors import CheckError
from longforge.kernels.index_loss import index_loss
from longforge.kernels.layout import PackedLayout
from longforge.kernels.msa_cases import Case, Inputs, make_inputs
from longforge.kernels.prefixes import prefixes
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.sparse_attention import sparse_attention

__all__ = ["check_operation"]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Of the largest element of a result: some tens of rounding steps of each dtype."""
SCORE_TOLERANCE = 1e-5
"""Of the largest score: what fp32 sums in another order may differ by, so that which of two blocks closer
than that is selected does not matter."""


def check_operation(phase: Phase, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Raises CheckError unless selection, attention and, for training, gradients and index loss are right."""
    tail = {"decode": 1, "prefill": shape.block_size + 3, "train": 0}[phase]
    top_k = min(shape.top_k, 3)
    lengths = (4 * shape.block_size + shape.block_size // 3 + 1, shape.block_size + 1)
    case = Case(lengths, shape.heads, shape.groups, shape.dim, shape.index_dim, shape.block_size, top_k, tail)
    inputs = make_inputs(case, dtype)
    there = _on(inputs, device)
    blocks = select_blocks(there.index_q, there.index_k, there.layout, top_k)
    _check_selection(inputs, blocks.cpu(), top_k)
    wanted = _results(inputs.to(torch.float64), blocks.cpu(), phase == "train", "reference")
    got = _results(there, blocks, phase == "train", None)
    for name, value in got.items():
        error = float((value.cpu().double() - wanted[name].double()).abs().max())
        size = float(wanted[name].double().abs().max().clamp(min=1e-3))
        if not error <= TOLERANCE[dtype] * size:  # also where it is NaN
            raise CheckError(
                f"bench attention: {phase} {name} on {device} within {TOLERANCE[dtype]:g} of the reference "
                f"expected, got {error / size:.2g}; nothing is reported while the check fails"
            )


def _check_selection(inputs: Inputs, blocks: Tensor, top_k: int) -> None:
    """The own block, no block twice, and none that scores below the best one left out."""
    size, layout = inputs.layout.block_size, inputs.layout
    for path in prefixes(layout):
        scores = inputs.index_q[path.rows].double() @ path.keys(inputs.index_k).double().T
        scores = scores.masked_fill(~path.causal()[:, None, :], float("-inf"))
        padded = torch.nn.functional.pad(scores, (0, -scores.shape[2] % size), value=float("-inf"))
        maxima = padded.unflatten(2, (-1, size)).amax(3)
        margin = SCORE_TOLERANCE * float(scores[scores.isfinite()].abs().max())
        own = path.positions // size
        for i, g in torch.cartesian_prod(torch.arange(len(own)), torch.arange(scores.shape[1])).tolist():
            chosen = [b for b in blocks[path.rows][i, g].tolist() if b >= 0]
            count, at = min(top_k, int(own[i]) + 1), int(own[i])
            left = maxima[i, g, [b for b in range(at) if b not in chosen]]
            picked = maxima[i, g, [b for b in chosen if b != at]]
            fine = len(chosen) == count and sorted(set(chosen)) == chosen and chosen[-1] == at
            if not fine or (len(left) and len(picked) and picked.min() < left.max() - margin):
                raise CheckError(
                    f"bench attention: the best {count} blocks up to {at} expected, got {chosen}; "
                    "nothing is reported while the check fails"
                )


def _results(inputs: Inputs, blocks: Tensor, train: bool, backend: str | None) -> dict[str, Tensor]:
    q, k, v = (t.detach().requires_grad_(train) for t in (inputs.q, inputs.k, inputs.v))
    out, lse = sparse_attention(q, k, v, blocks, inputs.layout, backend=backend)
    results = {"output": out.detach(), "log-sum-exp": lse}
    if not train:
        return results
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    gradients = torch.autograd.grad(out, (q, k, v), cotangent.to(out))
    results |= dict(zip(("gradient of q", "gradient of k", "gradient of v"), gradients, strict=True))
    index_q, index_k = (t.detach().requires_grad_() for t in (inputs.index_q, inputs.index_k))
    loss = index_loss(index_q, index_k, q, k, blocks, inputs.layout, backend=backend)
    results["index loss"] = loss.detach()
    gradients = torch.autograd.grad(loss, (index_q, index_k))
    return results | dict(zip(("gradient of index q", "gradient of index k"), gradients, strict=True))


def _on(inputs: Inputs, device: torch.device) -> Inputs:
    layout = inputs.layout
    positions, paths, slots, page_table = (part.to(device) for part in layout.parts[:4])
    moved = PackedLayout(positions, paths, slots, page_table, layout.block_size)
    tensors = {n: getattr(inputs, n).to(device) for n in ("index_q", "index_k", "q", "k", "v")}
    return replace(inputs, layout=moved, **tensors)
