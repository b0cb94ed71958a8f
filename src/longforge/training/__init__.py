"""Optimising a model: losses, optimiser, packing, pre-training."""
