"""Comparing adapters against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from low_rank_samples import SHAPES, dense, sample_state

from lora_kit.adapters import AdapterState, LoraUpdate
from lora_kit.algebra import compare_adapters

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_cosine_ratio_and_difference_are_the_dense_ones() -> None:
    first, second = sample_state(1), sample_state(2, rank=7)
    found = compare_adapters(first, second)
    assert [pair.module for pair in found.pairs] == list(SHAPES)
    for pair in found.pairs:
        one, other = dense(first.updates[pair.module]), dense(second.updates[pair.module])
        assert pair.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()), abs=1e-12)
        assert pair.ratio == pytest.approx(float(other.norm() / one.norm()), rel=1e-12)
        assert pair.difference == pytest.approx(float((one - other).norm()), rel=1e-12)


def test_in_all_is_the_comparison_of_all_modules_as_one_vector() -> None:
    first, second = sample_state(1), sample_state(2)
    one = torch.cat([dense(update).flatten() for update in first.updates.values()])
    other = torch.cat([dense(update).flatten() for update in second.updates.values()])
    shared = compare_adapters(first, second).shared
    assert shared.cosine == pytest.approx(float(one @ other / one.norm() / other.norm()), abs=1e-12)
    assert shared.difference == pytest.approx(float((one - other).norm()), rel=1e-12)


def test_other_factors_of_the_same_update_are_no_difference() -> None:
    """U·D = (U·M)(M⁻¹·D): the comparison sees ΔW, not how it is written."""
    state = sample_state(1)
    update = state.updates[LINEAR]
    assert isinstance(update, LoraUpdate)
    mix = torch.randn(update.rank, update.rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = LoraUpdate(torch.linalg.solve(mix, update.down.double()), update.up.double() @ mix * 0.5, 2 * update.alpha)
    (pair,) = compare_adapters(AdapterState({LINEAR: update}, {}), AdapterState({LINEAR: other}, {})).pairs
    assert pair.cosine == pytest.approx(1.0, abs=1e-12)
    assert pair.ratio == pytest.approx(1.0, rel=1e-10)
    assert pair.difference <= 1e-10 * pair.first_norm


def test_what_only_one_has_is_listed() -> None:
    first, second = sample_state(1), sample_state(2)
    names = list(SHAPES)
    del first.updates[names[0]], second.updates[names[1]]
    found = compare_adapters(first, second)
    assert (found.only_first, found.only_second) == ((names[1],), (names[0],))
    assert [pair.module for pair in found.pairs] == names[2:]


def test_a_zero_update_has_no_angle() -> None:
    zero = AdapterState({"unet.x": LoraUpdate(torch.ones(2, 5), torch.zeros(4, 2), 1.0)}, {})
    other = AdapterState({"unet.x": LoraUpdate(torch.ones(1, 5), torch.ones(4, 1), 1.0)}, {})
    (pair,) = compare_adapters(zero, other).pairs
    assert (pair.cosine, pair.ratio) == (None, None)
    assert pair.difference == pair.second_norm == pytest.approx(20**0.5)
