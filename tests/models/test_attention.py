"""`model.attention`: what is told where xformers cannot be had, and the wiring with a stand-in for the package."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from torch import Tensor

from lora_kit.errors import RecipeError
from lora_kit.models import attention, load_bundle
from lora_kit.recipe import ModelSection, Recipe
from lora_kit.training.encoders import load_encoders


def plain_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """What xformers computes of [b · heads, tokens, width], written out."""
    assert options.get("attn_bias") is None
    scale = options.get("scale") or 1 / math.sqrt(query.shape[-1])
    return (query @ key.mT * scale).softmax(-1) @ value


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if xformers and a GPU were there; a list of the calls' widths."""
    seen: list[int] = []

    def computed(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append(query.shape[-1])
        return plain_attention(query, key, value, **options)

    stand_in = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=computed))
    drawn = torch.randn
    for module in (attention, attention_processor):
        monkeypatch.setattr(module, "is_xformers_available", lambda: True)
    monkeypatch.setattr(attention_processor, "xformers", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: drawn(*shape, **(how | {"device": "cpu"})))
    return seen


def predicted(bundle: Any) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    latents = torch.empty(2, 4, 8, 8).normal_(generator=chance)
    condition = bundle.family.condition(bundle, ["red circle", "green square"])
    with torch.no_grad():
        return bundle.family.predict(bundle, latents, torch.tensor([10, 900]), condition)


def test_the_unet_and_the_vae_compute_the_same_through_xformers(folder, calls):
    plain, made = (load_bundle(ModelSection(base=str(folder), attention=kind)) for kind in ("sdpa", "xformers"))
    for network in (made.unet, made.vae):
        kinds = {type(one.processor).__name__ for one in network.modules() if hasattr(one, "processor")}
        assert kinds == {"XFormersAttnProcessor"}
    wanted, pixels = predicted(plain), torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    latents = plain.family.encode(plain, pixels)[0]
    calls.clear()
    # Both sum some dozen products in fp32, in another order: a few units of 2^-24 of values about 1, through 4 blocks.
    assert torch.allclose(predicted(made), wanted, atol=1e-5)
    assert len(calls) == sum(hasattr(one, "processor") for one in made.unet.modules())
    calls.clear()
    assert torch.allclose(made.family.encode(made, pixels)[0], latents, atol=1e-5)
    assert calls


def test_what_fills_a_cache_takes_it_too(tiny_sd1_folder, picture_folder, calls):
    recipe = Recipe.model_validate(
        {
            "model": {"base": str(tiny_sd1_folder), "attention": "xformers"},
            "data": {"sources": [{"path": str(picture_folder)}], "resolution": 16},
        }
    )
    vae = load_encoders(recipe).vae
    assert {type(one.processor).__name__ for one in vae.modules() if hasattr(one, "processor")} == {
        "XFormersAttnProcessor"
    }


def test_without_the_package_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setattr(attention, "is_xformers_available", lambda: False)
    with pytest.raises(RecipeError, match=r"pip install lora_kit\[xformers\]`, or set `model\.attention: sdpa`"):
        attention.check_attention("xformers")
    attention.check_attention("sdpa")


def test_without_a_gpu_it_is_told(monkeypatch):
    monkeypatch.setattr(attention, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"runs on NVIDIA GPUs, and none was found; set `model\.attention: sdpa`"):
        attention.check_attention("xformers")


def test_an_xformers_of_another_torch_is_told(tiny_sd1_folder, calls, monkeypatch):
    def refuses(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`.")

    monkeypatch.setattr(attention_processor.xformers.ops, "memory_efficient_attention", refuses)
    with pytest.raises(RecipeError, match=r"xformers does not work here: No operator found .* must be built for"):
        load_bundle(ModelSection(base=str(tiny_sd1_folder), attention="xformers"))
