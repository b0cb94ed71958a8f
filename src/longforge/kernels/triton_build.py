"""Compiles Triton kernels for named GPUs where there is none, and says what the compiler made of them.

    from longforge.kernels.triton_build import KernelSpec, build, faults, table

    rows = build([KernelSpec("scan", scan_kernel, {"q": "*bf16", "n": "i32"}, {"ROWS": 64}, num_warps=4)])
    print(table(rows))
    assert not faults(rows)

Registers and spills are those of the very binary Triton would load: they are read from the log of the
assembler run that Triton itself does, with its own flags. A kernel can only be compiled where it was imported
as a compiled function, so not in a process that runs Triton's interpreter (TRITON_INTERPRET=1).

    python -m longforge.kernels.triton_build package.module    # prints the table of package.module.specs()
"""

import contextlib
import importlib
import io
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longforge.errors import InputError

__all__ = ["TARGETS", "BuildRow", "KernelSpec", "build", "faults", "main", "table"]

TARGETS = (80, 90, 100)
"""Compute capabilities: A100, H100 and H200, B200."""

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most shared memory of one program, in bytes (CUDA programming guide, technical specifications)."""

TENSOR_INSTRUCTION = re.compile(r"\b((?:HMMA|HGMMA|QGMMA|IGMMA|IMMA|UTCHMMA|UTCQMMA|UTCIMMA)\.?[0-9x]*)")
LOCAL_INSTRUCTION = re.compile(r"\b(LDL|STL)\b")
LOG_FIELDS = {
    "registers": re.compile(r"Used (\d+) registers"),
    "stack": re.compile(r"(\d+) bytes stack frame"),
    "spill_stores": re.compile(r"(\d+) bytes spill stores"),
    "spill_loads": re.compile(r"(\d+) bytes spill loads"),
}


@dataclass(frozen=True)
class KernelSpec:
    """One way in which a kernel is launched."""

    name: str
    """What the table calls it."""
    kernel: Any
    """The @triton.jit function."""
    arguments: Mapping[str, str]
    """Triton type of every argument that is not a constant: "*bf16", "*fp8e4nv", "i32", "i64", "fp32"."""
    constants: Mapping[str, Any]
    """Value of every tl.constexpr argument; an argument given None here is compiled away."""
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further launch options: enable_fp_fusion, maxnreg."""
    unaligned: frozenset[str] = frozenset()
    """Arguments that cannot be taken as multiples of 16 (pointers: bytes); all others are."""
    excused: str = ""
    """Why this kernel may spill. Empty: a spill is a fault."""
    targets: Sequence[int] = TARGETS


@dataclass(frozen=True)
class BuildRow:
    """What one compilation gave. Sizes in bytes; registers per thread; shared memory per program."""

    name: str
    target: int
    num_warps: int
    num_stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    local: int
    """Instructions that touch local memory (LDL, STL)."""
    tensor: Mapping[str, int]
    """Tensor-core instructions of the machine code by kind and shape, as {"HGMMA.64x128x16": 8}."""
    excused: str
    ptx: str = field(repr=False)


def build(specs: Iterable[KernelSpec]) -> list[BuildRow]:
    """Compiles every spec for each of its targets, always afresh. Needs Triton; no GPU, no driver.

    Raises InputError in a process that runs Triton's interpreter.
    """
    from triton import knobs  # pyright: ignore[reportMissingImports]

    if knobs.runtime.interpret:
        raise InputError("triton_build: a process without TRITON_INTERPRET expected; unset it")
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="longforge-triton-") as cache,
        knobs.cache.scope(),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
    ):
        knobs.cache.dir = cache
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        for spec in specs:
            rows += [_build_one(spec, target, Path(cache)) for target in spec.targets]
    return rows


def _build_one(spec: KernelSpec, target: int, folder: Path) -> BuildRow:
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    log = io.StringIO()
    source = ASTSource(
        fn=spec.kernel, signature=_signature(spec), constexprs=_constants(spec), attrs=_aligned(spec)
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:  # raised again: the compiler's own message does not say which kernel it was
        error.add_note(f"while compiling {spec.name} for sm_{target}")
        raise
    found = {name: pattern.findall(log.getvalue()) for name, pattern in LOG_FIELDS.items()}
    code = folder / "kernel.cubin"
    code.write_bytes(compiled.asm["cubin"])
    tool = Path(str(triton.__file__)).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([tool, "-c", code], check=True, capture_output=True, text=True).stdout
    return BuildRow(
        spec.name,
        target,
        spec.num_warps,
        spec.num_stages,
        **{name: max(map(int, values)) for name, values in found.items()},
        shared=compiled.metadata.shared,
        local=len(LOCAL_INSTRUCTION.findall(text)),
        tensor=dict(Counter(TENSOR_INSTRUCTION.findall(text))),
        excused=spec.excused,
        ptx=compiled.asm["ptx"],
    )


def _signature(spec: KernelSpec) -> dict[str, str]:
    """Triton type of every argument, in the kernel's order."""
    names = spec.kernel.arg_names
    given = {*spec.arguments, *spec.constants}
    if given != set(names):
        raise InputError(
            f"{spec.name}: the kernel's arguments expected, missing {sorted(set(names) - given)}, "
            f"unknown {sorted(given - set(names))}"
        )
    return {name: spec.arguments.get(name, "constexpr") for name in names}


def _constants(spec: KernelSpec) -> dict[tuple[int, ...], Any]:
    return {(spec.kernel.arg_names.index(name),): value for name, value in spec.constants.items()}


def _aligned(spec: KernelSpec) -> dict[tuple[int, ...], list[list[Any]]]:
    """Every pointer and integer a multiple of 16, as Triton finds at launch for tensors and common sizes."""
    names = spec.kernel.arg_names
    return {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in spec.arguments.items()
        if name not in spec.unaligned and kind[0] in "*iu"
    }


def faults(rows: Iterable[BuildRow]) -> list[str]:
    """One line per kernel that spills without an excuse or needs more shared memory than the GPU has."""
    found = []
    for row in rows:
        where = f"{row.name} for sm_{row.target}"
        if row.spill_stores + row.spill_loads > 0 and not row.excused:
            found.append(f"{where}: no spill expected, got {row.spill_stores} + {row.spill_loads} bytes")
        if row.shared > SHARED_LIMIT.get(row.target, row.shared):
            found.append(
                f"{where}: at most {SHARED_LIMIT[row.target]} bytes of shared memory, got {row.shared}"
            )
    return found


def table(rows: Iterable[BuildRow]) -> str:
    """The rows as a Markdown table; excuses stand below it."""
    rows = list(rows)
    lines = [
        "| kernel | target | warps/stages | registers | spill B | shared B | tensor instructions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        tensor = ", ".join(f"{count} {kind}" for kind, count in sorted(row.tensor.items())) or "none"
        spill = f"{row.spill_stores + row.spill_loads}{' *' if row.excused else ''}"
        lines.append(
            f"| {row.name} | sm_{row.target} | {row.num_warps}/{row.num_stages} | {row.registers} | {spill} "
            f"| {row.shared:,} | {tensor} |"
        )
    excuses = {row.name: row.excused for row in rows if row.excused}
    return "\n".join([*lines, *(f"\n\\* {name}: {why}" for name, why in excuses.items())])


def main(arguments: Sequence[str]) -> int:
    """Prints the table of each named module's `specs()`; returns 1 if there is a fault."""
    rows = build(spec for module in arguments for spec in importlib.import_module(module).specs())
    print(table(rows))
    found = faults(rows)
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
