"""The factor arithmetic against dense float64 matrices (numpy's SVD)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lora_kit.algebra import lowrank, lowrank_dense

EPS = torch.finfo(torch.float64).eps


def factors(out: int, inside: int, rank: int, seed: int = 0) -> lowrank.Factors:
    generator = torch.Generator().manual_seed(seed)
    draw = {"dtype": torch.float64, "generator": generator}
    return torch.randn(out, rank, **draw), torch.randn(rank, inside, **draw)


def dense_values(pair: lowrank.Factors) -> np.ndarray:
    return np.linalg.svd((pair[0] @ pair[1]).numpy(), compute_uv=False)


def rounding(pair: lowrank.Factors) -> float:
    """A backward stable factorisation's error: a small multiple of k · eps · ‖up‖ · ‖down‖."""
    sides = pair[0].shape[0] + pair[1].shape[1] + pair[1].shape[0]
    return sides * EPS * float(pair[0].norm() * pair[1].norm())


@pytest.mark.parametrize(("out", "inside", "rank"), [(12, 30, 4), (30, 12, 4), (5, 7, 9), (3, 40, 3), (6, 6, 1)])
def test_singular_values_are_those_of_the_dense_matrix(out: int, inside: int, rank: int) -> None:
    pair = factors(out, inside, rank)
    expected = dense_values(pair)[: min(rank, out, inside)]
    for got in (lowrank.singular_values(pair), lowrank.decompose(pair).values):
        assert got.shape == (min(rank, out, inside),)
        assert np.abs(got.numpy() - expected).max() <= rounding(pair)


def test_a_decomposition_multiplies_back_and_its_vectors_are_orthonormal() -> None:
    pair = factors(20, 33, 6)
    found = lowrank.decompose(pair)
    back = found.left * found.values @ found.right
    assert (back - pair[0] @ pair[1]).norm() <= rounding(pair)
    unit = torch.eye(6, dtype=torch.float64)
    assert (found.left.T @ found.left - unit).norm() <= 100 * EPS
    assert (found.right @ found.right.T - unit).norm() <= 100 * EPS


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_truncation_error_is_the_root_of_the_dropped_squares(rank: int) -> None:
    pair = factors(20, 33, 6)
    found = lowrank.decompose(pair)
    up, down = lowrank.balanced(lowrank.truncate(found, rank), torch.float64)
    assert (up.shape, down.shape) == ((20, rank), (rank, 33))
    measured = float((pair[0] @ pair[1] - up @ down).norm())
    best = float(np.sqrt((dense_values(pair)[rank:] ** 2).sum()))
    assert measured == pytest.approx(best, abs=rounding(pair))
    assert lowrank.dropped_norm(found.values, rank) == pytest.approx(best, abs=rounding(pair))
    assert lowrank.distance(pair, (up, down)) == pytest.approx(best, abs=rounding(pair))


def test_balanced_factors_have_the_same_column_and_row_norms() -> None:
    up, down = lowrank.balanced(lowrank.decompose(factors(20, 33, 6)), torch.float64)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-12)


def test_a_stack_is_the_weighted_sum_at_the_summed_rank() -> None:
    first, second = factors(8, 9, 2, seed=1), factors(8, 9, 3, seed=2)
    up, down = lowrank.stack([first, second], [0.25, -2.0])
    assert up.shape[1] == down.shape[0] == 5
    expected = 0.25 * first[0] @ first[1] - 2 * second[0] @ second[1]
    assert (up @ down - expected).norm() <= 4 * rounding(second)


def test_inner_product_and_norm_never_need_the_dense_matrices() -> None:
    first, second = factors(8, 900, 2, seed=1), factors(8, 900, 5, seed=2)
    dense = [up @ down for up, down in (first, second)]
    assert lowrank.inner(first, second) == pytest.approx(float((dense[0] * dense[1]).sum()), rel=1e-10)
    assert lowrank.norm(second) == pytest.approx(float(dense[1].norm()), rel=1e-12)


def test_a_distance_below_the_rounding_of_the_inner_products_is_still_seen() -> None:
    """√(‖a‖² − 2⟨a, b⟩ + ‖b‖²) would lose everything under 1e-8 of the norm."""
    up, down = factors(10, 10, 2)
    moved = (up + 1e-11, down)
    expected = float(((moved[0] - up) @ down).norm())
    assert lowrank.distance((up, down), moved) == pytest.approx(expected, rel=1e-2)


def test_the_rank_that_keeps_an_energy() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 0.0])  # energies 4, 1, 1, 0 of 6
    assert [lowrank.rank_keeping(values, keep) for keep in (0.1, 0.66, 0.67, 0.83, 0.84, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert lowrank.rank_keeping(torch.zeros(3), 0.95) == 1


def test_effective_rank_counts_equal_values_and_is_below_that_otherwise() -> None:
    assert lowrank.effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3.0)
    half, quarter = 0.5 * math.log(2), 0.25 * math.log(4)
    expected = math.exp(half + 2 * quarter)
    assert lowrank.effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(expected)
    assert lowrank.effective_rank(torch.zeros(2)) == 0.0


def decaying(out: int, inside: int, power: float) -> torch.Tensor:
    """A dense matrix with singular values k^-power."""
    generator = torch.Generator().manual_seed(5)
    left, _ = torch.linalg.qr(torch.randn(out, out, dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(inside, out, dtype=torch.float64, generator=generator))
    return left * torch.arange(1, out + 1).double() ** -power @ right.T


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_randomised_svd_is_nearly_the_best_approximation(power: float) -> None:
    """Halko et al., theorem 10.6 and its corollary: the error is at most a small factor over the optimum."""
    matrix = decaying(300, 400, power)
    found = lowrank_dense.randomised_svd(matrix, 20)
    best = float((torch.arange(21, 301).double() ** (-2 * power)).sum().sqrt())
    error = float((matrix - found.left * found.values @ found.right).norm())
    assert best * (1 - 1e-12) <= error <= 1.01 * best
    energies = float((matrix.square().sum() - found.values.square().sum()).sqrt())
    assert energies == pytest.approx(error, rel=1e-8)


def test_the_randomised_svd_is_exact_on_a_matrix_of_low_rank() -> None:
    pair = factors(300, 350, 7)
    found = lowrank_dense.randomised_svd(pair[0] @ pair[1], 7)
    back = found.left * found.values @ found.right
    assert (back - pair[0] @ pair[1]).norm() <= 10 * rounding(pair)


@pytest.mark.parametrize(("out", "inside"), [(300, 400), (400, 300), (40, 60)])
@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_factorise_holds_the_energy_that_was_asked_with_no_rank_to_spare(out: int, inside: int, keep: float) -> None:
    matrix = decaying(min(out, inside), max(out, inside), 1.0)
    matrix = matrix if out < inside else matrix.T
    found = lowrank_dense.factorise(matrix, lowrank.Budget(keep=keep))
    energy = torch.arange(1, min(out, inside) + 1).double() ** -2
    least = int((energy.cumsum(0) < keep * energy.sum()).sum()) + 1
    assert least <= len(found.values) <= least + 1
    assert float(found.values.square().sum()) >= keep * float(energy.sum()) * (1 - 1e-12)


def test_factorise_keeps_a_rank_bound_beside_the_energy() -> None:
    found = lowrank_dense.factorise(decaying(300, 400, 0.5), lowrank.Budget(rank=5, keep=0.999))
    assert len(found.values) == 5
