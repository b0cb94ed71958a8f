"""The model that comes with the package."""

from pathlib import Path

from longforge.errors import CheckpointError

__all__ = ["path"]


def path(name: str = "micro") -> Path:
    """Folder of the shipped demo model. CheckpointError where this installation has none."""
    folder = Path(__file__).parent / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the shipped demo model: expected at {folder}, it is not there; name a model folder, "
            "or make it with `make base-model`"
        )
    return folder
