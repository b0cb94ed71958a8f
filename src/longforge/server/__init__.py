"""The HTTP dialects over an engine.

Import what is needed from its files: `wire` and `replies` load no torch.
"""
