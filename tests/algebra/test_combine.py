"""Combining against dense float64 sums, and TIES and DARE against other implementations and their definitions."""

from __future__ import annotations

import pytest
import torch
from low_rank_samples import SHAPES, dense, lora, relative, sample_state

from lora_kit.adapters import AdapterState, LoraUpdate
from lora_kit.algebra import Budget, CombineOptions, combine
from lora_kit.algebra.combine_dense import dare, ties, trimmed
from lora_kit.errors import RecipeError

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def total(states: list[tuple[AdapterState, float]], name: str) -> torch.Tensor:
    return sum((w * dense(s.updates[name]) for s, w in states if name in s.updates), start=torch.zeros(()).double())


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -0.3), (0.7, 2.0)])
def test_a_concatenation_is_the_weighted_sum_to_fp32_rounding(weights: tuple[float, float]) -> None:
    states = [(sample_state(1, rank=4, alpha=2.0), weights[0]), (sample_state(2, rank=3, alpha=8.0), weights[1])]
    found = combine(states, CombineOptions())
    assert found.updates.keys() == SHAPES.keys()
    for name, update in found.updates.items():
        assert update.rank == sum(state.updates[name].rank or 0 for state, _ in states)
        assert update.dtype == torch.float32
        assert relative(dense(update), total(states, name)) < 1e-6
    assert max(loss.relative_error for loss in found.losses) < 1e-6
    assert all(loss.lost == 0.0 for loss in found.losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equal_strengths_keep_half_precision_factors_bit_for_bit(dtype: torch.dtype) -> None:
    first, second = sample_state(1, alpha=3.0, dtype=dtype), sample_state(2, alpha=3.0, dtype=dtype)
    update = combine([(first, 0.3), (second, 0.3)], CombineOptions()).updates[LINEAR]
    parts = first.updates[LINEAR], second.updates[LINEAR]
    assert isinstance(update, LoraUpdate)
    assert isinstance(parts[0], LoraUpdate)
    assert isinstance(parts[1], LoraUpdate)
    assert torch.equal(update.up, torch.cat([parts[0].up, parts[1].up], dim=1))
    assert torch.equal(update.down, torch.cat([parts[0].down, parts[1].down]))
    assert update.alpha / update.rank == pytest.approx(0.3 * 3.0 / parts[0].rank, rel=1e-12)


def test_a_module_that_only_one_file_has_keeps_its_weight() -> None:
    first, second = sample_state(1), sample_state(2)
    del second.updates[LINEAR]
    found = combine([(first, 0.25), (second, 1.0)], CombineOptions())
    assert relative(dense(found.updates[LINEAR]), 0.25 * dense(first.updates[LINEAR])) < 1e-6


def test_an_adapter_minus_itself_is_zero() -> None:
    state = sample_state(1)
    found = combine([(state, 1.0), (state, -1.0)], CombineOptions(method="svd", budget=Budget(rank=2)))
    for name, update in found.updates.items():
        assert float(dense(update).norm()) <= 1e-12 * float(dense(state.updates[name]).norm())


@pytest.mark.parametrize("rank", [2, 5])
def test_a_rank_gives_the_best_approximation_of_the_sum(rank: int) -> None:
    states = [(sample_state(1), 0.6), (sample_state(2), 0.9)]
    options = CombineOptions(method="svd", budget=Budget(rank=rank), dtype=torch.float64)
    found = combine(states, options)
    for loss in found.losses:
        exact = total(states, loss.module)
        lost = float(torch.linalg.svdvals(exact)[rank:].norm())
        assert loss.lost == pytest.approx(lost, rel=1e-10)
        assert float((dense(found.updates[loss.module]) - exact).norm()) == pytest.approx(lost, rel=1e-10)


@pytest.mark.parametrize("method", ["svd", "ties", "dare"])
def test_methods_that_need_a_size_say_so(method: str) -> None:
    with pytest.raises(RecipeError, match=f"{method} needs a size: give --rank N, or --keep E"):
        CombineOptions(method=method)  # pyright: ignore[reportArgumentType]


def test_weights_of_zero_leave_nothing() -> None:
    with pytest.raises(RecipeError, match="nothing to combine"):
        combine([(sample_state(1), 0.0)], CombineOptions())


def test_trimming_keeps_the_largest_entries() -> None:
    delta = torch.tensor([[1.0, -5.0, 2.0], [0.5, 4.0, -3.0]])
    assert torch.equal(trimmed(delta, 0.5), torch.tensor([[0.0, -5.0, 0.0], [0.0, 4.0, -3.0]]))
    assert torch.equal(trimmed(delta, 1.0), delta)
    assert int((trimmed(delta, 1e-9) != 0).sum()) == 1


def test_ties_by_hand() -> None:
    """Entry 0: both agree, mean. 1: signs differ, the larger wins alone. 2: one is trimmed away. 3: a tie is zero."""
    first = torch.tensor([[2.0, 5.0, 6.0, 3.0]])
    second = torch.tensor([[4.0, -8.0, 0.5, -3.0]])
    expected = torch.tensor([[3.0, -8.0, 6.0, 0.0]])
    assert torch.equal(ties([first, trimmed(second, 0.75)], [1.0, 1.0], 1.0), expected)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_is_pefts_where_weights_are_equal(count: int, density: float) -> None:
    from peft.utils.merge_utils import ties as peft_ties

    generator = torch.Generator().manual_seed(count)
    deltas = [torch.randn(17, 23, generator=generator) for _ in range(count)]
    got = ties(deltas, [0.8] * count, density)
    expected = peft_ties(deltas, torch.full((count,), 0.8), density)
    # PEFT floors the count of entries that stay, we round it: at most one entry a matrix can differ.
    assert int((~torch.isclose(got, expected, rtol=1e-6)).sum()) <= count


def test_dare_keeps_the_mean_and_the_share() -> None:
    delta = torch.full((200, 500), 3.0, dtype=torch.float64)
    got = dare(delta, 0.25, seed=1, key="a")
    assert set(got.unique().tolist()) == {0.0, 12.0}
    # 100,000 draws of probability 1/4: five standard deviations of the share.
    assert float((got != 0).double().mean()) == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / delta.numel()) ** 0.5)


def test_dare_draws_by_seed_and_module_alone() -> None:
    delta = torch.ones(20, 20)
    assert torch.equal(dare(delta, 0.5, 1, "a"), dare(delta, 0.5, 1, "a"))
    assert not torch.equal(dare(delta, 0.5, 1, "a"), dare(delta, 0.5, 2, "a"))
    assert not torch.equal(dare(delta, 0.5, 1, "a"), dare(delta, 0.5, 1, "b"))


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_entrywise_methods_are_refactored_with_their_error_measured(method: str) -> None:
    states = [(sample_state(1), 0.5), (sample_state(2), 1.0)]
    full = 40  # no module is wider
    options = {"method": method, "density": 0.4, "seed": 3, "dtype": torch.float64}
    whole = combine(states, CombineOptions(**options, budget=Budget(rank=full)))
    small = combine(states, CombineOptions(**options, budget=Budget(rank=3)))
    for loss in small.losses:
        exact = dense(whole.updates[loss.module])
        deltas = [dense(state.updates[loss.module]) for state, _ in states]
        if method == "ties":
            assert relative(exact, ties(deltas, [0.5, 1.0], 0.4)) < 1e-10
        error = float((exact - dense(small.updates[loss.module])).norm())
        assert loss.error == pytest.approx(error, rel=1e-9)
        assert loss.lost == pytest.approx(float(torch.linalg.svdvals(exact)[3:].norm()), rel=1e-9)


def test_dare_with_everything_kept_is_the_sum() -> None:
    states = [(sample_state(1), 0.5), (sample_state(2), 1.0)]
    found = combine(states, CombineOptions(method="dare", density=1.0, budget=Budget(rank=40), dtype=torch.float64))
    for name, update in found.updates.items():
        assert relative(dense(update), total(states, name)) < 1e-10


def test_ranks_of_their_own_do_not_stop_a_sum() -> None:
    first = AdapterState({"unet.x": lora((6, 8), 1, 1.0, 1)}, {})
    second = AdapterState({"unet.x": lora((6, 8), 7, 0.5, 2)}, {})
    found = combine([(first, 1.0), (second, 1.0)], CombineOptions())
    assert found.updates["unet.x"].rank == 8
    assert relative(dense(found.updates["unet.x"]), total([(first, 1.0), (second, 1.0)], "unet.x")) < 1e-6
