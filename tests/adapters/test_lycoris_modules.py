"""Each method against `lycoris-lora`, module by module: its state is the file, its arithmetic the independent one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_kit.adapters import Update, read_adapter
from lora_kit.adapters.updates import BoftUpdate, OftUpdate

U = 2.0**-24
OUT, IN = 32, 24


def linear() -> nn.Module:
    return nn.Linear(IN, OUT)


def conv() -> nn.Module:
    return nn.Conv2d(IN, OUT, 3, padding=1)


def pointwise() -> nn.Module:
    return nn.Conv2d(IN, OUT, 1)


class Case(NamedTuple):
    kind: type[LycorisBaseModule]
    layer: Callable[[], nn.Module]
    options: dict[str, Any]


LORA = {"lora_dim": 4, "alpha": 3.0}
TUCKER = {**LORA, "use_tucker": True}
DORA = {**LORA, "weight_decompose": True}
DORA_IN = {**DORA, "wd_on_out": False}
# With these sides w1 is 4 × 4 and w2 8 × 6: rank 1 leaves room for both in two factors, 2 for the second.
KRON = {"lora_dim": 2, "alpha": 3.0}

CASES = {
    "lora linear": Case(LoConModule, linear, LORA),
    "lora conv": Case(LoConModule, conv, LORA),
    "lora 1x1": Case(LoConModule, pointwise, LORA),
    "lora tucker": Case(LoConModule, conv, TUCKER),
    "dora linear": Case(LoConModule, linear, DORA),
    "dora conv": Case(LoConModule, conv, DORA),
    "dora tucker": Case(LoConModule, conv, TUCKER | DORA),
    "dora linear, input norms": Case(LoConModule, linear, DORA_IN),
    "dora conv, input norms": Case(LoConModule, conv, DORA_IN),
    "loha linear": Case(LohaModule, linear, LORA),
    "loha conv": Case(LohaModule, conv, LORA),
    "loha 1x1": Case(LohaModule, pointwise, LORA),
    "loha tucker": Case(LohaModule, conv, TUCKER),
    "loha dora": Case(LohaModule, conv, DORA),
    "loha dora tucker, input norms": Case(LohaModule, conv, TUCKER | DORA_IN),
    "lokr linear": Case(LokrModule, linear, KRON),
    "lokr conv": Case(LokrModule, conv, KRON),
    "lokr 1x1": Case(LokrModule, pointwise, KRON),
    "lokr tucker": Case(LokrModule, conv, KRON | {"use_tucker": True}),
    "lokr two pairs": Case(LokrModule, linear, {"lora_dim": 1, "alpha": 3.0, "decompose_both": True}),
    "lokr two pairs, tucker": Case(
        LokrModule, conv, {"lora_dim": 1, "alpha": 3.0, "decompose_both": True, "use_tucker": True}
    ),
    "lokr whole": Case(LokrModule, linear, KRON | {"full_matrix": True}),
    "lokr whole conv": Case(LokrModule, conv, KRON | {"full_matrix": True}),
    "lokr factor": Case(LokrModule, linear, KRON | {"factor": 2}),
    "lokr unbalanced": Case(LokrModule, linear, KRON | {"unbalanced_factorization": True}),
    "lokr dora": Case(LokrModule, linear, KRON | {"weight_decompose": True}),
    "lokr dora, input norms": Case(LokrModule, conv, KRON | {"weight_decompose": True, "wd_on_out": False}),
    "full linear": Case(FullModule, linear, {}),
    "full conv": Case(FullModule, conv, {}),
    "full without bias": Case(FullModule, lambda: nn.Linear(IN, OUT, bias=False), {}),
    "norm layer": Case(NormModule, lambda: nn.LayerNorm(IN), {}),
    "norm group": Case(NormModule, lambda: nn.GroupNorm(4, IN), {}),
    "oft linear": Case(DiagOFTModule, linear, {"lora_dim": 4}),
    "oft conv": Case(DiagOFTModule, conv, {"lora_dim": 8}),
    "oft rescaled": Case(DiagOFTModule, conv, {"lora_dim": 4, "rescaled": True}),
    "oft constraint": Case(DiagOFTModule, linear, {"lora_dim": 4, "constraint": 0.02}),
    "boft linear": Case(ButterflyOFTModule, linear, {"lora_dim": 4}),
    "boft conv": Case(ButterflyOFTModule, conv, {"lora_dim": 8}),
    "boft rescaled": Case(ButterflyOFTModule, conv, {"lora_dim": 4, "rescaled": True}),
    "boft constraint": Case(ButterflyOFTModule, linear, {"lora_dim": 4, "constraint": 0.02}),
    "glora linear": Case(GLoRAModule, linear, LORA),
    "glora conv": Case(GLoRAModule, conv, LORA),
    "ia3 linear": Case(IA3Module, linear, {}),
    "ia3 conv": Case(IA3Module, conv, {}),
    "ia3 linear, input": Case(IA3Module, linear, {"train_on_input": True}),
    "ia3 conv, input": Case(IA3Module, conv, {"train_on_input": True}),
}


class Pair(NamedTuple):
    """A LyCORIS module with random parameters, and what we read from its state."""

    theirs: LycorisBaseModule
    update: Update
    weight: Tensor
    bias: Tensor | None


def random_module(case: Case) -> tuple[LycorisBaseModule, nn.Module]:
    """Parameters that change the layer about as much as it is large."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = case.layer()
    if layer.weight.ndim == 1:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    module = case.kind("lora_unet_layer", layer, **case.options)
    with torch.no_grad():
        if isinstance(module, FullModule):
            module.apply_to()  # its state is a difference only from here on
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("dora_scale", "rescale")):
                parameter.mul_(1 + 0.3 * noise)
            elif isinstance(module, FullModule):
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return module.eval(), layer


def read(case: Case, folder: Path) -> Pair:
    torch.manual_seed(0)
    base = case.layer()
    module, layer = random_module(case)
    if isinstance(module, FullModule):
        weight, bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
    else:
        weight, bias = layer.weight.detach(), layer.bias.detach()
        base = layer
    state = {f"lora_unet_layer.{key}": value.detach().contiguous() for key, value in module.state_dict().items()}
    save_file(state, folder / "a.safetensors")
    updates = read_adapter(folder / "a.safetensors", {"unet": nn.ModuleDict({"layer": base})}).updates
    assert list(updates) == ["unet.layer"]
    return Pair(module, updates["unet.layer"], weight, bias)


def allowed(pair: Pair, scale: float, merged: Tensor) -> Tensor:
    """How far LyCORIS's fp32 weight may be from the exact one.

    Four times our own bound (it multiplies in other orders) and a few roundings of the sum. A norm of N elements in
    fp32 is off by N·u at most; the inverse of a b × b matrix by 4 b² u κ times its norm, at most 1 here.
    """
    bound = 4 * pair.update.rounding(scale, pair.weight) + 4 * U * (pair.weight.abs() + merged.abs())
    if "magnitude" in pair.update.parts():
        bound = bound + pair.weight.numel() * U * merged.abs()
    if isinstance(pair.update, OftUpdate | BoftUpdate):
        size = pair.update.blocks.shape[-1]
        skew = pair.update.blocks - pair.update.blocks.mT
        condition = 1 + float(torch.linalg.matrix_norm(skew, 2).max()) ** 2
        stages = pair.update.blocks.shape[0] if isinstance(pair.update, BoftUpdate) else 1
        bound = bound + stages * 4 * size**2 * U * condition * pair.weight.abs().max() * size
    return bound


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_the_merged_weight_is_lycoris_own(name: str, scale: float, tmp_path: Path) -> None:
    case = CASES[name]
    if case.kind in (LohaModule, LokrModule):
        # Its get_merged_weight multiplies by alpha / rank twice, so that only alpha = rank shows the rest.
        case = case._replace(options=case.options | {"alpha": float(case.options["lora_dim"])})
    pair = read(case, tmp_path)
    with torch.no_grad():
        theirs, theirs_bias = pair.theirs.get_merged_weight(scale, pair.weight.shape)
    delta = pair.update.weight_delta(scale, pair.weight.double(), torch.float64)
    assert delta is not None
    merged = pair.weight.double() + delta
    tolerance = allowed(pair, scale, merged)
    assert float(tolerance.norm()) < 0.01 * float(delta.norm())
    assert bool(((theirs.double() - merged).abs() <= tolerance).all())
    change = pair.update.bias_delta(scale, pair.bias)
    assert (change is None) == (theirs_bias is None)
    if change is not None:
        assert pair.bias is not None
        torch.testing.assert_close(pair.bias + change, theirs_bias, rtol=4 * U, atol=4 * U)


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_the_live_module_computes_the_same(name: str, scale: float, tmp_path: Path) -> None:
    pair = read(CASES[name], tmp_path)
    pair.theirs.multiplier = scale
    inputs = torch.randn(2, IN, 5, 5, generator=torch.Generator().manual_seed(1))
    if pair.theirs.module_type in ("linear", "layernorm"):
        inputs = inputs.permute(0, 2, 3, 1).contiguous()
    with torch.no_grad():
        theirs = pair.theirs(inputs)
        delta = pair.update.weight_delta(scale, pair.weight.double(), torch.float64)
        assert delta is not None
        merged = pair.weight.double() + delta
        change = pair.update.bias_delta(scale, pair.bias, torch.float64)
        bias = None if pair.bias is None else pair.bias.double() + (0 if change is None else change)
        ours = pair.theirs.op(inputs.double(), weight=merged, bias=bias, **pair.theirs.kw_dict)
        # Weights off by `allowed`, and dots of n terms, twice (of the base and of the change).
        terms = pair.weight[0].numel() if pair.weight.ndim > 1 else 16 * IN
        off = allowed(pair, scale, merged) + (2 * terms + 8) * U * (2 * pair.weight.abs() + merged.abs())
        sizes = (None if bias is None else bias.abs() * 8 * U) if pair.weight.ndim > 1 else None
        if pair.weight.ndim > 1:
            tolerance = pair.theirs.op(inputs.double().abs(), off, sizes, **pair.theirs.kw_dict)
        else:  # a norm's outputs are its normed inputs, none over √(their number), times its weight
            tolerance = off.max() * (5 * 5 * IN) ** 0.5 + 8 * U
    assert bool(((theirs.double() - ours).abs() <= tolerance).all())


@pytest.mark.parametrize("scale", [1.0, -0.4])
@pytest.mark.parametrize("name", CASES)
def test_fp32_is_within_its_own_bound_and_0_changes_nothing(name: str, scale: float, tmp_path: Path) -> None:
    pair = read(CASES[name], tmp_path)
    exact = pair.update.weight_delta(scale, pair.weight, torch.float64)
    single = pair.update.weight_delta(scale, pair.weight)
    assert exact is not None
    assert single is not None
    assert single.dtype == torch.float32
    bound = pair.update.rounding(scale, pair.weight)
    assert bool(((single.double() - exact).abs() <= bound).all())
    assert float(bound.max()) < 1e-3 * float(exact.abs().max()), "a bound that lets anything through"
    nothing = pair.update.weight_delta(0.0, pair.weight)
    assert nothing is not None
    assert not nothing.any()


@pytest.mark.parametrize("name", CASES)
def test_the_low_rank_form_is_exact(name: str, tmp_path: Path) -> None:
    pair = read(CASES[name], tmp_path)
    factors = pair.update.factors(torch.float64)
    dense = pair.update.weight_delta(1.0, pair.weight, torch.float64)
    assert dense is not None
    if factors is None:
        low_rank = not pair.update.needs_weight and pair.update.rank is not None
        assert not low_rank or pair.update.method in ("loha", "lokr")
        return
    up, down = factors
    assert up.shape[1] < min(dense.flatten(1).shape) or pair.update.method == "lora"
    # float64's own rounding, of dots of some dozen terms of size 1
    torch.testing.assert_close((up @ down).view(dense.shape), dense, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_kept_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pair = read(case, tmp_path)
    theirs = {key: value for key, value in pair.theirs.state_dict().items() if key != "alpha"}
    ours = sorted((part.flatten() for part in pair.update.parts().values()), key=lambda part: part.double().tolist())
    wanted = sorted((part.detach().flatten() for part in theirs.values()), key=lambda part: part.double().tolist())
    assert len(ours) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
