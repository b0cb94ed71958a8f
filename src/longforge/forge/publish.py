"""Publishing: the trainer's weights become version n of the rollout engine, whole or not at all."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from longforge.chat import Tokenizer
from longforge.model.causal_lm import CausalLM

__all__ = ["Publisher"]

KEPT_VERSIONS = 2
"""The active one, and the one before it, which the engine may still be reading when the next is written."""

_NAME = re.compile(r"v(\d+)")


class Publisher:
    """Writes model folders `v00001`, `v00002`, ... below `folder` and puts each into the engine.

    activate: called with (model folder, version) when the folder is complete; returns when the engine samples
    from it (`engine_client.load_weights`).
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, activate: Callable[[Path, int], None]) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._activate = activate

    def write(self, model: CausalLM, version: int) -> Path:
        """The folder of a version, without telling the engine. One of that version is replaced."""
        target = self._folder / f"v{version:05d}"
        self._folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(target)
        self._tokenizer.save(target)
        return target

    def publish(self, model: CausalLM, version: int) -> Path:
        """Version `version` is `model` from now on; all but the last two folders go."""
        target = self.write(model, version)
        self._activate(target, version)
        for found in self._folder.iterdir():
            number = _NAME.fullmatch(found.name)
            # A killed process leaves unfinished folders, under hidden names, and versions that the resumed
            # run makes again.
            kept = version - KEPT_VERSIONS < int(number[1]) <= version if number else found.name[0] != "."
            if found.is_dir() and not kept:
                shutil.rmtree(found)
        return target
