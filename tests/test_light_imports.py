"""The light rooms stay light: a fresh interpreter that imports them has loaded no torch."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numba", "transformers", "triton", "tensorboard", "matplotlib", "openai", "fastapi")

LIGHT = [
    "longforge",
    "longforge.errors",
    "longforge.protocol",
    "longforge.observe",
    "longforge.chat",
    "longforge.cli",
    "longforge.kernels",
    "longforge.bench",
]


def _loaded(code: str) -> list[str]:
    """Heavy packages in a fresh interpreter after `code`."""
    ending = f"\nimport sys\nsys.stderr.write('LOADED ' + ' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code + ending], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stderr.rpartition("LOADED ")[2].split()


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_light_room_loads_nothing_heavy(module: str) -> None:
    assert _loaded(f"import {module}") == []


def test_the_check_itself_sees_a_heavy_package() -> None:
    assert _loaded("import tensorboard") == ["tensorboard"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["serve", "--help"],
        ["doctor", "--help"],
        ["verify", "--help"],
        ["forge", "run", "--help"],
        ["bench", "attention", "--help"],
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['longforge', *{arguments!r}]\n"
        "from longforge.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as exit:\n"
        "    assert not exit.code, exit.code\n"
    )
    assert _loaded(code) == []


def test_writing_metrics_and_reading_prompts_loads_no_torch(tmp_path) -> None:
    code = (
        "from longforge.observe import MetricsLog, passport\n"
        "from longforge.chat import parse, render\n"
        "from longforge.protocol import Message\n"
        f"log = MetricsLog({str(tmp_path)!r}); log.write(0, {{'loss': 1.0}}); log.close()\n"
        "passport(); render([Message('user', 'hi')]); parse('hi')\n"
    )
    assert _loaded(code) == ["tensorboard"]
