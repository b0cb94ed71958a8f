import argparse
import json.decoder
from pathlib import Path

import pytest
from hypothesis import settings

from longforge.chat import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    sources = [argparse.__file__, json.decoder.__file__, pytest.__file__]
    return train_tokenizer([Path(source).read_text(encoding="utf-8") for source in sources], 1024)


# The same examples in every run; a slow machine is no failure.
settings.register_profile("longforge", derandomize=True, deadline=None)
settings.load_profile("longforge")
