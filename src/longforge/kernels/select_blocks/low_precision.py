"""Index keys in one byte per number, and how far scores over them can be from those over the keys themselves.

A key is held as codes (FP8 e4m3 or int8) and one fp32 scale: key ~ code * scale. Per page, `radius` is a
number with

    |score(q, key) - score(q, code * scale)| <= radius * |q|        for every q and every key of the page,

where both scores are as computed, in fp32 or on tensor cores in any order. By Cauchy-Schwarz the difference
of the exact scores is at most |q| |key - code * scale|, and an fp32 sum of Di products is within gamma |q|
|key| of the exact one (Higham, Accuracy and Stability, 3.1). So the bound holds whatever the keys are; it
needs no assumption on their distribution, only that products and sums stay within fp32's normal range (1e-38
to 3e38). The CPU's scan (cpu_tiles.py) looks after those that do not.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longforge.errors import InputError

__all__ = ["CODE_DTYPES", "LowPrecisionKeys", "lower_precision"]

CODE_DTYPES = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Dtypes of codes, and the greatest code."""


@dataclass(frozen=True)
class LowPrecisionKeys:
    """One-byte copies of the index keys of whole pages."""

    codes: Tensor
    """[S, Bk, Di], float8_e4m3fn or int8."""
    scales: Tensor
    """fp32 [S, Bk], one per key."""
    radius: Tensor
    """fp32 [S], see above."""


def lower_precision(index_k_pages: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> LowPrecisionKeys:
    """index_k_pages [S, Bk, Di] -> codes, scales and radius; dtype one of CODE_DTYPES.

    A page with rows that hold NaN (no token yet) gets a radius of NaN: selection never looks at such a page.
    """
    if dtype not in CODE_DTYPES:
        raise InputError(f"lower_precision: dtype one of {[*CODE_DTYPES]} expected, got {dtype}")
    greatest = CODE_DTYPES[dtype]
    keys = index_k_pages.detach().double()
    scales = (keys.abs().amax(2) / greatest).float()
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = (keys / scales.double()[..., None]).clamp(-greatest, greatest)
    if dtype == torch.int8:
        codes = codes.nan_to_num(0.0).round()
    codes = codes.float().to(dtype)
    error = (keys - codes.double() * scales.double()[..., None]).norm(dim=2)
    slack = rounding(keys.shape[2])
    radius = (error + 2 * slack * (keys.norm(dim=2) + error)).amax(1)
    # |q| is computed in fp32 by whoever uses the radius; this covers its rounding and that of the radius.
    return LowPrecisionKeys(codes, scales, (radius * (1 + 2**-12)).float())


def rounding(dim: int) -> float:
    """gamma: a score of `dim` products computed in fp32, scaled and used in a bound, is within gamma |q| |k|.

    Summing in any order in fp32 costs at most dim * 2^-24. Tensor cores add groups of 8 or 16 products that
    are first cut off at 2^-23 of the greatest, so at most 10 / 8 * dim * 2^-23. Twice that, and 32 for the
    rest.
    """
    return (2.5 * dim + 32) * math.ldexp(1.0, -23)
