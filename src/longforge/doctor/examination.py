"""All checks in the order in which they are told."""

import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from longforge.doctor.check import Check
from longforge.doctor.house import (
    check_kernel_cache,
    check_model,
    check_port,
    check_program,
    check_sandbox,
    find_postgres,
    kernel_folders,
)
from longforge.doctor.machine import (
    available_memory,
    check_cores,
    check_gpu,
    check_memory,
    check_package,
    check_processor,
    check_python,
    supported_range,
)
from longforge.errors import LongforgeError
from longforge.model import shipped
from longforge.model.checkpoint import config_of
from longforge.server.cores import free_cores

__all__ = ["examine"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def examine(port: int = 8000) -> list[Check]:
    """Looks at everything; takes seconds, more where kernels are not compiled yet."""
    return [*_machine(), *_house(port)]


def _machine() -> Iterator[Check]:
    yield check_python()
    for name in ("torch", "numba"):
        yield check_package(name, _version(name), supported_range(name))
    triton = _version("triton")
    if triton is None and not torch.cuda.is_available():
        yield Check("triton", "ok", "not installed; only a GPU needs it")
    else:
        yield check_package("triton", triton, supported_range("triton"))
    info = Path("/proc/cpuinfo")
    yield check_processor(info.read_text(encoding="utf-8", errors="replace") if info.is_file() else "")
    yield check_cores(free_cores())
    yield _memory()
    yield check_gpu()


def _house(port: int) -> Iterator[Check]:
    yield check_kernel_cache(kernel_folders())
    yield check_sandbox()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    yield check_program("Chromium", browser, "scripts/install_browser.sh")
    yield check_program("PostgreSQL", find_postgres(), "apt-get install postgresql")
    yield check_port(port)
    yield check_model()


def _memory() -> Check:
    available = available_memory()
    if available is None:
        return Check("memory", "warn", "this system does not tell what is free")
    try:
        return check_memory(available, config_of(shipped.path()))
    except LongforgeError as error:
        return Check("memory", "fail", str(error), "reinstall Longforge")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
