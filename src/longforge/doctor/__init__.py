"""What this machine can do for Longforge, and what to do where it cannot: looked at, not guessed.

`examine` makes the checks of `longforge doctor`; `compile_kernels` is `longforge doctor --compile`.
"""
