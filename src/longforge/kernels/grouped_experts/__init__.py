"""The routed experts of a mixture-of-experts layer, tokens grouped by expert."""

from longforge.kernels.grouped_experts.api import grouped_experts

__all__ = ["grouped_experts"]
