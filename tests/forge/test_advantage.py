"""Advantages are relative to the group and sum to zero."""

import pytest

from longforge.forge.advantage import group_advantages, has_signal
from longforge.forge.stats import wilson


def test_advantage_is_reward_minus_group_mean():
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == (0.75, -0.25, -0.25, -0.25)
    assert sum(group_advantages([0.3, 0.9, 0.1])) == pytest.approx(0.0)


def test_normalised_advantages_have_unit_deviation():
    advantages = group_advantages([3.0, 1.0, 1.0, 3.0], normalise=True)
    assert advantages == pytest.approx((1.0, -1.0, -1.0, 1.0), abs=1e-5)


def test_a_group_without_variance_has_no_signal():
    assert not has_signal([1.0, 1.0, 1.0])
    assert not has_signal([0.0])
    assert has_signal([0.0, 0.0, 0.1])
    assert group_advantages([0.5, 0.5], normalise=True) == (0.0, 0.0)


def test_wilson_interval_against_published_values():
    low, high = wilson(10, 20)
    assert (low, high) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    low, high = wilson(0, 10)
    assert low == 0.0 and high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(10, 10)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
