"""Names of pages: equal where everything is equal, different where anything differs."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longforge.engine.tiers import Namespace, page_key, root_key, weights_fingerprint
from longforge.errors import InputError
from small_model import small_config, small_model

NAMESPACE = Namespace(small_config().as_dict(), "ab" * 32, 3, "bfloat16", "1:bfloat16[4,2,8]", 4)
OTHERS = {
    "config": small_config("lightning").as_dict(),
    "weights": "ac" * 32,
    "weights_version": 4,
    "dtype": "float32",
    "layout": "2:bfloat16[4,2,8]",
    "block_size": 8,
    "tenant": "b",
}


def test_equal_descriptions_have_one_namespace():
    again = replace(NAMESPACE, config=dict(reversed(small_config().as_dict().items())))
    assert again.digest() == NAMESPACE.digest()


def test_whatever_differs_the_namespace_differs():
    digests = [replace(NAMESPACE, **{field: value}).digest() for field, value in OTHERS.items()]
    assert len({NAMESPACE.digest(), *digests}) == len(OTHERS) + 1
    assert len({root_key(d) for d in digests}) == len(OTHERS)


def test_every_field_of_the_configuration_counts():
    config = small_config().as_dict()
    digests = {replace(NAMESPACE, config=config | {field: "changed"}).digest() for field in config}
    assert len(digests) == len(config) and NAMESPACE.digest() not in digests


def test_a_key_is_the_hash_of_its_parent_and_its_ids():
    parent = root_key(NAMESPACE.digest())
    assert page_key(parent, [1, 2**40]) == hashlib.sha256(parent + struct.pack("<qq", 1, 2**40)).digest()


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, ">i8"])
def test_arrays_of_any_whole_number_give_the_key_of_the_list(dtype):
    parent = root_key(bytes(32))
    assert page_key(parent, np.array([5, 0, 300], dtype)) == page_key(parent, [5, 0, 300])


paths = st.lists(st.integers(0, 3), max_size=8)


@given(paths, paths)
def test_keys_of_two_paths_agree_exactly_as_far_as_their_pages_do(first: list[int], second: list[int]):
    def keys(ids: list[int]) -> list[bytes]:
        found = [root_key(bytes(32))]
        for start in range(0, len(ids) - 1, 2):
            found.append(page_key(found[-1], ids[start : start + 2]))
        return found[1:]

    for i, (a, b) in enumerate(zip(keys(first), keys(second), strict=False)):
        end = 2 * (i + 1)
        assert (a == b) == (first[:end] == second[:end])


def test_a_fingerprint_does_not_depend_on_order_or_strides():
    state = small_model().state_dict()
    again = {
        name: state[name].transpose(0, -1).contiguous().transpose(0, -1)
        for name in sorted(state, reverse=True)
    }
    assert weights_fingerprint(again) == weights_fingerprint(state)
    assert weights_fingerprint(small_model(seed=1).state_dict()) != weights_fingerprint(state)


def test_one_bit_a_name_a_shape_or_a_dtype_changes_the_fingerprint():
    def state() -> dict[str, torch.Tensor]:
        return {"a": torch.zeros(4, 2, dtype=torch.bfloat16), "b": torch.ones(())}

    changed = [state() for _ in range(5)]
    changed[0]["a"].view(torch.uint8)[3, 1] = 1
    changed[1]["c"] = changed[1].pop("b")
    changed[2]["a"] = changed[2]["a"].reshape(2, 4)
    changed[3]["a"] = changed[3]["a"].half()
    changed[4]["c"] = torch.ones(0)
    assert len({weights_fingerprint(s) for s in [state(), *changed]}) == 6


def test_weights_without_values_are_refused():
    with pytest.raises(InputError, match="weights: b: values are needed"):
        weights_fingerprint({"a": torch.ones(1), "b": torch.ones(1, device="meta")})
