"""Whether the engine's features change nothing, tried out on this machine with the user's own model.

`verification.checks` makes the checks of `longforge verify`. Each runs the same requests in two ways, with a
feature and without it, on engines of its own. Tokens are compared exactly and log-probabilities up to
rounding; `compare` says how a difference is judged.
"""
