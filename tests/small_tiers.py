"""Pools of a few small pages in every kind of number, and names for their pages."""

import hashlib

import torch
from torch import Tensor

from longforge.engine.tiers import PageName, RecordFormat

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
)
PAGES = 6


def small_pool(seed: int = 0, pages: int = PAGES, width: int = 3) -> list[Tensor]:
    """One tensor per dtype, [pages, ...] of different shapes, every bit pattern possible."""
    generator = torch.Generator().manual_seed(seed)
    pool = []
    for i, dtype in enumerate(DTYPES):
        shape = [(pages, 2, width), (pages, width), (pages,)][i % 3]
        size = torch.empty(0, dtype=dtype).element_size()
        high = 2 if dtype == torch.bool else 256
        values = torch.randint(0, high, (*shape, size), generator=generator, dtype=torch.uint8)
        pool.append(values.view(dtype).reshape(shape))
    return pool


def empty_like(pool: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(tensor) for tensor in pool]


def page_bytes(pool: list[Tensor], page: int) -> list[bytes]:
    return [tensor[page].reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in pool]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


NAMESPACE = digest("namespace")


def name_of(i: int | str, namespace: bytes = NAMESPACE) -> PageName:
    return PageName(namespace, digest(f"page {i}"))


def small_format(seed: int = 0) -> RecordFormat:
    return RecordFormat(small_pool(seed))
