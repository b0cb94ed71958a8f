"""The safetensors files of a model folder: one, or shards with an index. Nothing else is ever opened.

FP8 weights (with `<name>_scale_inv`, one fp32 scale per block of the matrix) are read dequantised.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longforge.errors import CheckpointError

__all__ = ["TensorFiles", "dequantise", "read_json", "write_tensors"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SCALE = "_scale_inv"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where the file is missing or is not one."""
    if not path.is_file():
        raise CheckpointError(f"{path}: this file is needed in a model folder, and is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: a JSON object is needed, got unreadable text ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, got {type(value).__name__}")
    return value


class TensorFiles:
    """Tensors of a folder by name, read one at a time.

    `quantised_block` is the block of the FP8 scales, rows and columns. Raises CheckpointError, one line, for
    a missing or damaged file, pickled weights, and an index that does not fit its shards.
    """

    def __init__(self, folder: Path, quantised_block: tuple[int, int] = (128, 128)) -> None:
        self.folder = folder
        self.block = quantised_block
        self._open: dict[str, Any] = {}
        self.shards = self._find()
        self.names = {name for name in self.shards if not name.endswith(_SCALE)}

    def _find(self) -> dict[str, str]:
        """The file of each tensor."""
        if (self.folder / INDEX).is_file():
            shards = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
                raise CheckpointError(f"{self.folder / INDEX}: a weight_map object is needed, and is missing")
            for file in sorted(set(shards.values())):
                held = set(self._handle(file).keys())
                if missing := sorted(n for n, f in shards.items() if f == file and n not in held):
                    raise CheckpointError(
                        f"{self.folder / file}: tensor {missing[0]} is needed by the index, and is missing"
                    )
            return shards
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        pickled = sorted(path.name for pattern in _PICKLED for path in self.folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{self.folder / pickled[0]}: safetensors are needed, got pickled weights, "
                "which are never loaded; convert them first"
            )
        raise CheckpointError(
            f"{self.folder / SINGLE}: this file is needed in a model folder, and is missing"
        )

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():
                raise CheckpointError(f"{path}: this shard is needed by the index, and is missing")
            try:
                self._open[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: a whole safetensors file is needed, got a truncated or damaged one ({error})"
                ) from error
        return self._open[file]

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading it."""
        return list(self._handle(self.shards[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor; an FP8 one dequantised to fp32."""
        tensor = self._handle(self.shards[name]).get_tensor(name)
        scale = name + _SCALE
        if scale in self.shards:
            where = f"{self.folder / self.shards[name]}: {name}"
            return dequantise(tensor, self._handle(self.shards[scale]).get_tensor(scale), self.block, where)
        if tensor.element_size() == 1:
            raise CheckpointError(
                f"{self.folder / self.shards[name]}: {scale} is needed for {name} in {tensor.dtype}, "
                "and is missing"
            )
        return tensor


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int], where: str = "weight") -> Tensor:
    """fp32 weight [rows, columns]: each FP8 value times the scale of its block.

    scale [rows / block[0], columns / block[1]], rounded up. Raises CheckpointError unless the scales are
    floating numbers, one per block.
    """
    wanted = [-(-size // b) for size, b in zip(weight.shape, block, strict=False)]
    if weight.dim() != 2 or list(scale.shape) != wanted or scale.dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(
            f"{where}: scales fp32 {wanted} in blocks of {block[0]}x{block[1]} are needed, "
            f"got {scale.dtype} {list(scale.shape)}"
        )
    rows, columns = weight.shape
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * wide[:rows, :columns]


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Writes named tensors (views are fine) as one file, or as shards of `max_shard_bytes` with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
        total += size
    if len(shards) == 1:
        _save(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _save(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Pieces of one fused parameter share storage, which the format refuses: each is copied, shard by shard.
    save_file({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}, path, {"format": "pt"})
