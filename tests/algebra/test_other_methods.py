"""Combining, resizing, comparing and inspecting methods other than plain LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from low_rank_samples import dense, lora, relative
from torch import Tensor

from lora_kit.adapters import AdapterState, LoraUpdate, Update
from lora_kit.adapters.updates import FullUpdate, NormUpdate, build_update
from lora_kit.algebra import Budget, CombineOptions, combine, compare_adapters, resize, spectrum
from lora_kit.algebra.spectrum import NEEDS_BASE, NEEDS_DENSE
from lora_kit.errors import AdapterFileError

SHAPE = (24, 36)
RANK_24 = CombineOptions(method="svd", budget=Budget(rank=24), dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loha(rank: int = 2) -> Update:
    sides = {"hada_w1_a": (24, rank), "hada_w1_b": (rank, 36), "hada_w2_a": (24, rank), "hada_w2_b": (rank, 36)}
    return build_update({name: randn(*side, seed=len(name)) for name, side in sides.items()}, 1.0, SHAPE)


def lokr() -> Update:
    """Both factors whole: rank up to 4 · 6 = 24, so no low-rank form."""
    return build_update({"lokr_w1": randn(4, 6), "lokr_w2": randn(6, 6, seed=1)}, None, SHAPE)


def full(bias: bool = True) -> Update:
    return FullUpdate(randn(*SHAPE, seed=2), randn(24, seed=3) if bias else None)


def tucker() -> Update:
    parts = {"down": randn(3, 16, 1, 1), "up": randn(20, 3, 1, 1, seed=1), "mid": randn(3, 3, 3, 3, seed=2)}
    return build_update(parts, 1.5, (20, 16, 3, 3))


def dora() -> LoraUpdate:
    return replace(lora(SHAPE, 3, 3.0, 7), magnitude=randn(24, 1, seed=8).abs() + 1)


def oft() -> Update:
    return build_update({"oft_blocks": 0.1 * randn(4, 6, 6)}, None, SHAPE)


def delta(update: Update, weight: Tensor | None = None) -> Tensor:
    found = update.weight_delta(1.0, weight, torch.float64)
    assert found is not None
    return found.flatten(1)


def state(update: Update) -> AdapterState:
    return AdapterState({"unet.x": update}, {})


def combined(first: Update, second: Update, options: CombineOptions, weight: Tensor | None = None) -> Update:
    weights = None if weight is None else (lambda _: weight)
    return combine([(state(first), 0.5), (state(second), -2.0)], options, weights).updates["unet.x"]


@pytest.mark.parametrize("make", [loha, lokr, full])
def test_mixed_methods_are_summed(make: Callable[[], Update]) -> None:
    plain = lora(SHAPE, 4, 2.0, 1)
    found = combined(plain, make(), RANK_24)
    assert relative(dense(found), 0.5 * dense(plain) - 2 * delta(make())) < 1e-10


def test_a_loha_has_exact_factors_and_is_concatenated() -> None:
    found = combined(lora(SHAPE, 4, 2.0, 1), loha(), CombineOptions())
    assert found.rank == 4 + 2 * 2
    assert relative(dense(found), 0.5 * dense(lora(SHAPE, 4, 2.0, 1)) - 2 * delta(loha())) < 1e-6


def test_what_has_no_low_rank_form_asks_for_a_size() -> None:
    with pytest.raises(AdapterFileError, match=r"unet\.x: lokr, lora has no exact low-rank form; give --rank"):
        combined(lora(SHAPE, 4, 2.0, 1), lokr(), CombineOptions())


@pytest.mark.parametrize("make", [dora, oft])
def test_what_depends_on_the_base_needs_it(make: Callable[[], Update]) -> None:
    weight = randn(*SHAPE, seed=9)
    plain = lora(SHAPE, 4, 2.0, 1)
    with pytest.raises(AdapterFileError, match=r"depends on the base's weight; name the base with --base"):
        combined(plain, make(), RANK_24)
    found = combined(plain, make(), RANK_24, weight)
    assert relative(dense(found), 0.5 * dense(plain) - 2 * delta(make(), weight)) < 1e-10


def test_norms_and_full_differences_are_summed_as_they_are() -> None:
    norms = NormUpdate(randn(8), randn(8, seed=1)), NormUpdate(randn(8, seed=2), None)
    found = combined(*norms, CombineOptions())
    assert isinstance(found, NormUpdate)
    assert torch.allclose(found.w_norm, 0.5 * norms[0].w_norm - 2 * norms[1].w_norm)
    assert found.b_norm is not None
    assert norms[0].b_norm is not None
    assert torch.allclose(found.b_norm, 0.5 * norms[0].b_norm)
    both = combined(full(), full(bias=False), CombineOptions())
    assert isinstance(both, FullUpdate)
    assert both.diff is not None
    assert torch.allclose(both.diff, -1.5 * randn(*SHAPE, seed=2))


def test_biases_go_along() -> None:
    plain = replace(lora(SHAPE, 4, 2.0, 1), bias=randn(24, seed=5))
    found = combined(plain, FullUpdate(None, randn(24, seed=6)), CombineOptions())
    assert isinstance(found, LoraUpdate)
    assert found.bias is not None
    assert torch.allclose(found.bias, 0.5 * randn(24, seed=5) - 2 * randn(24, seed=6))
    assert relative(dense(found), 0.5 * dense(plain)) < 1e-6
    cut = resize({"unet.x": plain}, Budget(rank=2)).updates["unet.x"]
    assert isinstance(cut, LoraUpdate)
    assert cut.bias is not None
    assert torch.equal(cut.bias, randn(24, seed=5))


@pytest.mark.parametrize("make", [loha, lokr, full, tucker])
def test_resizing_gives_plain_lora(make: Callable[[], Update]) -> None:
    update = make()
    found = resize({"unet.x": update}, Budget(rank=2), torch.float64)
    exact = delta(update)
    small = found.updates["unet.x"]
    assert isinstance(small, LoraUpdate)
    assert small.mid is None
    assert small.rank == 2
    lost = float(torch.linalg.svdvals(exact)[2:].norm())
    assert float((delta(small) - exact).norm()) == pytest.approx(lost, rel=1e-10)
    assert found.losses[0].lost == pytest.approx(lost, rel=1e-7)
    assert small.weight_delta(1.0).shape == update.weight_delta(1.0).shape  # pyright: ignore[reportOptionalMemberAccess]


def test_resizing_refuses_all_that_depend_on_the_base_at_once() -> None:
    with pytest.raises(AdapterFileError, match="2 modules cannot be resized") as caught:
        resize({"unet.a": dora(), "unet.b": oft(), "unet.c": loha()}, Budget(rank=2))
    assert "unet.a: ΔW of dora depends on the base" in str(caught.value)
    assert "unet.b: ΔW of oft depends on the base" in str(caught.value)


def test_norms_stay_as_they_are_when_resizing() -> None:
    norm = NormUpdate(randn(8), None)
    found = resize({"unet.n": norm, "unet.x": lora(SHAPE, 4, 2.0, 1)}, Budget(rank=2))
    assert found.updates["unet.n"] is norm
    assert found.kept == ("unet.n",)


def test_comparing_methods_with_each_other() -> None:
    weight = randn(*SHAPE, seed=9)
    for update in (loha(), lokr(), full(bias=False), dora(), oft()):
        (pair,) = compare_adapters(state(update), state(lora(SHAPE, 4, 2.0, 1)), lambda _: weight).pairs
        one, other = delta(update, weight), dense(lora(SHAPE, 4, 2.0, 1))
        assert pair.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()), abs=1e-10)
        assert pair.difference == pytest.approx(float((one - other).norm()), rel=1e-10)
    found = compare_adapters(state(dora()), state(dora()))
    assert not found.pairs
    assert "depends on the base's weight" in found.not_compared["unet.x"]


def test_biases_are_compared_beside_the_weights() -> None:
    first, second = full(), FullUpdate(randn(*SHAPE, seed=2), 2 * randn(24, seed=3))
    pairs = compare_adapters(state(first), state(second)).pairs
    assert [pair.module for pair in pairs] == ["unet.x", "unet.x (bias)"]
    assert pairs[1].ratio == pytest.approx(2.0, rel=1e-6)
    assert pairs[1].cosine == pytest.approx(1.0, abs=1e-6)


def test_spectra_with_and_without_a_dense_look() -> None:
    weight = randn(*SHAPE, seed=9)
    assert spectrum("unet.x", lokr()).note == NEEDS_DENSE
    assert spectrum("unet.x", dora(), dense=True).note == NEEDS_BASE
    for update in (loha(), lokr(), full(), dora(), oft()):
        found = spectrum("unet.x", update, dense=True, weights=lambda _: weight)
        values = torch.linalg.svdvals(delta(update, weight))
        assert found.note is None
        assert found.norm == pytest.approx(float(values.norm()), rel=1e-10)
        assert found.singular_values[0] == pytest.approx(float(values[0]), rel=1e-10)
    assert spectrum("unet.x", dora()).method == "dora"
    norm = spectrum("unet.n", NormUpdate(torch.tensor([3.0, 4.0]), None))
    assert (norm.norm, norm.singular_values, norm.effective_rank) == (5.0, (), None)
    bias = spectrum("unet.b", FullUpdate(None, torch.tensor([3.0, 4.0])))
    assert (bias.norm, bias.singular_values, bias.effective_rank) == (5.0, (), None)
