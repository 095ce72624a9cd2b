"""Several updates on one weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_kit.adapters import LoraUpdate, Update
from lora_kit.adapters.updates import build_update
from lora_kit.merging import ScaledUpdate, rounding_bound, total_bias_delta, total_delta

OUT, IN = 40, 30


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(rank: int, alpha: float = 1.5, **more: Tensor) -> Update:
    parts = {"down": random(rank, IN), "up": random(OUT, rank), **more}
    return build_update(parts, alpha, (OUT, IN))


LOKR = build_update({"lokr_w1": random(4, 5), "lokr_w2": random(10, 6)}, None, (OUT, IN))
OFT = build_update({"oft_blocks": 0.2 * random(10, 4, 4), "rescale": 1 + 0.1 * random(OUT, 1)}, None, (OUT, IN))
DORA = pair(4, magnitude=1 + random(OUT, 1).abs())
BIAS = build_update({"diff_b": random(OUT)}, None, (OUT, IN))
MIXTURES: dict[str, list[ScaledUpdate]] = {
    "two LoRA": [ScaledUpdate(pair(3), 0.7), ScaledUpdate(pair(8, 4.0), -0.4)],
    "LoRA and LoKr": [ScaledUpdate(LOKR, 0.5), ScaledUpdate(pair(3), 0.7)],
    "two that see the weight": [ScaledUpdate(OFT, 0.8), ScaledUpdate(DORA, 0.6)],
    "all": [ScaledUpdate(one, 0.3) for one in (pair(2), DORA, LOKR, BIAS, OFT, pair(5))],
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_the_total_is_the_sum_of_each_over_the_original_weight(mixture: list[ScaledUpdate]) -> None:
    weight = random(OUT, IN, seed=9)
    singles = [one.update.weight_delta(one.scale, weight.double(), torch.float64) for one in mixture]
    wanted = torch.stack([delta for delta in singles if delta is not None]).sum(0)
    got = total_delta(mixture, torch.float64, weight)
    turned = total_delta(mixture[::-1], torch.float64, weight)
    assert got is not None
    assert turned is not None
    # float64 sums of a few dozen terms of size 10
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turned, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_fp32_stays_within_the_bound_and_a_wrong_weight_does_not(mixture: list[ScaledUpdate]) -> None:
    weight = random(OUT, IN, seed=9)
    single, double = total_delta(mixture, weight=weight), total_delta(mixture, torch.float64, weight)
    assert single is not None
    assert double is not None
    exact, bound = weight.double() + double, rounding_bound(mixture, weight)
    assert bool((((weight + single).double() - exact).abs() <= bound).all())
    wrong = [one._replace(scale=one.scale * 1.001) for one in mixture]
    other = total_delta(wrong, torch.float64, weight)
    assert other is not None
    assert bool(((weight.double() + other - exact).abs() > bound).any())


def test_what_changes_only_the_bias_has_no_weight_delta() -> None:
    assert total_delta([ScaledUpdate(BIAS, 1.0)]) is None
    change = total_bias_delta([ScaledUpdate(BIAS, 0.5), ScaledUpdate(pair(2), 1.0), ScaledUpdate(BIAS, 0.25)])
    assert change is not None
    torch.testing.assert_close(change, 0.75 * random(OUT), rtol=2**-22, atol=0)
    assert total_bias_delta([ScaledUpdate(pair(2), 1.0)]) is None


def test_lora_of_a_stored_half_precision_is_computed_in_fp32() -> None:
    update = LoraUpdate(random(2, IN).half(), random(OUT, 2).half(), 1.0)
    delta = total_delta([ScaledUpdate(update, 0.3)])
    assert delta is not None
    assert delta.dtype == torch.float32
    down, up = update.down.double(), update.up.double()
    # Two products and their sum, the factor and its product with `up`: each rounded once.
    allowed = 5 * 2.0**-24 * 0.15 * (up.abs() @ down.abs())
    assert bool(((delta.double() - 0.15 * up @ down).abs() <= allowed).all())
