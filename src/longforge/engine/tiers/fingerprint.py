"""Which weights these are, from the weights themselves."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from longforge.errors import InputError

__all__ = ["weights_fingerprint"]

# hashlib lets other threads run while it hashes; more threads than this read faster than memory gives.
_THREADS = 8


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256, in hex, of names, dtypes, shapes and bytes of all tensors, whatever their order or device.

    InputError where a tensor holds no values (meta device). About 2 GB/s per core.
    """
    names = sorted(state)
    for name in names:
        if state[name].is_meta:
            raise InputError(f"weights: {name}: values are needed, got a meta tensor; load the weights first")
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(name, state[name]), names))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest(name: str, tensor: Tensor) -> bytes:
    # The digests of all tensors have one length and are joined in the order of names, so their hash is that
    # of the whole.
    rows = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
    digest.update(rows.data)
    return digest.digest()
