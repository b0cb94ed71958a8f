"""Two servers for the whole room."""

from collections.abc import Iterator

import pytest
import torch

from small_model import small_model
from small_server import Served, serving, taught_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """A model of random weights."""
    yield from serving(small_model(max_positions=1024))


@pytest.fixture(scope="session")
def taught() -> Iterator[Served]:
    """A model that calls a tool."""
    yield from serving(taught_model())
