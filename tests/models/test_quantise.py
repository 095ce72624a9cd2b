"""A quantised linear layer against float64 arithmetic on the weights it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kit.errors import RecipeError
from lora_kit.models.quantise import check_quantise, error_of, held_bytes, quantised
from lora_kit.targeting.quantised import quantised_bytes

CPU = torch.device("cpu")
KINDS = ("nf4", "int8")
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def layer(out: int, width: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_input_gradient_are_those_of_the_weights_it_stands_for(kind, dtype):
    plain = layer(48, 96, dtype)
    made = quantised(plain, kind, CPU)
    x = torch.randn(5, 96, dtype=dtype, requires_grad=True)
    y = made(x)
    grown = torch.randn_like(y)
    y.backward(grown)
    weight = made.dequantised(torch.float64)
    bias = plain.bias.detach().double()
    # A weight may be rounded once to dtype, the products are summed in fp32, the sum rounded to dtype.
    unit = torch.finfo(dtype).eps
    for got, inputs, matrix, offset in ((y, x, weight.T, bias), (x.grad, grown, weight, torch.zeros(()))):
        wanted = inputs.detach().double() @ matrix + offset
        reach = inputs.detach().double().abs() @ matrix.abs() + offset.abs()
        terms = 96 * torch.finfo(torch.float32).eps
        assert (got.double() - wanted).abs().le(reach * (3 * unit + terms)).all()


def test_nf4_rounds_to_the_nearest_of_its_values():
    """QLoRA, appendix E: the sixteen values; each block of 64 is scaled to its largest magnitude."""
    values = torch.tensor(NF4, dtype=torch.float64)
    plain = layer(32, 64, bias=False)
    got = quantised(plain, "nf4", CPU).dequantised(torch.float64)
    for row, weights in zip(got, plain.weight.detach().double(), strict=True):
        scale = row.abs().max()  # the block's scale after its own rounding to 8 bits
        own = weights / weights.abs().max()
        nearest = values[(own[:, None] - values).abs().argmin(dim=1)]
        assert torch.allclose(row / scale, nearest, atol=1e-6, rtol=0)


def test_int8_is_within_half_a_step_of_each_row():
    plain = layer(32, 64, bias=False)
    got = quantised(plain, "int8", CPU).dequantised(torch.float64)
    weights = plain.weight.detach().double()
    step = weights.abs().amax(dim=1, keepdim=True) / 127
    # bitsandbytes rounds the weights to fp16 first: by 2^-11 of the weight, and of the row's largest, each at most.
    halves = (127 + 127) * 2.0**-11
    assert ((got - weights).abs() <= step * (0.5 + halves + 1e-4)).all()  # 1e-4: a few fp32 roundings of 127 steps
    assert (got - weights).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_scaled_in_fp32_and_rounded_once(dtype):
    made = quantised(layer(600, 24), "int8", CPU)  # not a whole number of the rows done at once
    held, scale = made.weight.data.double(), made.weight.SCB.double()[:, None] / 127
    wanted, found = (held * scale).to(dtype), made.dequantised(dtype)
    assert found.dtype == dtype
    # 1 / 127, the scale times it and the product are each rounded in fp32, and the result in `dtype`.
    torch.testing.assert_close(found, wanted, rtol=2**-22 + torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (320, 768), (33, 127)])
def test_the_bytes_are_counted_as_they_lie_in_memory(kind, shape):
    assert held_bytes([quantised(layer(*shape), kind, CPU)]) == quantised_bytes(shape, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_the_relative_rms(kind):
    plain = layer(64, 64)
    made = quantised(plain, kind, CPU)
    difference = (made.dequantised(torch.float64) - plain.weight.detach().double()).norm()
    wanted = float(difference / plain.weight.detach().double().norm())
    assert error_of(made, plain.weight).relative == pytest.approx(wanted, rel=1e-5)
    assert 0 < wanted < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_looking_does_not_change_what_training_computes(kind):
    made = quantised(layer(64, 64, torch.bfloat16), kind, CPU)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    before = made.train()(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        made.eval()(x)
    assert torch.equal(made.train()(x.clone().requires_grad_()).detach(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_gives_the_precision_of_a_plain_layer(kind):
    plain = layer(64, 64, torch.bfloat16)
    made = quantised(plain, kind, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(4, 64)
        assert made(x).dtype == plain(x).dtype == torch.bfloat16


def test_the_layer_it_was_made_from_is_left_as_it_was():
    plain = layer(64, 64)
    kept = copy.deepcopy(plain.state_dict())
    quantised(plain, "nf4", CPU)
    assert all(torch.equal(kept[name], value) for name, value in plain.state_dict().items())


def test_a_device_that_cannot_is_told():
    with pytest.raises(RecipeError, match=r"model\.quantize: nf4 does not work on the device `meta`"):
        check_quantise("nf4", torch.device("meta"))
    check_quantise("nf4", CPU)
    check_quantise("int8", CPU)
    with pytest.raises(RecipeError, match="FSDP"):
        check_quantise("nf4", CPU, sharded=True)
