"""A run's resumable state on disk: safetensors for tensors, JSON for counters, no pickle.

A state is a folder `state-<step>`, written under another name and renamed when whole, so what is found under
that name is complete. The one before is removed only afterwards.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn, optim

from longforge.errors import RunError
from longforge.training.optimiser import load_optimiser_tensors, optimiser_tensors

__all__ = ["latest_state", "load_state", "save_state"]


def save_state(
    folder: Path, step: int, model: nn.Module, optimiser: optim.Optimizer, counters: dict[str, Any]
) -> Path:
    """Writes the state after `step` steps and drops older ones. `counters` is plain JSON.

    Raises RunError where it cannot be written; the state before is then still there.
    """
    target = folder / f"state-{step:07d}"
    draft = folder / "state.part"
    shutil.rmtree(draft, ignore_errors=True)
    weights = {name: value.clone() for name, value in model.state_dict().items()}  # tied ones apart
    try:
        draft.mkdir(parents=True)
        save_file(weights, draft / "model.safetensors")
        save_file(optimiser_tensors(model, optimiser), draft / "optimiser.safetensors")
        numbers = json.dumps({"step": step, **counters}, indent=1)
        (draft / "counters.json").write_text(numbers, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    except (OSError, SafetensorError) as error:  # a full disk comes as the second where tensors are written
        shutil.rmtree(draft, ignore_errors=True)
        raise RunError(f"{target}: a folder that can be written is needed, got {error}") from error
    for old in folder.glob("state-*"):
        if old != target:
            shutil.rmtree(old)
    return target


def latest_state(folder: Path) -> Path | None:
    """The newest whole state under `folder`, if there is one."""
    return max(folder.glob("state-*"), default=None)


def load_state(state: Path, model: nn.Module, optimiser: optim.Optimizer) -> dict[str, Any]:
    """Puts weights, buffers and optimiser moments back; returns the counters."""
    weights = load_file(state / "model.safetensors")
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        differing = sorted(name for name in found.keys() ^ expected.keys()) or sorted(
            name for name in found if found[name] != expected[name]
        )
        raise RunError(
            f"{state}: holds another model than the config names (first difference: {differing[0]}); "
            "start afresh in an empty folder"
        )
    model.load_state_dict(weights)
    load_optimiser_tensors(model, optimiser, load_file(state / "optimiser.safetensors"))
    return json.loads((state / "counters.json").read_text(encoding="utf-8"))
