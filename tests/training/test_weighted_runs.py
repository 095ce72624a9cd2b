"""Masks, loss weights and the base's own prediction as target, in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_kit.data import collate
from lora_kit.diffusion import draw_for_samples
from lora_kit.errors import DataError, RecipeError
from lora_kit.models import ModelBundle, load_bundle
from lora_kit.recipe import Recipe
from lora_kit.training import train
from lora_kit.training.build import build_run
from lora_kit.training.objective import latent_moments, noised_latents
from lora_kit.training.processes.launch import build_accelerator
from lora_kit.training.step import base_prediction

MakeRecipe = Callable[..., Recipe]


def logged(folder: Path, key: str) -> torch.Tensor:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line[key] for line in lines if "loss" in line])


def sources(*parts: dict[str, Any]) -> str:
    return f"data.sources={json.dumps(list(parts))}"


@pytest.fixture
def masked_folder(tmp_path: Path, make_picture_folder: Callable[..., Path]) -> Path:
    """Pictures with a mask beside each but the last: their left half."""
    folder = make_picture_folder(tmp_path / "masked", size=(16, 16))
    for index in range(7):
        mask = Image.new("L", (16, 16))
        mask.paste(255, (0, 0, 8, 16))
        mask.save(folder / f"{index:03d}-mask.png")
    return folder


@pytest.mark.parametrize("way", ["memory", "disk", "none"])
def test_masked_runs_are_the_same_however_latents_are_kept(
    make_recipe: MakeRecipe, masked_folder: Path, tmp_path: Path, way: str
):
    masked = sources({"path": str(masked_folder), "mask_suffix": "-mask"})
    common = (masked, "optimizer.lr=1e-4", "data.flip=true", f"data.cache_dir={tmp_path / 'cache'}")
    train(make_recipe(*common, "data.cache=memory", name="first"))
    train(make_recipe(*common, f"data.cache={way}", name="second"))
    first, second = logged(tmp_path / "first", "loss"), logged(tmp_path / "second", "loss")
    torch.testing.assert_close(first, second, rtol=1e-5, atol=0)
    without = sources({"path": str(masked_folder), "mask_folder": str(white_masks(masked_folder, tmp_path))})
    train(make_recipe(without, *common[1:], name="white"))
    assert not torch.allclose(logged(tmp_path / "white", "loss"), first, rtol=1e-3)


def white_masks(folder: Path, tmp_path: Path) -> Path:
    """A white mask for every picture of a folder."""
    masks = tmp_path / "white-masks"
    masks.mkdir()
    for path in folder.glob("???.png"):
        with Image.open(path) as picture:
            Image.new("L", picture.size, 255).save(masks / path.name)
    return masks


def test_white_masks_change_nothing(make_recipe: MakeRecipe, picture_folder: Path, tmp_path: Path):
    masks = white_masks(picture_folder, tmp_path)
    train(make_recipe(sources({"path": str(picture_folder)}), "optimizer.lr=1e-4", name="plain"))
    masked = sources({"path": str(picture_folder), "mask_folder": str(masks)})
    train(make_recipe(masked, "optimizer.lr=1e-4", name="masked"))
    # The same mean, summed in another order: 1024 fp32 terms, and a few steps' growth of that rounding.
    plain, other = logged(tmp_path / "plain", "loss"), logged(tmp_path / "masked", "loss")
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=0)


def test_what_lies_outside_the_mask_is_not_learnt(make_recipe: MakeRecipe, tmp_path: Path):
    """A U-Net sees all of the picture, so that the loss inside depends on the outside too; but in the first step a mask
    of the left half and one of the right half share the whole loss between them: left + right = 2 × whole."""
    pictures, losses = tmp_path / "pictures", dict[str, float]()
    pictures.mkdir()
    for index in range(4):
        Image.new("RGB", (16, 16), (50 * index, 200 - 40 * index, 90)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text("red apple")
    for name, box in {"left": (0, 0, 8, 16), "right": (8, 0, 16, 16), "whole": (0, 0, 16, 16)}.items():
        masks = tmp_path / f"{name}-masks"
        masks.mkdir()
        mask = Image.new("L", (16, 16))
        mask.paste(255, box)
        for index in range(4):
            mask.save(masks / f"{index}.png")
        masked = sources({"path": str(pictures), "mask_folder": str(masks)})
        train(make_recipe(masked, "train.max_steps=1", name=name))
        losses[name] = float(logged(tmp_path / name, "loss")[0])
    assert losses["left"] + losses["right"] == pytest.approx(2 * losses["whole"], rel=1e-5)
    assert losses["left"] != pytest.approx(losses["right"], rel=1e-3)


def test_unmasked_weight_lies_between_masked_and_plain(make_recipe: MakeRecipe, masked_folder: Path, tmp_path: Path):
    """w = m + (1 - m) u, of masks that are half: L(u) = (L(left half) + u · L(right half)) / (1 + u), linear in
    u / (1 + u) between the masked loss and the plain one."""
    last = masked_folder / "006-mask.png"
    (masked_folder / "007-mask.png").write_bytes(last.read_bytes())
    losses: dict[float, float] = {}
    for weight in (0.0, 0.5, 1.0):
        masked = sources({"path": str(masked_folder), "mask_suffix": "-mask"})
        options = ("train.max_steps=1", f"objective.unmasked_weight={weight}")
        train(make_recipe(masked, *options, name=f"run-{weight}"))
        losses[weight] = float(logged(tmp_path / f"run-{weight}", "loss")[0])
    share = (0.5 / 1.5) / (1.0 / 2.0)
    wanted = losses[0.0] + share * (losses[1.0] - losses[0.0])
    assert losses[0.5] == pytest.approx(wanted, rel=1e-5)


def test_alpha_as_a_mask_is_a_mask(make_recipe: MakeRecipe, tmp_path: Path):
    folder, flat, masks = tmp_path / "alpha", tmp_path / "flat", tmp_path / "masks"
    for each in (folder, flat, masks):
        each.mkdir()
    for index in range(4):
        picture = Image.new("RGBA", (16, 16), (50 * index, 99, 90, 0))
        picture.paste((50 * index, 99, 90, 255), (0, 4, 16, 12))
        picture.save(folder / f"{index}.png")
        on_white = Image.new("RGBA", (16, 16), "white")
        on_white.alpha_composite(picture)
        on_white.convert("RGB").save(flat / f"{index}.png")
        picture.getchannel("A").save(masks / f"{index}.png")
        for each in (folder, flat):
            (each / f"{index}.txt").write_text("red apple")
    train(make_recipe(sources({"path": str(folder), "alpha": "mask"}), name="alpha-run"))
    train(make_recipe(sources({"path": str(flat), "mask_folder": str(masks)}), name="mask-run"))
    assert logged(tmp_path / "alpha-run", "loss").tolist() == logged(tmp_path / "mask-run", "loss").tolist()


def test_loss_weights_scale_the_loss_and_the_gradient(make_recipe: MakeRecipe, picture_folder: Path, tmp_path: Path):
    for name, weight in {"one": 1.0, "four": 4.0}.items():
        weighted = sources({"path": str(picture_folder), "loss_weight": weight})
        train(make_recipe(weighted, "train.max_steps=1", name=name))
    # A power of two: not even the last bit differs, in loss and in gradient.
    for key in ("loss", "grad_norm"):
        assert logged(tmp_path / "four", key).tolist() == (4 * logged(tmp_path / "one", key)).tolist()


def test_a_sources_weight_is_its_own(make_recipe: MakeRecipe, picture_folder: Path, tmp_path: Path):
    """Two sources of the same pictures: halves of the plain loss each, so a weight of 3 for one adds that half twice.
    All eight pictures of each in one step: the order within it does not matter."""

    def loss(*weights: float) -> float:
        parts = [{"path": str(picture_folder), "loss_weight": weight} for weight in weights]
        name = f"run-{weights}"
        train(make_recipe(sources(*parts), "train.max_steps=1", "data.batch_size=16", name=name))
        return float(logged(tmp_path / name, "loss")[0])

    both, first, second = loss(1, 1), loss(3, 1), loss(1, 3)
    assert first + second == pytest.approx(4 * both, rel=1e-5)
    assert first > both and second > both


def test_with_the_bases_own_prediction_as_target_a_new_adapter_has_nothing_to_learn(
    make_recipe: MakeRecipe, picture_folder: Path, tmp_path: Path
):
    recipe = make_recipe(sources({"path": str(picture_folder), "target": "base"}), "optimizer.weight_decay=0.0")
    train(recipe)
    assert logged(tmp_path / "run", "loss").tolist() == [0.0] * 4
    assert logged(tmp_path / "run", "grad_norm").tolist() == [0.0] * 4


def test_the_bases_prediction_is_the_untouched_networks(make_recipe: MakeRecipe, picture_folder: Path):
    """Bit for bit, whatever the adapters of U-Net and text encoder have learnt; and they are back afterwards."""
    rules = 'targets=[{match: "unet.**.to_q", rank: 2}, {match: "text_encoder.**.q_proj", rank: 2}]'
    recipe = make_recipe(sources({"path": str(picture_folder)}, {"path": str(picture_folder), "target": "base"}), rules)
    run = build_run(recipe, build_accelerator(recipe))
    batch = collate([run.data[position] for position in range(12)])
    assert 0 < len(batch.from_base) < 12
    generator = torch.Generator().manual_seed(0)
    for parameter in run.trainable.values():
        torch.nn.init.normal_(parameter, generator=generator)
    draws = draw_for_samples(0, 0, list(range(12)), (4, 8, 8), 1000)
    noised = noised_latents(run.learner.objective, run.bundle, latent_moments(run.bundle, batch), draws)
    mine = base_prediction(run.learner, batch, noised)
    captions = [batch.captions[row] for row in batch.from_base]
    rows = noised.rows(batch.from_base)

    def predicted(bundle: ModelBundle) -> torch.Tensor:
        with torch.no_grad():
            return bundle.family.predict(bundle, rows.noisy, rows.timesteps, bundle.family.condition(bundle, captions))

    base = load_bundle(recipe.model)
    base.unet.to(memory_format=torch.channels_last)  # as in training
    assert torch.equal(mine, predicted(base))
    assert not torch.allclose(predicted(run.bundle), mine, rtol=0.01)


def test_the_bases_prediction_needs_the_base(make_recipe: MakeRecipe, picture_folder: Path):
    with pytest.raises(RecipeError, match=r"data\.sources\.0\.target.*`target: base` needs the base's own weights"):
        make_recipe(
            sources({"path": str(picture_folder), "target": "base"}), 'targets=[{match: "unet.**", method: full}]'
        )


def test_a_mask_of_another_shape_or_black_is_named(make_recipe: MakeRecipe, tmp_path: Path, masked_folder: Path):
    Image.new("L", (16, 24), 255).save(masked_folder / "000-mask.png")
    Image.new("L", (16, 16), 0).save(masked_folder / "001-mask.png")
    masked = sources({"path": str(masked_folder), "mask_suffix": "-mask"})
    with pytest.raises(DataError) as caught:
        train(make_recipe(masked, "data.on_error=raise"))
    message = str(caught.value)
    assert "masked/000.png: its mask has 16 × 24 pixels, the picture 16 × 16: another shape" in message
    assert "masked/001.png: its mask is black everywhere" in message
