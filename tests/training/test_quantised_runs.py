"""Runs on a quantised base."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open

from lora_kit.adapters import fuse, load_adapter, set_scale, without_adapters
from lora_kit.errors import LoraKitError, TargetError
from lora_kit.models import base_hash, load_bundle
from lora_kit.training import train
from lora_kit.training.build import build_run
from lora_kit.training.quantised_base import loss_line, means
from lora_kit.training.validation.measuring import measure_base

KINDS = ("nf4", "int8")
BOTH = "targets={preset: all-linear, rank: 2, text_encoder: true}"
CHECKPOINTING = "train.gradient_checkpointing=true"


def digest(path: Path) -> str:
    """Of the tensors' bytes: the header names the run's folder."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_run(make_recipe, tmp_path, kind, precision):
    own = (
        f"model.quantize={kind}",
        CHECKPOINTING,
        f"train.mixed_precision={precision}",
        "validation.every=1",
        "validation.prompts=['red circle']",
    )
    train(make_recipe(*own, name="whole"))
    train(make_recipe(*own, "train.max_steps=2", name="parted"))
    train(make_recipe(*own, "train.resume=latest", name="parted"))
    name = "adapter.safetensors"
    assert digest(tmp_path / "whole" / name) == digest(tmp_path / "parted" / name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_an_ordinary_one_for_the_true_base(make_recipe, tmp_path, kind):
    recipe = make_recipe(f"model.quantize={kind}", BOTH, "optimizer.name=adamw8bit")
    train(recipe)
    file = tmp_path / "run" / "adapter.safetensors"
    bundle = load_bundle(make_recipe().model)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["lora_kit.base_quantized"] == kind
    assert metadata["lora_kit.base_hash"] == base_hash(bundle)
    load_adapter(bundle, file)


@pytest.mark.parametrize("kind", KINDS)
def test_large_linears_are_quantised_and_nothing_else(make_recipe, kind):
    recipe = make_recipe(f"model.quantize={kind}", BOTH)
    plain = load_bundle(recipe.model)
    run = build_run(recipe, Accelerator(cpu=True))
    for component, network in plain.components.items():
        made = dict(run.bundle.components[component].named_modules())
        for name, module in network.named_modules():
            if not list(module.parameters(recurse=False)):
                continue
            now = made[name]
            now = getattr(now, "base_layer", now)
            large = isinstance(module, torch.nn.Linear) and module.weight.numel() >= 4096
            in_few_bits = now.weight.dtype in (torch.uint8, torch.int8)
            assert in_few_bits == large, name
    assert all(weight.dtype == torch.float32 for weight in run.trainable.values())
    assert run.quantised is not None
    sizes = re.findall(r"([\d.]+) MB", run.quantised.line())
    assert float(sizes[1]) < float(sizes[0])
    assert float(sizes[3]) < float(sizes[2])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_factor_and_strength_zero_is_the_quantised_base(make_recipe, kind):
    run = build_run(make_recipe(f"model.quantize={kind}", BOTH), Accelerator(cpu=True))
    bundle = run.bundle
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([10])
    base = bundle.family.predict(bundle, z, t, bundle.family.condition(bundle, ["red circle"])).detach()
    with torch.no_grad():
        for name, weight in run.trainable.items():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    moved = bundle.family.predict(bundle, z, t, bundle.family.condition(bundle, ["red circle"]))
    moved.square().sum().backward()
    assert not torch.equal(moved.detach(), base)
    unused = {name for name, weight in run.trainable.items() if weight.grad is None or not weight.grad.any()}
    assert not unused
    with without_adapters(bundle.components), torch.no_grad():
        off = bundle.family.predict(bundle, z, t, bundle.family.condition(bundle, ["red circle"]))
    set_scale(bundle.components, {"default": 0.0})
    with torch.no_grad():
        zero = bundle.family.predict(bundle, z, t, bundle.family.condition(bundle, ["red circle"]))
    assert torch.equal(off, base)
    assert torch.equal(zero, base)


REFUSED = {
    "dora": "{preset: attention, rank: 2, method: dora}",
    "oft": "{preset: attention, method: oft}",
    "full": "{match: 'unet.**', method: full}",
    "pissa": "{preset: attention, rank: 2, init: pissa}",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", REFUSED.values(), ids=REFUSED)
def test_what_a_quantised_base_cannot_do_is_refused_in_the_recipe(make_recipe, kind, rules):
    with pytest.raises(LoraKitError, match=f"model.quantize: {kind}"):
        make_recipe(f"model.quantize={kind}", f"targets={rules}")
    make_recipe(f"targets={rules}")


def test_whole_differences_are_for_norms_and_not_for_quantised_weights(make_recipe):
    lora = "{preset: attention, rank: 2}"
    norms, linears = ("{match: 'unet.**.norm*', method: diff}", "{match: 'unet.**.ff.**', method: diff}")
    build_run(make_recipe("model.quantize=nf4", f"targets=[{lora}, {norms}]"), Accelerator(cpu=True))
    with pytest.raises(LoraKitError, match="holds in 4 bits"):
        build_run(make_recipe("model.quantize=nf4", f"targets=[{lora}, {linears}]"), Accelerator(cpu=True))


def test_what_quantising_did_to_the_base_is_measured(make_recipe, picture_folder, tmp_path):
    held = f"validation.held_out={{path: {shutil.copytree(picture_folder, tmp_path / 'others')}}}"
    exact = build_run(make_recipe(held), Accelerator(cpu=True))
    run = build_run(make_recipe(held, "model.quantize=nf4"), Accelerator(cpu=True))
    assert run.quantised is not None
    before = means(measure_base(exact).held_out)
    assert list(run.quantised.exact_losses) == pytest.approx(before, rel=1e-5)  # fp32 in another memory order
    now = measure_base(run).held_out
    (line,) = loss_line(run.quantised, now)
    assert f"{sum(before) / len(before):.4f} as it is, {sum(means(now)) / len(now):.4f} in nf4" in line
    assert means(now) != pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_quantised_network_refuses_to_be_fused_and_keeps_its_adapter(make_recipe, kind):
    run = build_run(make_recipe(f"model.quantize={kind}", BOTH, "validation.prompts=[]"), Accelerator())
    layer = next(module for module in run.bundle.unet.modules() if hasattr(module, "lora_A"))
    with pytest.raises(TargetError, match=r"are quantised .* Nothing was fused"):
        fuse(run.bundle)
    assert layer in list(run.bundle.unet.modules())
