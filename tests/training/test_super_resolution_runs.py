"""Runs on a small super-resolution model: pictures alone, pairs by degradation, and what becomes of the adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LDMSuperResolutionPipeline
from PIL import Image

from lora_kit.adapters import load_adapter, read_adapter, set_scale
from lora_kit.cli.main import main
from lora_kit.errors import DataError, RecipeError
from lora_kit.inference import PictureInputs, SamplingSettings, draw
from lora_kit.merging.merge import merge
from lora_kit.models import load_bundle, pipeline
from lora_kit.recipe import ModelSection, Recipe, load_recipe
from lora_kit.training import train
from lora_kit.training.validation.likeness import psnr

RECIPE = """
model: {{base: {base}}}
targets:
  - {{match: "unet.**.to_{{q,k,v,out.0}}", rank: 4}}
  - {{match: "unet.**.{{resnets,downsamplers,upsamplers}}.*.conv*", rank: 4}}
data:
  sources: [{{path: {pictures}}}]
  resolution: 32
  batch_size: 4
degradation:
  kernels: {{bicubic: 1, area: 1}}
  blur: [0, 1]
  noise: [0, 5]
  jpeg: [50, 90]
  jpeg_probability: 0.5
optimizer: {{lr: 0.01}}
train: {{max_steps: 4, log_every: 1}}
save: {{every: 2, format: diffusers}}
validation: {{every: 0, steps: 2, held_out: {{count: 3}}}}
output_dir: {out}
"""


@pytest.fixture(scope="session")
def bare_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of 40 × 48 pixels without a caption."""
    folder = tmp_path_factory.mktemp("bare") / "pictures"
    folder.mkdir()
    for index in range(8):
        down, across = np.mgrid[0:48, 0:40]
        waves = [np.sin(across / (2 + index)), np.cos(down / 3 + index), np.sin((across + down) / 4)]
        Image.fromarray((127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def enlarging(tiny_super_resolution_folder: Path, bare_pictures: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A function (*overrides, name="run", pictures=…) → recipe on the small model."""

    def make(*overrides: str, name: str = "run", pictures: Path = bare_pictures) -> Recipe:
        path = tmp_path / "recipe.yaml"
        text = RECIPE.format(base=tiny_super_resolution_folder, pictures=pictures, out=tmp_path / name)
        path.write_text(text)
        return load_recipe(path, overrides)

    return make


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def trained(enlarging: Callable[..., Recipe]) -> Path:
    """The adapter of a run."""
    return train(enlarging()).path


def test_a_run_learns_from_pictures_alone(enlarging: Callable[..., Recipe]) -> None:
    outcome = train(enlarging("train.max_steps=12"))
    figures = outcome.figures
    assert figures["held_out_loss"] < figures["held_out_base_loss"]
    state = load_adapter(load_bundle(ModelSection(base=enlarging().model.base)), outcome.path)
    kinds = {name.rpartition(".")[2] for name in state.updates}
    assert {"to_q", "conv1", "conv2", "conv_shortcut", "conv"} <= kinds
    still = [name for name, update in state.updates.items() if not update.weight_delta(1.0).any()]
    assert not still


def test_a_resumed_run_ends_in_the_same_bits(enlarging: Callable[..., Recipe]) -> None:
    """Kernels, blur, noise and quality are drawn by (seed, step, place) alone."""
    path = train(enlarging()).path
    whole, scores = sha(path), json.loads((path.parent / "result.json").read_text())
    path.unlink()
    train(enlarging(f"train.resume={path.parent / 'checkpoints' / 'step-000002'}"))
    assert sha(path) == whole
    assert json.loads((path.parent / "result.json").read_text()) == scores


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_latents_kept_or_not_are_the_same_run(cache: str, enlarging: Callable[..., Recipe], tmp_path: Path) -> None:
    """The low-resolution picture is made of the pixels in each step, wherever the latents come from."""
    kept = train(enlarging(name="memory"))
    other = train(enlarging(f"data.cache={cache}", f"data.cache_dir={tmp_path / 'cache'}", name="other"))
    losses = [[line["loss"] for line in lines(one.path.parent) if "loss" in line] for one in (kept, other)]
    if cache == "disk":
        assert losses[0] == losses[1]
    # Encoded in batches of 4 rather than 8: fp32 roundings through some ten layers.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_micro_batches_do_not_change_the_draws(enlarging: Callable[..., Recipe]) -> None:
    whole = train(enlarging("train.max_steps=1", name="whole"))
    cut = train(enlarging("train.max_steps=1", "train.micro_batch_size=1", name="cut"))
    first, second = ([line["loss"] for line in lines(one.path.parent) if "loss" in line] for one in (whole, cut))
    assert first == pytest.approx(second, rel=1e-5)


def test_another_degradation_is_another_run(enlarging: Callable[..., Recipe]) -> None:
    strong = train(enlarging("degradation.noise=[40, 60]", name="strong"))
    weak = train(enlarging(name="weak"))
    assert strong.figures["held_out_base_loss"] != weak.figures["held_out_base_loss"]
    # Bicubic enlarging of noisier pictures is further from the original.
    assert strong.figures["psnr_bicubic"] < weak.figures["psnr_bicubic"]


def test_held_out_pairs_are_scored_and_shown(
    enlarging: Callable[..., Recipe], tiny_super_resolution_folder: Path
) -> None:
    recipe = enlarging("degradation={kernels: {area: 1}}")
    outcome = train(recipe)
    folder = outcome.path.parent
    figures = json.loads((folder / "result.json").read_text())
    assert figures["restored_pictures"] == 3
    assert (folder / "samples" / "restored.png").is_file()
    assert {path.name for path in (folder / "samples").glob("step-*.png")} == {"step-000000.png", "step-000004.png"}
    measured = [line for line in lines(folder) if "psnr" in line]
    assert [line["step"] for line in measured] == [0, 4]
    # The first validation is the base's, and so is strength 0 at the end.
    assert measured[0]["psnr"] == figures["psnr_at_0"]
    assert measured[0]["ssim"] == figures["ssim_at_0"]
    assert measured[1]["psnr"] == figures["psnr_at_1"] != figures["psnr_at_0"]
    assert any("PSNR / SSIM of 3 held-out pictures: strength 1" in line for line in outcome.lines())
    # The same from outside: every held-out picture cropped, shrunk by its mean, and enlarged by hand.
    held = _held_out(recipe)
    small = [one.resize((8, 8), Image.Resampling.BOX) for one in held]
    plain = [psnr(low.resize((32, 32), Image.Resampling.BICUBIC), one) for low, one in zip(small, held, strict=True)]
    assert figures["psnr_bicubic"] == pytest.approx(np.mean(plain), abs=1e-4)
    bundle = load_bundle(ModelSection(base=str(tiny_super_resolution_folder)))
    load_adapter(bundle, outcome.path)
    settings = SamplingSettings(steps=2, width=32, height=32)
    drawn = draw(bundle, [""] * 3, [0] * 3, settings=settings, inputs=[PictureInputs(one) for one in small])
    scores = [psnr(one, original) for one, original in zip(drawn, held, strict=True)]
    assert figures["psnr_at_1"] == pytest.approx(np.mean(scores), abs=0.02)


def _held_out(recipe: Recipe) -> list[Image.Image]:
    from lora_kit.progress import no_progress
    from lora_kit.recipe.without_text import without_captions
    from lora_kit.training.caching import data_sets

    return data_sets(without_captions(recipe), None, no_progress)[1].pictures()


def test_captions_that_are_there_are_ignored_and_said_once(
    enlarging: Callable[..., Recipe], bare_pictures: Path, picture_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(enlarging(pictures=picture_folder))
    said = capfd.readouterr().err
    assert said.count("reads no text: the captions of 8 pictures are ignored") == 1
    assert said.count("ignored") == 1
    train(enlarging(name="bare"))
    assert "ignored" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("validation.prompts=[a cat]", r"validation.prompts: .* is about text, and this base reads none"),
        ("data.trigger=sks", r"data.trigger: `trigger: sks` is about text"),
        ("data.caption_dropout=0.1", r"data.caption_dropout: .* is about text"),
        ("data.resolution=8", r"SSIM"),
        ("save.format=kohya", r"save.format: kohya's layout has no names for ldm_super_resolution"),
        ("inpainting={masks: drawn}", r"inpainting: is about bases that are given a mask"),
    ],
)
def test_what_the_recipe_cannot_ask_is_refused_by_run_and_plan(
    override: str, said: str, enlarging: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        train(enlarging(override))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(tmp_path / "recipe.yaml"), override])
    assert caught.value.code == 2


@pytest.mark.parametrize("base", ["tiny_sd1_folder", "tiny_inpainting_folder", "tiny_text2im_folder"])
def test_degradation_is_refused_for_a_base_with_text(
    base: str, enlarging: Callable[..., Recipe], request: pytest.FixtureRequest
) -> None:
    recipe = enlarging(f"model.base={request.getfixturevalue(base)}", "data.sources.0.caption_fallback=x")
    with pytest.raises(RecipeError, match="degradation: is about super-resolution's low-resolution pictures"):
        train(recipe)


def test_a_text_base_still_needs_captions(enlarging: Callable[..., Recipe], tiny_sd1_folder: Path) -> None:
    recipe = enlarging(f"model.base={tiny_sd1_folder}").model_copy(update={"degradation": None})
    with pytest.raises(DataError, match="no caption"):
        train(recipe)


def test_plan_shows_what_a_run_on_bare_pictures_would_train(
    enlarging: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enlarging()
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(tmp_path / "recipe.yaml"), "--json"])
    assert not caught.value.code
    told = json.loads(capsys.readouterr().out)
    assert [source["pictures"] for source in told["data"]["sources"]] == [8]
    assert {target["module"]["name"].partition(".")[0] for target in told["plan"]["targets"]} == {"unet"}


def test_pefts_layout_holds_the_same_adapter(enlarging: Callable[..., Recipe], trained: Path) -> None:
    folder = train(enlarging("save.format=peft", name="peft")).path
    assert (folder / "adapter_config.json").is_file()
    base = load_bundle(ModelSection(base=enlarging().model.base))
    one, other = (read_adapter(path, base.components).updates for path in (trained, folder))
    assert one.keys() == other.keys()
    for name, update in one.items():
        assert all(torch.equal(part, other[name].parts()[kind]) for kind, part in update.parts().items())
        assert update.alpha == other[name].alpha


def test_kohyas_layout_has_no_names_for_it(
    trained: Path, tiny_super_resolution_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kohya.safetensors"
    command = ["convert", str(trained), "--to", "kohya", "--base", str(tiny_super_resolution_folder), "--out", str(out)]
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert "kohya's layout has no names for ldm_super_resolution" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_strength_0_is_the_base_and_1_is_not(trained: Path, tiny_super_resolution_folder: Path) -> None:
    settings = SamplingSettings(steps=3, width=32, height=32)
    given = [PictureInputs(Image.effect_noise((8, 8), 60).convert("RGB"))]
    base = load_bundle(ModelSection(base=str(tiny_super_resolution_folder)))
    adapted = load_bundle(ModelSection(base=str(tiny_super_resolution_folder)))
    load_adapter(adapted, trained)

    def pixels(bundle: Any) -> Any:
        return np.asarray(draw(bundle, [""], [0], settings=settings, inputs=given)[0], np.int16)

    plain, whole = pixels(base), pixels(adapted)
    assert not np.array_equal(plain, whole)
    set_scale(adapted.components, {"default": 0.0})
    assert np.array_equal(pixels(adapted), plain)


def test_diffusers_draws_live_and_merged_alike(
    trained: Path, tiny_super_resolution_folder: Path, tmp_path: Path
) -> None:
    """In latents, before the codebook's nearest neighbour could turn a rounding into another colour."""
    live = load_bundle(ModelSection(base=str(tiny_super_resolution_folder)))
    load_adapter(live, trained)
    merge(tiny_super_resolution_folder, [(trained, 1.0)], tmp_path / "merged")
    merged = LDMSuperResolutionPipeline.from_pretrained(tmp_path / "merged")
    merged.set_progress_bar_config(disable=True)
    plain = LDMSuperResolutionPipeline.from_pretrained(tiny_super_resolution_folder)
    plain.set_progress_bar_config(disable=True)
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    found: list[Any] = []
    for pipe in (pipeline(live), merged, plain):
        pipe.vqvae.decode = lambda latents: found.append(latents) or type("Decoded", (), {"sample": latents})()
        pipe(picture, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")
    scale = float(found[0].abs().max())
    # W + BA rounded to fp32 once, against the sum of two products: a few units of 2^-24 a layer, three steps.
    assert float((found[0] - found[1]).abs().max()) < 1e-4 * scale
    assert float((found[0] - found[2]).abs().max()) > 1e-2 * scale


def test_a_full_fine_tune_leaves_a_folder_that_diffusers_draws_with(enlarging: Callable[..., Recipe]) -> None:
    whole = ["targets=[{match: 'unet.**', method: full}]", "save.format=kohya", "optimizer.lr=0.001"]
    path = train(enlarging(*whole)).path
    pipe = LDMSuperResolutionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(Image.new("RGB", (32, 32), (9, 99, 199)), num_inference_steps=2).images[0]
    assert picture.size == (128, 128)
    figures = json.loads((path.parent / "result.json").read_text())
    assert "psnr_at_1" in figures
    assert "psnr_at_0" not in figures
