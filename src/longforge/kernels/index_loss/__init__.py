"""The loss that trains the selector (KL to the attention's own distribution), and how well it selects."""

from longforge.kernels.index_loss.api import index_loss
from longforge.kernels.index_loss.recall import selection_recall

__all__ = ["index_loss", "selection_recall"]
