"""Longforge: a block-sparse mixture-of-experts model, its engine, and agent-native reinforcement learning."""

__all__ = ["__version__"]

__version__ = "0.1.0"
