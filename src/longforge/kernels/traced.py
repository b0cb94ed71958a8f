"""What the operations have in common as `torch.library` operators.

Each operation is an operator too, `torch.ops.longforge.<operation>`, with a fake implementation and a
gradient: what torch.compile, export and fake tensors need to see. Its public function goes through the
operator only when one of these looks (`is_traced`). Otherwise it calls the backend itself: dispatcher and
wrapping add about ten microseconds to a call (sparse attention over 20 tokens on a CPU: 18 without, 29 with),
which a decode step would pay in every layer, and the backend's own autograd keeps what its backward pass
needs.

An operator keeps its inputs alone. Its backward pass, an operator too, computes the forward once more under
the backend's autograd (`gradients`): the price of a compiled training step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["gradients", "is_traced"]

_PLAIN = (Tensor, nn.Parameter)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler, or a tensor that stands for others (fake, functional), is looking."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN


def gradients(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of compute(*inputs) with respect to each input, contiguous, zeros where there is none.

    Called where an operator computes, which torch runs below autograd; ending inference mode brings autograd
    back.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = compute(*leaves)
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if out.requires_grad:
            found = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
    return tuple(
        x.new_zeros(x.shape) if gradient is None else gradient.contiguous()
        for gradient, x in zip(found, leaves, strict=True)
    )
