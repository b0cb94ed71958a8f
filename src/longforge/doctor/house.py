"""What Longforge uses on the machine: kernel cache, sandbox, programs, port, the shipped model."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from longforge.doctor.check import Check
from longforge.engine import Engine, GenerationRequest
from longforge.errors import InputError, LongforgeError
from longforge.model import CausalLM, shipped
from longforge.protocol import SamplingParams
from longforge.server.running import bind

__all__ = [
    "check_kernel_cache",
    "check_model",
    "check_port",
    "check_program",
    "check_sandbox",
    "find_postgres",
    "kernel_folders",
]

ROOMS = ("dense_attention.cpu", "sparse_attention.cpu", "select_blocks.cpu", "grouped_experts.cpu")
"""Modules whose kernels every request runs."""
WALLS = (
    "import json, sys; from pathlib import Path;"
    "from longforge.forge.code_search.isolation import build_walls;"
    "print(json.dumps(build_walls(Path(sys.argv[1]))))"
)
COMPILE = "longforge doctor --compile"


def kernel_folders() -> list[Path]:
    """Where this version keeps the machine code of the kernels, a folder per operation."""
    folders = set()
    for room in ROOMS:
        module = importlib.import_module(f"longforge.kernels.{room}")
        for value in vars(module).values():
            kept = getattr(getattr(value, "stats", None), "cache_path", None)
            if kept:
                folders.add(Path(kept))
    return sorted(folders)


def check_kernel_cache(folders: Sequence[Path]) -> Check:
    """Whether kernels can be kept, and whether they are there already."""
    name = "kernel cache"
    base = folders[0].parent.parent
    if not _writable(base):
        fix = f"make {base} writable, or name another folder in NUMBA_CACHE_DIR"
        return Check(name, "warn", f"{base} cannot be written: every start compiles anew", fix)
    cold = [folder for folder in folders if not any(folder.glob("*.nbc"))]
    if cold:
        found = f"{base}: {len(folders) - len(cold)} of {len(folders)} operations are compiled"
        return Check(name, "warn", f"{found}; the first start takes longer", COMPILE)
    return Check(name, "ok", f"{base}: compiled")


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def check_sandbox() -> Check:
    """Which walls stand around a process that runs tools: built in a child, which ends."""
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-c", WALLS, empty], capture_output=True, text=True, timeout=60
        )
    helper = "bubblewrap found" if shutil.which("bwrap") else "no bubblewrap, none needed"
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Check("sandbox", "fail", last, "run agents elsewhere: tools cannot be walled in here")
    walls = json.loads(done.stdout)
    missing = [wall for wall, stands in walls.items() if not stands]
    if missing:
        found = f"without {', '.join(missing)}; {helper}"
        return Check("sandbox", "warn", found, "allow user namespaces (sysctl user.max_user_namespaces)")
    return Check("sandbox", "ok", f"{', '.join(walls)}; {helper}")


def check_program(name: str, found: str | None, fix: str) -> Check:
    """A program that only tests need."""
    if found is None:
        return Check(name, "warn", "not found; tests that need it are skipped", fix)
    return Check(name, "ok", found)


def find_postgres() -> str | None:
    """The PostgreSQL server's program; Debian keeps it beside the path."""
    beside = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return shutil.which("postgres") or (str(beside[-1]) if beside else None)


def check_port(port: int) -> Check:
    """Whether `longforge serve` gets its port."""
    try:
        bind("127.0.0.1", port).close()
    except InputError as error:
        return Check(f"port {port}", "warn", str(error), "longforge serve --port 0 takes a free one")
    return Check(f"port {port}", "ok", "free")


def check_model() -> Check:
    """Loads the shipped model and lets it answer one token."""
    start = time.monotonic()
    try:
        model = CausalLM.from_pretrained(shipped.path())
        engine = Engine(model, pages=4, max_running=1)
        engine.submit(GenerationRequest("one", (1, 2, 3), SamplingParams(max_tokens=1, temperature=0.0)))
        events = engine.step()
    except LongforgeError as error:
        return Check("shipped model", "fail", str(error), "reinstall Longforge, or `make base-model`")
    assert len(events) == 1, "a prompt of three tokens takes one step"
    return Check("shipped model", "ok", f"loads and answers a token in {time.monotonic() - start:.1f} s")
