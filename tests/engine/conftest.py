"""What an engine promises, it promises with small batches padded to buckets of fixed buffers too."""

import pytest

from emulated_capture import emulated_capture_for

TWICE = {"test_engine", "test_engine_cache", "test_engine_drafts"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.split(".")[-1] in TWICE:
        metafunc.fixturenames.append("passes")
        metafunc.parametrize("passes", ["eager", "graphs"], indirect=True)


@pytest.fixture
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How engines of the test run small batches."""
    if request.param == "graphs":
        monkeypatch.setattr("longforge.engine.runner.capture_for", emulated_capture_for)
