"""Publishing: whole folders, versions one up, the last two kept."""

import pytest
import torch

from longforge.chat import Tokenizer
from longforge.errors import EngineError
from longforge.forge.publish import Publisher
from longforge.model import CausalLM
from small_model import small_model, small_tokenizer


def test_a_published_folder_is_the_model_and_only_two_are_kept(tmp_path):
    seen = []

    def activate(folder, version):
        seen.append((folder.name, version, CausalLM.from_pretrained(folder).state_dict()))

    publisher = Publisher(tmp_path / "weights", small_tokenizer(), activate)
    for version in (1, 2, 3):
        model = small_model(seed=version)
        folder = publisher.publish(model, version)
        name, number, state = seen[-1]
        assert (name, number) == (folder.name, version)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["v00002", "v00003"]
    assert Tokenizer.load(folder).encode("class Foo") == small_tokenizer().encode("class Foo")


def test_what_a_killed_process_left_goes_with_the_next_version(tmp_path):
    for left in (".v00003.ab12cd34.new", "v00005"):
        (tmp_path / left).mkdir()
    (tmp_path / "notes").mkdir()
    publisher = Publisher(tmp_path, small_tokenizer(), lambda folder, version: None)
    publisher.publish(small_model(), 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "v00003"]


def test_an_engine_that_refuses_leaves_the_versions_before(tmp_path):
    def refuse(folder, version):
        if version > 2:
            raise EngineError("weights version 3 refused")

    publisher = Publisher(tmp_path, small_tokenizer(), refuse)
    for version in (1, 2):
        publisher.publish(small_model(), version)
    with pytest.raises(EngineError):
        publisher.publish(small_model(), 3)
    assert {"v00001", "v00002"} <= {p.name for p in tmp_path.iterdir()}
