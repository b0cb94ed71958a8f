"""A model folder and a server for the command's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from small_model import write_small_checkpoint
from small_server import Served, serving, taught_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("models") / "tiny", max_positions=1024)


@pytest.fixture(scope="session")
def taught() -> Iterator[Served]:
    torch.set_num_threads(1)
    yield from serving(taught_model())
