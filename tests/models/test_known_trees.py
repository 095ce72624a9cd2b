"""The built-in module trees against diffusers' and transformers' own networks on the meta device."""

from __future__ import annotations

import torch

from lora_kit.models import skeleton
from lora_kit.models.known_trees import known_trees
from lora_kit.recipe import ModelSection
from lora_kit.targeting import module_tree


def test_the_published_sizes() -> None:
    """Parameter counts of the published UNets and text encoders (SD 1.5, SD 2.1), as everyone quotes them."""
    trees = known_trees()
    counts = {
        name: {part: sum(m.parameters for m in tree if m.component == part) for part in ("unet", "text_encoder")}
        for name, tree in trees.items()
    }
    assert counts["sd1"] == {"unet": 859_520_964, "text_encoder": 123_060_480}
    assert counts["sd2"] == {"unet": 865_910_724, "text_encoder": 340_387_840}


def test_sd1_is_what_diffusers_builds() -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    assert list(known_trees()["sd1"]) == module_tree({"unet": unet, "text_encoder": text})


def test_tiny_is_the_packaged_base() -> None:
    assert list(known_trees()["tiny"]) == module_tree(skeleton(ModelSection(base="tiny")).components)


def test_flattened_names_stand_for_one_module_each() -> None:
    """What lets a kohya file be read without its base: no two modules have the same flattened name."""
    names = {module.name for tree in known_trees().values() for module in tree}
    assert len({name.replace(".", "_") for name in names}) == len(names)
