"""Resizing against dense float64 SVDs."""

from __future__ import annotations

import pytest
import torch
from low_rank_samples import SHAPES, dense, lora, relative, sample_state

from lora_kit.adapters import LoraUpdate
from lora_kit.algebra import Budget, resize, total_loss
from lora_kit.errors import AdapterFileError, RecipeError

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.mid_block.resnets.0.conv1"


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_module_is_its_best_approximation_of_that_rank(rank: int) -> None:
    state = sample_state(1)
    found = resize(state.updates, Budget(rank=rank), torch.float64)
    for name, update in found.updates.items():
        assert isinstance(update, LoraUpdate)
        assert (update.rank, update.alpha) == (rank, float(rank))
        assert update.down.shape == (rank, *SHAPES[name][1:])
        assert update.up.shape == (SHAPES[name][0], rank, *(1 for _ in SHAPES[name][2:]))
        assert relative(dense(update), best(dense(state.updates[name]), rank)) < 1e-12


def test_the_losses_are_the_dense_ones_and_in_all_they_add_up_in_squares() -> None:
    state = sample_state(2)
    found = resize(state.updates, Budget(rank=2))
    lost = error = norm = 0.0
    for loss in found.losses:
        before, after = dense(state.updates[loss.module]), dense(found.updates[loss.module])
        assert loss.norm == pytest.approx(float(before.norm()), rel=1e-12)
        assert loss.lost == pytest.approx(float((before - best(before, 2)).norm()), rel=1e-10)
        assert loss.error == pytest.approx(float((before - after).norm()), rel=1e-10)
        lost, error, norm = lost + loss.lost**2, error + loss.error**2, norm + loss.norm**2
    total = total_loss(found.losses)
    assert total.kept_energy == pytest.approx(1 - lost / norm)
    assert total.relative_error == pytest.approx((error / norm) ** 0.5)


@pytest.mark.parametrize("keep", [0.3, 0.8, 0.999])
def test_kept_energy_is_reached_with_the_least_rank(keep: float) -> None:
    state = sample_state(3, rank=6)
    found = resize(state.updates, Budget(keep=keep))
    for loss in found.losses:
        energy = torch.linalg.svdvals(dense(state.updates[loss.module])).square()
        share = energy.cumsum(0) / energy.sum()
        assert float(share[loss.rank - 1]) >= keep
        assert loss.rank == 1 or float(share[loss.rank - 2]) < keep


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_keep_the_files_precision_and_the_cast_is_in_the_error(dtype: torch.dtype) -> None:
    state = sample_state(4, dtype=dtype)
    found = resize(state.updates, Budget(rank=3))
    for loss in found.losses:
        update = found.updates[loss.module]
        assert update.dtype == dtype
        # Each factor's entries are off by at most eps / 2: the product by about their root sum, below eps.
        cast = torch.finfo(dtype).eps * loss.norm
        assert loss.lost - cast <= loss.error <= loss.lost + cast
        assert relative(dense(update), best(dense(state.updates[loss.module]), 3)) < torch.finfo(dtype).eps


def test_an_update_within_the_budget_is_kept_bit_for_bit() -> None:
    state = sample_state(5, rank=4)
    found = resize(state.updates, Budget(rank=4))
    assert found.kept == (LINEAR,)
    assert found.updates[LINEAR] is state.updates[LINEAR]
    assert found.losses[0].error == found.losses[0].lost == 0.0


def test_a_rank_above_the_matrix_is_cut_without_loss() -> None:
    update = lora((3, 50), 8, 4.0, 1)
    found = resize({"unet.conv_out": update}, Budget(keep=1.0), torch.float64)
    assert found.updates["unet.conv_out"].rank in (3, 8)
    assert relative(dense(found.updates["unet.conv_out"]), dense(update)) < 1e-12


def test_a_zero_update_stays_zero() -> None:
    update = LoraUpdate(torch.ones(4, 6), torch.zeros(5, 4), 1.0)
    found = resize({"unet.x": update}, Budget(keep=0.9))
    assert found.updates["unet.x"].rank == 1
    assert float(dense(found.updates["unet.x"]).norm()) == 0.0
    assert found.losses[0].kept_energy == 1.0


@pytest.mark.parametrize(("rank", "keep"), [(None, None), (0, None), (None, 0.0), (None, 1.5), (None, float("nan"))])
def test_a_budget_that_makes_no_sense(rank: int | None, keep: float | None) -> None:
    with pytest.raises(RecipeError, match=r"--rank|--keep"):
        Budget(rank=rank, keep=keep)


def test_overflow_names_the_module_and_the_remedy() -> None:
    huge = LoraUpdate(torch.full((2, 4), 1e6), torch.full((4, 2), 1e6), 2.0)
    with pytest.raises(AdapterFileError, match=r"unet\.x: a factor overflows float16.*--dtype bf16 or fp32"):
        resize({"unet.x": huge}, Budget(rank=1), torch.float16)


def test_twice_the_same_input_gives_the_same_bits() -> None:
    first, second = (resize(sample_state(6).updates, Budget(rank=2)).updates[CONV] for _ in range(2))
    assert isinstance(first, LoraUpdate)
    assert isinstance(second, LoraUpdate)
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)
