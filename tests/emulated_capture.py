"""CUDA graphs as a CPU can have them: the function runs again, its outputs stay where they were."""

from collections.abc import Callable

import torch

from longforge.engine.graphs import Capture, Outputs
from longforge.model import CausalLM

__all__ = ["EmulatedCapture", "emulated_capture_for"]


class EmulatedCapture:
    """Counts captures and replays. As with a real graph, a replay overwrites what the last one returned."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        self.captures += 1
        outputs = tuple(torch.full_like(output, torch.nan) for output in function())

        def replay() -> Outputs:
            self.replays += 1
            for fixed, fresh in zip(outputs, function(), strict=True):
                fixed.copy_(fresh)
            return outputs

        return replay


def emulated_capture_for(model: CausalLM, wanted: bool) -> Capture | None:
    """In place of `capture_for`, for models on a CPU."""
    return EmulatedCapture() if wanted and not model.config.has("lightning") else None
