"""Where a model computes and in which dtype, and why: chosen from the machine and the checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch

from longforge.errors import InputError
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.model.checkpoint import config_of, declared_dtype
from longforge.model.info import model_info

__all__ = ["DTYPES", "Placement", "choose_placement", "cpu_dtype"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""What can be asked for. fp16 is not among them: processors compute it hundreds of times slower."""

LARGE_WEIGHTS = 256 * 2**20
"""fp32 bytes from which bf16 is taken on a processor that multiplies it without matrix tiles. Below, weights
stay in its caches, and a token costs more in conversions than it saves in reading. With tiles bf16 is faster
whatever the size (`benchmarks/results/cpu/serve.json` has both for 23 MiB)."""

UNITS = {"amx": "AMX", "avx512": "AVX512-BF16"}


@dataclass(frozen=True)
class Placement:
    """A device, a dtype, and the reason in words."""

    device: torch.device
    dtype: torch.dtype
    why: str

    def __str__(self) -> str:
        where = "GPU" if self.device.type == "cuda" else "CPU"
        return f"{where}, {str(self.dtype).removeprefix('torch.')}: {self.why}"


def choose_placement(folder: Path, device: str = "auto", dtype: str = "auto") -> Placement:
    """For the model in `folder`. device: auto, cpu, cuda or cuda:N; dtype: auto or a name of DTYPES.

    Errors: InputError for another word or a device that is not there; CheckpointError for the folder.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype: expected auto, {' or '.join(DTYPES)}, got {dtype!r}")
    chosen = _device(device)
    if dtype != "auto":
        return Placement(chosen, DTYPES[dtype], "as asked")
    declared = declared_dtype(folder)
    if chosen.type == "cuda":
        return Placement(chosen, declared, f"{torch.cuda.get_device_name(chosen)}, as the checkpoint says")
    weights = 4 * model_info(config_of(folder))["total_parameters"]
    kind, why = cpu_dtype(declared, weights, TILE_ENGINE)
    return Placement(chosen, kind, why)


def cpu_dtype(declared: torch.dtype, weight_bytes: int, engine: str | None) -> tuple[torch.dtype, str]:
    """fp32 or bf16 on a CPU, and why.

    declared: the checkpoint's dtype. weight_bytes: of all weights in fp32. engine: what multiplies bf16
    (`kernels.tiles.engine`).
    """
    if declared in (torch.float32, torch.float64):
        return torch.float32, "as the checkpoint says"
    if engine is None:
        return torch.float32, "neither AVX512-BF16 nor AMX found, without which bf16 is slower"
    if engine != "amx" and weight_bytes < LARGE_WEIGHTS:
        return (
            torch.float32,
            f"{UNITS[engine]} found, but {weight_bytes / 2**20:.0f} MiB gain nothing by bf16",
        )
    return torch.bfloat16, f"{UNITS[engine]} found"


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {asked!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device: expected one of this machine's {torch.cuda.device_count()} CUDA devices, got {asked!r}"
        )
    return device
