"""The machine and what is installed on it: versions, processor, cores, memory, GPU."""

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from longforge.doctor.check import Check
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.model.cache import KVCache
from longforge.model.config import ModelConfig
from longforge.model.info import model_info
from longforge.server.cores import Cores

__all__ = [
    "available_memory",
    "check_cores",
    "check_gpu",
    "check_memory",
    "check_package",
    "check_processor",
    "check_python",
    "supported_range",
    "within",
]

PYTHON = ">=3.11,<3.14"
FEATURES = {"AVX512-BF16": "avx512_bf16", "AMX": "amx_bf16", "VNNI": "avx512_vnni", "AVX2": "avx2"}
"""Names of processor features, and what Linux calls them."""


def check_python(version: str = platform.python_version()) -> Check:
    """The interpreter's version."""
    if within(version, PYTHON):
        return Check("Python", "ok", version)
    return Check("Python", "fail", version, f"install a Python {PYTHON} and make the environment anew")


def check_package(name: str, version: str | None, supported: str) -> Check:
    """One package. version: None where it is not installed. supported: like ">=2.11,<2.14"; "" for any."""
    install = f"pip install '{name}{supported}'"
    if version is None:
        return Check(name, "fail", "not installed", install)
    if not within(version, supported):
        return Check(name, "fail", f"{version}, expected {supported}", install)
    return Check(name, "ok", version)


def supported_range(name: str, requirements: Sequence[str] | None = None) -> str:
    """The versions of a package that Longforge's own metadata ask for, like ">=2.11,<2.14"; "" for any."""
    listed = metadata.requires("longforge") if requirements is None else requirements
    for requirement in listed or ():
        words = requirement.partition(";")[0].strip()
        found = re.match(r"[A-Za-z0-9._-]+", words)
        if found and found[0] == name:
            # Metadata sort the conditions; people write the lower end first.
            return ",".join(sorted(words[found.end() :].strip(" ()").split(","), reverse=True))
    return ""


def within(version: str, supported: str) -> bool:
    """Whether a version like "2.13.0+cpu" meets conditions like ">=2.11,<2.14"."""
    numbers = _numbers(version)
    for condition in filter(None, supported.split(",")):
        found = re.fullmatch(r"\s*(>=|<=|==|<|>)\s*([\d.]+)\s*", condition)
        assert found is not None, f"a condition of our own metadata: {condition}"
        limit = _numbers(found[2])
        width = max(len(numbers), len(limit))
        ours, theirs = (n + (0,) * (width - len(n)) for n in (numbers, limit))
        met = {
            ">=": ours >= theirs,
            "<=": ours <= theirs,
            "==": ours == theirs,
            "<": ours < theirs,
            ">": ours > theirs,
        }
        if not met[found[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def check_processor(cpuinfo: str, engine: str | None = TILE_ENGINE) -> Check:
    """Which instructions speed up bf16. cpuinfo: the text of /proc/cpuinfo; engine: what the kernels use."""
    flags = set(re.findall(r"\w+", next(iter(re.findall(r"^flags\s*:(.*)$", cpuinfo, re.M)), "")))
    has = ", ".join(name for name, flag in FEATURES.items() if flag in flags) or "no vector features known"
    if engine is None:
        return Check("processor", "warn", f"{has}; bf16 is widened to fp32", "use --dtype float32")
    return Check("processor", "ok", f"{has}; bf16 runs on {engine}")


def check_cores(cores: Cores) -> Check:
    """Cores to compute on."""
    if cores.free < cores.allowed:
        return Check("cores", "warn", cores.why, "end what else computes, or raise the quota")
    return Check("cores", "ok", cores.why)


def check_memory(available_bytes: int, config: ModelConfig) -> Check:
    """Whether a model fits, and the tokens of context that fit beside it, both in fp32."""
    weights = 4 * model_info(config)["total_parameters"]
    page = KVCache(config, 1, "meta").bytes
    tokens = max(0, available_bytes - weights) // page * config.block_size
    found = (
        f"{available_bytes / 2**30:.1f} GiB available: the shipped model takes {weights / 2**20:.0f} MiB and "
        f"leaves room for {tokens:,} tokens"
    )
    if tokens < config.max_positions:
        return Check("memory", "fail", found, "end other programs; one full context does not fit")
    return Check("memory", "ok", found)


def check_gpu() -> Check:
    """CUDA devices as torch sees them, and the driver."""
    driver = _driver()
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Check("GPU", "ok", f"{names}; driver {driver or 'unknown'}, CUDA {torch.version.cuda}")
    if driver:
        fix = "install a build of torch for CUDA (pytorch.org), or a newer driver"
        return Check("GPU", "warn", f"driver {driver}, but torch {torch.__version__} finds no device", fix)
    return Check("GPU", "ok", "none; everything runs on the CPU")


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that programs can still take; None where Linux does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
