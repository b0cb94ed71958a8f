"""Weights of tokens as whole numbers: exp(x) in units of 2**-44, the same bits wherever they are computed.

Sampling decides by comparing sums of exp(x): does the mass so far pass the draw, do the likelier tokens hold
top_p already. In floating point the sums depend on their order and exp on its library, so that two
implementations, two devices or two batches would now and then decide differently. Here exp is made of single
IEEE operations and its result is rounded to a whole number, and sums of whole numbers have no order.

The likeliest token weighs exactly 2**44. The error of a weight is below 2**-45 of that, and what is less
likely than that is never sampled: a draw has 48 bits anyway.
"""

import math

__all__ = ["LOG2_E", "LOG_2", "LOWEST", "MAX_VOCAB", "POWERS", "SERIES", "UNIT"]

_BITS = 44
UNIT = 1 << _BITS
"""The weight of the likeliest token."""
MAX_VOCAB = 1 << (62 - _BITS)
"""Most tokens whose sum surely fits int64, with a bit to spare."""
LOWEST = -32.0
"""Below it weights are 0; exp(-32) * UNIT rounds to 0 as well."""
LOG2_E = 1 / math.log(2)
LOG_2 = math.log(2)
SERIES = tuple(1 / math.factorial(n) for n in range(12, -1, -1))
"""Taylor's coefficients of exp from degree 12 to 0: for |x| <= log(2) / 2 the rest is below 2e-16."""
POWERS = tuple(2.0 ** (_BITS - n) for n in range(48))
"""UNIT / 2**n for each n that LOWEST allows: exp(x) = exp(x + n * LOG_2) / 2**n."""
