"""ΔW of every method in float64 against its formula written out, and how parts are fitted to a weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_kit.adapters import LoraUpdate, Update
from lora_kit.adapters.updates import METHODS, build_update
from lora_kit.errors import AdapterFileError

OUT, IN, RANK, KERNEL = 8, 6, 2, 3
CONV = (OUT, IN, KERNEL, KERNEL)
ALPHA, SCALE = 3.0, 0.7
STRENGTH = SCALE * ALPHA / RANK


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def delta_of(parts: dict[str, Tensor], weight: Tensor, alpha: float | None = ALPHA, scale: float = SCALE) -> Tensor:
    update = build_update(parts, alpha, tuple(weight.shape))
    delta = update.weight_delta(scale, weight, torch.float64)
    assert delta is not None
    assert delta.shape == weight.shape
    return delta


def same(got: Tensor, wanted: Tensor) -> None:
    # Sums of a few dozen terms of size 1 to 100 in float64.
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_tucker_core_is_contracted_with_both_factors() -> None:
    down, up, mid = random(RANK, IN, 1, 1), random(OUT, RANK, 1, 1), random(RANK, RANK, KERNEL, KERNEL)
    wanted = torch.zeros(CONV, dtype=torch.float64)
    for i in range(RANK):
        for j in range(RANK):
            wanted += torch.einsum("o,q,kl->oqkl", up[:, i, 0, 0], down[j, :, 0, 0], mid[i, j])
    same(delta_of({"down": down, "up": up, "mid": mid}, random(*CONV)), STRENGTH * wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_magnitude_sets_the_norm_of_every_row_or_column(axis: int) -> None:
    weight, down, up = random(*CONV, seed=1), random(RANK, IN, KERNEL, KERNEL), random(OUT, RANK, 1, 1)
    shape = [1, 1, 1, 1]
    shape[axis] = CONV[axis]
    magnitude = random(*shape).abs() + 1
    parts = {"down": down, "up": up, "magnitude": magnitude}
    merged = weight + delta_of(parts, weight, scale=1.0)
    norms = merged.transpose(0, axis).flatten(1).norm(dim=1)
    # LyCORIS adds fp32's epsilon to the norm, which is 1 or more here.
    torch.testing.assert_close(norms, magnitude.flatten(), rtol=2e-7, atol=0)
    whole = weight + (ALPHA / RANK) * torch.einsum("or,riab->oiab", up[:, :, 0, 0], down)
    half = weight + delta_of(parts, weight)
    same(half, whole + SCALE * (merged - whole))


def test_loha_is_the_elementwise_product() -> None:
    parts = {f"hada_{name}": random(*shape, seed=i) for i, (name, shape) in enumerate(
        {"w1_a": (OUT, RANK), "w1_b": (RANK, IN), "w2_a": (OUT, RANK), "w2_b": (RANK, IN)}.items())}  # fmt: skip
    first, second = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
    same(delta_of(parts, random(OUT, IN)), STRENGTH * first * second)


def test_lokr_puts_the_second_factor_into_every_element_of_the_first() -> None:
    w1, w2 = random(4, 2), random(2, 3, KERNEL, KERNEL)
    got = delta_of({"lokr_w1": w1, "lokr_w2": w2}, random(*CONV))
    for a in range(4):
        for c in range(2):
            # Both whole: alpha has no say.
            same(got[2 * a : 2 * a + 2, 3 * c : 3 * c + 3], SCALE * w1[a, c] * w2)


def test_full_and_norm_are_differences() -> None:
    diff, bias = random(*CONV), random(OUT)
    update = build_update({"diff": diff, "diff_b": bias}, None, CONV)
    same(delta_of({"diff": diff}, random(*CONV)), SCALE * diff)
    change = update.bias_delta(SCALE, dtype=torch.float64)
    assert change is not None
    same(change, SCALE * bias)
    only_bias = build_update({"diff_b": bias}, None, CONV)
    assert only_bias.weight_delta(1.0) is None
    norm = build_update({"w_norm": bias, "b_norm": 2 * bias}, None, (OUT,))
    change = norm.bias_delta(SCALE, dtype=torch.float64)
    assert change is not None
    same(change, 2 * SCALE * bias)


def cayley(block: Tensor, limit: float = math.inf) -> Tensor:
    skew = block - block.T
    skew = skew * min(1.0, limit / float(skew.norm()))
    one = torch.eye(len(block), dtype=torch.float64)
    return (one + skew) @ torch.linalg.inv(one - skew)


def test_oft_turns_each_block_of_rows() -> None:
    blocks, weight, rescale = random(2, 4, 4), random(OUT, IN), random(OUT, 1)
    turns = [SCALE * cayley(block).T + (1 - SCALE) * torch.eye(4, dtype=torch.float64) for block in blocks]
    turned = torch.block_diag(*turns) @ weight
    same(weight + delta_of({"oft_blocks": blocks}, weight, None), turned)
    same(weight + delta_of({"oft_blocks": blocks, "rescale": rescale}, weight, 0.0), rescale * turned)


def test_a_constraint_bounds_the_norm_of_the_skew_blocks() -> None:
    block, weight = random(1, OUT, OUT), random(OUT, IN)
    turned = cayley(block[0], limit=0.01 * OUT).T @ weight
    got = weight + delta_of({"oft_blocks": block}, weight, 0.01, 1.0)
    # LyCORIS adds 1e-8 to the norm, which is more than 5 here, and ΔW is smaller than W.
    assert float((block - block.mT).norm()) > 5
    torch.testing.assert_close(got, turned, rtol=0, atol=2e-9 * float(weight.norm()))


def test_boft_is_a_product_of_butterflies() -> None:
    blocks, weight = random(2, 2, 4, 4), random(OUT, IN)
    first = torch.block_diag(*(cayley(block) for block in blocks[0]))
    second = torch.block_diag(*(cayley(block) for block in blocks[1]))
    # Stage i brings rows a distance of 2^i · b/2 apart together: pairs (0, 2), (1, 3) within 4, then (0, 4) … within 8.
    orders = [[0, 2, 1, 3, 4, 6, 5, 7], [0, 4, 1, 5, 2, 6, 3, 7]]
    swaps = [torch.eye(OUT, dtype=torch.float64)[order] for order in orders]
    wanted = swaps[1].T @ second @ swaps[1] @ swaps[0].T @ first @ swaps[0] @ weight
    same(weight + delta_of({"oft_blocks": blocks}, weight, None, 1.0), wanted)


@pytest.mark.parametrize("old", [False, True])
def test_glora_turns_the_input_side(old: bool) -> None:
    weight = random(OUT, IN)
    a1, a2, b1, b2 = random(IN, RANK), random(RANK, IN, seed=1), random(OUT, RANK), random(RANK, IN, seed=2)
    # LyCORIS before 3 has the names of each pair the other way round.
    parts = {"a1": a2, "a2": a1, "b1": b2, "b2": b1} if old else {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    same(delta_of(parts, weight), STRENGTH * (weight @ a1 @ a2 + b1 @ b2))


def test_glora_with_a_core() -> None:
    weight, core = random(*CONV), random(RANK, RANK, KERNEL, KERNEL)
    a1, a2, b1, b2 = random(IN, RANK), random(RANK, IN, seed=1), random(OUT, RANK), random(RANK, IN, seed=2)
    own = torch.einsum("or,rskl,si->oikl", b1, core, b2)
    turned = torch.einsum("oikl,ij->ojkl", weight, a1 @ a2)
    parts = {"a1": a1, "a2": a2, "b1": b1, "b2": b2, "bm": core}
    same(delta_of(parts, weight), STRENGTH * (turned + own))


@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3_scales_channels(on_input: int) -> None:
    weight, factors = random(*CONV), random(1, (OUT, IN)[on_input], 1, 1)
    shape = (1, IN, 1, 1) if on_input else (OUT, 1, 1, 1)
    parts = {"weight": factors, "on_input": torch.tensor(on_input)}
    same(delta_of(parts, weight, None), SCALE * factors.reshape(shape) * weight)


LORA = {"down": torch.ones(RANK, IN), "up": torch.ones(OUT, RANK)}
LOHA = {"hada_w1_a": torch.ones(OUT, 2), "hada_w1_b": torch.ones(2, IN)} | {
    "hada_w2_a": torch.ones(OUT, 2),
    "hada_w2_b": torch.ones(2, IN),
}
LOKR = {"lokr_w1": torch.ones(4, 2), "lokr_w2_a": torch.ones(2, 1), "lokr_w2_b": torch.ones(1, 3)}
GLORA = {"a1": torch.ones(IN, 2), "a2": torch.ones(2, IN), "b1": torch.ones(OUT, 2), "b2": torch.ones(2, IN)}
IA3 = {"weight": torch.ones(OUT), "on_input": torch.tensor(0)}
OFT = {"oft_blocks": torch.zeros(2, 4, 4)}


def without(parts: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: part for name, part in parts.items() if name not in names}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (without(LORA, "up"), "the up half is missing"),
        (without(LOHA, "hada_w1_b", "hada_w2_a"), "the hada_w1_b and hada_w2_a halves are missing"),
        (LOHA | {"hada_t1": torch.ones(2, 2, 1, 1)}, "the hada_t2 half is missing"),
        (without(LOKR, "lokr_w2_b"), "the lokr_w2_b half is missing"),
        (without(LOKR, "lokr_w1"), "the lokr_w1 half is missing"),
        (LOKR | {"lokr_w1_a": torch.ones(4, 1)}, "both lokr_w1 and lokr_w1_a are there"),
        (LOKR | {"lokr_w1": torch.ones(3, 2)}, r"lokr_w1 \[3, 2\] does not divide the module's weight \[8, 6\]"),
        (LOKR | {"lokr_w2_b": torch.ones(1, 4)}, r"allowed: .*lokr_w2_b \[1, 3\]"),
        (without(GLORA, "b1"), "the b1 half is missing"),
        (GLORA | {"b1": torch.ones(OUT, 3)}, r"allowed: .*b1 \[8, 2\]"),
        (without(IA3, "on_input"), "the on_input half is missing"),
        (IA3 | {"weight": torch.ones(IN)}, r"weight \[6\] does not fit the output side .* allowed: \[8\]"),
        (IA3 | {"on_input": torch.tensor(2)}, "on_input must be one number, 0 or 1"),
        ({"oft_blocks": torch.zeros(2, 3, 3)}, r"allowed: \[blocks, b, b\] with blocks · b = 8"),
        ({"oft_blocks": torch.zeros(3, 2, 4, 4)}, "make no butterfly"),
        (OFT | {"rescale": torch.ones(IN, 1)}, r"allowed: rescale \[8, 1\]"),
        ({"rescale": torch.ones(OUT, 1)}, "the oft_blocks half is missing"),
        ({"diff": torch.ones(IN, OUT)}, r"diff \[6, 8\] does not fit the module's weight \[8, 6\]"),
        ({"diff_b": torch.ones(IN)}, r"diff_b \[6\] does not fit the module's bias; allowed: \[8\]"),
        ({"w_norm": torch.ones(OUT)}, "w_norm is for a norm layer"),
        ({"b_norm": torch.ones(OUT)}, "the w_norm half is missing"),
        ({"magnitude": torch.ones(OUT, 1)}, "magnitude is no update"),
        ({}, "alpha alone is no update"),
        (LORA | {"magnitude": torch.ones(3, 1)}, r"\[3, 1\] does not fit .* allowed: \[8, 1\] and \[1, 6\]"),
        (LORA | {"mid": torch.ones(3, 3)}, r"allowed: .*mid \[2, 2\]"),
        (LORA | {"diff": torch.ones(OUT, IN)}, r"several methods: lora \(down and up\), full \(diff\)"),
        (GLORA | {"magnitude": torch.ones(OUT, 1)}, "magnitude is no part of a glora update"),
        (LORA | {"down": torch.ones(0, IN), "up": torch.ones(OUT, 0)}, "of rank 0"),
        (LORA | {"down": torch.ones(IN)}, "not a matrix"),
        (LORA | {"up": torch.ones(OUT, RANK, dtype=torch.int8)}, "up is int8; allowed: floating-point"),
        (LORA | {"up": torch.full((OUT, RANK), torch.nan)}, r"holds NaN or infinite values \(in up\)"),
    ],
)
def test_what_does_not_fit_is_told(parts: dict[str, Tensor], said: str) -> None:
    with pytest.raises(AdapterFileError, match=said):
        build_update(parts, None, (OUT, IN))


@pytest.mark.parametrize("parts", [LORA, LOHA, LOKR, GLORA, IA3, OFT, {"diff": torch.ones(OUT, IN)}])
def test_a_matrix_fits_a_linear_and_a_1x1_convolution_from_two_and_four_dimensions(parts: dict[str, Tensor]) -> None:
    wide = {name: part[..., None, None] if part.ndim == 2 else part for name, part in parts.items()}
    weight = random(OUT, IN)
    wanted = build_update(parts, 1.0, (OUT, IN)).weight_delta(0.7, weight, torch.float64)
    assert wanted is not None
    for shape in ((OUT, IN), (OUT, IN, 1, 1)):
        for given in (parts, wide):
            got = build_update(given, 1.0, shape).weight_delta(0.7, weight.reshape(shape), torch.float64)
            assert got is not None
            assert got.shape == shape
            assert torch.equal(got.reshape(OUT, IN), wanted)


@pytest.mark.parametrize("parts", [LORA, LOHA, LOKR, GLORA, IA3])
def test_a_matrix_cannot_change_a_norm(parts: dict[str, Tensor]) -> None:
    with pytest.raises(AdapterFileError, match=r"cannot change the module's weight \[8\]: a norm's"):
        build_update(parts, None, (OUT,))


@pytest.mark.parametrize("parts", [LORA, LOHA, LOKR, GLORA, IA3, OFT, {"w_norm": torch.ones(OUT)}])
def test_without_a_module_the_parts_tell_the_shape(parts: dict[str, Tensor]) -> None:
    update = build_update(parts, 1.0, None)
    weight = torch.ones(OUT, IN)
    delta = update.weight_delta(1.0, weight if update.needs_weight else None)
    assert delta is not None
    assert delta.shape == ((OUT,) if "w_norm" in parts else (OUT, IN))


def test_stored_precisions_are_kept_and_the_widest_is_told() -> None:
    parts = {"down": torch.ones(RANK, IN, dtype=torch.bfloat16), "up": torch.ones(OUT, RANK, dtype=torch.float16)}
    update = build_update(parts, None, (OUT, IN))
    assert {name: part.dtype for name, part in update.parts().items()} == {"down": torch.bfloat16, "up": torch.float16}
    assert update.dtype == torch.float32
    assert build_update(IA3, None, (OUT, IN)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_one_byte_floats_are_read_and_computed_in_fp32(dtype: torch.dtype) -> None:
    parts = {name: part.to(dtype) for name, part in LORA.items()}
    delta = build_update(parts, None, (OUT, IN)).weight_delta(1.0)
    assert delta is not None
    assert torch.equal(delta, torch.full((OUT, IN), 2.0))


def test_an_update_moves_to_another_device_with_all_its_tensors() -> None:
    update = build_update(LOKR, None, (OUT, IN))
    moved = update.to("meta")
    assert {part.device.type for part in moved.parts().values()} == {"meta"}
    assert {part.device.type for part in update.parts().values()} == {"cpu"}


def test_the_positional_form_of_lora_stays() -> None:
    update = LoraUpdate(torch.ones(RANK, IN), torch.ones(OUT, RANK), 2.0)
    assert isinstance(update, Update)
    assert (update.rank, update.alpha, update.mid, update.magnitude) == (RANK, 2.0, None, None)
    delta = update.weight_delta(0.5)
    assert delta is not None
    assert torch.equal(delta, torch.ones(OUT, IN))


def test_no_two_methods_share_a_part_but_oft_and_boft() -> None:
    shared = {"magnitude", "diff_b", "oft_blocks", "rescale"}
    names = [name for method in METHODS for name in method.allowed - shared]
    assert len(names) == len(set(names))
