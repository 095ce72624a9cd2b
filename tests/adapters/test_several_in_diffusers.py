"""Several adapters at once, as diffusers' own loader has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import bundle_of, random_state
from torch import Tensor

from lora_kit.adapters import AdapterState, load_adapter, set_scale, write_kohya


def kohya_file(path: Path, components: Mapping[str, Any], seed: int) -> Path:
    """With one alpha throughout: diffusers 0.42 loses others (see test_formats_kohya.py)."""
    updates = random_state(components, seed).updates
    write_kohya(path, AdapterState({name: replace(one, alpha=2.0) for name, one in updates.items()}, {}))
    return path


def outputs(unet: Any, text_encoder: Any, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Text states, and the UNet's output from `states` (or them)."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    ids = torch.randint(20, (2, 77), generator=generator)
    with torch.no_grad():
        own = text_encoder(ids).last_hidden_state
        return own, unet(latents, torch.tensor([10, 900]), own if states is None else states).sample


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
def test_two_files_at_their_strengths(weights: tuple[float, float], folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    ours = bundle_of(folder)
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    names = ["a", "b"]
    for seed, name in enumerate(names):
        path = kohya_file(tmp_path / f"{name}.safetensors", bundle_of(folder).components, seed)
        load_adapter(ours, path, name)
        theirs.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name=name)
    set_scale(ours, dict(zip(names, weights, strict=True)))
    theirs.set_adapters(names, list(weights))
    own = outputs(ours.unet, ours.text_encoder)
    other = outputs(theirs.unet, theirs.text_encoder, own[0])
    # Both add the same products in the same order; the scale s·alpha/r is rounded once or twice: a few units in the
    # last place of two products at each of at most 40 layers in sequence.
    tolerance = 2 * 40 * 4 * torch.finfo(torch.float32).eps
    for got, expected in zip(own, other, strict=True):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    one_alone = outputs(ours.unet, ours.text_encoder)
    set_scale(ours, {"a": weights[0]})
    assert not torch.equal(outputs(ours.unet, ours.text_encoder)[1], one_alone[1])


def test_per_block_strengths_as_diffusers_has_them(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    ours, theirs = bundle_of(tiny_sd1_folder), StableDiffusionPipeline.from_pretrained(tiny_sd1_folder)
    path = kohya_file(tmp_path / "a.safetensors", bundle_of(tiny_sd1_folder).components, 0)
    load_adapter(ours, path, "a")
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="a")
    set_scale(
        ours,
        {
            "a": {
                "text_encoder.**": 0.5,
                "unet.**": 1,
                "unet.down_blocks.0.**": 0.3,
                "unet.mid_block.attentions.**": -0.2,
            }
        },
    )
    # diffusers 0.42 reaches the whole of a down or up block that has attention, and of the middle its attention.
    theirs.set_adapters("a", {"text_encoder": 0.5, "unet": {"down": 0.3, "mid": -0.2, "up": 1.0}})
    own = outputs(ours.unet, ours.text_encoder)
    other = outputs(theirs.unet, theirs.text_encoder, own[0])
    tolerance = 40 * 4 * torch.finfo(torch.float32).eps
    for got, expected in zip(own, other, strict=True):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()
