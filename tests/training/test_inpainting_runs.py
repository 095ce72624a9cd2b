"""A LoRA of an inpainting base: trained, resumed, saved, loaded, scaled, merged, sampled; masks of its training."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_samples import bundle_of
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw
from safetensors import safe_open

from lora_kit.adapters import load_adapter, set_scale
from lora_kit.data import collate
from lora_kit.errors import RecipeError
from lora_kit.inference import SamplingSettings, draw, prepare, scale_adapters
from lora_kit.merging import MergeOptions, merge
from lora_kit.models.family.picture_inputs import PictureInputs
from lora_kit.recipe import Recipe
from lora_kit.training import train
from lora_kit.training.build import build_run
from lora_kit.training.objective import beside_latents
from lora_kit.training.processes.launch import build_accelerator

MakeRecipe = Callable[..., Recipe]
RULES = (
    'targets=[{match: "unet.**", kind: linear, rank: 4, alpha: 4},'
    ' {match: "unet.**.resnets.*.conv*", kind: conv, rank: 2, alpha: 4},'
    ' {match: "text_encoder.**.{q,k,v,out}_proj", rank: 2, alpha: 4}]'
)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def masked_picture() -> tuple[Image.Image, Image.Image]:
    image, mask = Image.new("RGB", (16, 16), (210, 60, 50)), Image.new("L", (16, 16))
    ImageDraw.Draw(mask).rectangle((3, 4, 12, 11), fill=255)
    return image, mask


def by_diffusers(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """A picture of StableDiffusionInpaintPipeline, float [H, W, 3]."""
    pipe = StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipe.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    image, mask = masked_picture()
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    (drawn,) = pipe("red apple", image=image, mask_image=mask, generator=generator, **options).images
    return drawn


@pytest.fixture(params=["tiny_inpainting_folder", "tiny_inpainting2_folder"])
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_trained_resumed_loaded_scaled_merged_and_sampled_alike(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    """The whole way, for both generations."""
    train(make_recipe(RULES, "save.every=2", "optimizer.lr=0.02", base=base))
    adapter = tmp_path / "run" / "adapter.safetensors"
    # Resumed in the middle: the same bits.
    before = digest(adapter)
    adapter.unlink()
    again = f"train.resume={tmp_path / 'run' / 'checkpoints' / 'step-000002'}"
    train(make_recipe(RULES, "save.every=2", "optimizer.lr=0.02", again, base=base))
    assert digest(adapter) == before
    # kohya's names, and a header that tells the family.
    with safe_open(adapter, "pt") as file:
        names, header = set(file.keys()), file.metadata()
    assert {name.split("_")[0] + "_" + name.split("_")[1] for name in names} == {"lora_unet", "lora_te"}
    generation = "sd2" if header["ss_v2"] == "True" else "sd1"
    assert header["lora_kit.family"] == f"{generation}-inpainting"
    assert header["ss_base_model_version"].startswith(f"sd_v{generation[-1]}")
    # Loaded back and scaled: strength 0 is the base bit for bit.
    prepared = prepare(str(base), [adapter])
    assert not prepared.warnings
    inputs = [PictureInputs(*masked_picture())]
    settings = SamplingSettings(steps=4, guidance=3.0, width=16, height=16)
    drawn: dict[float, bytes] = {}
    for strength in (0.0, 1.0):
        scale_adapters(prepared, [strength])
        drawn[strength] = draw(prepared.bundle, ["red apple"], [0], settings=settings, inputs=inputs)[0].tobytes()
    assert drawn[0.0] == draw(bundle_of(base), ["red apple"], [0], settings=settings, inputs=inputs)[0].tobytes()
    assert drawn[1.0] != drawn[0.0]
    # Merged into its folder; diffusers draws the same from it as with the adapter.
    merge(base, [(adapter, 1.0)], tmp_path / "merged", MergeOptions(verify_network=True))
    plain, live, merged = by_diffusers(base), by_diffusers(base, adapter), by_diffusers(tmp_path / "merged")
    # fp32 networks of a dozen layers, four steps, guidance 3: a few thousand roundings of 6e-8
    assert np.abs(live - merged).max() < 1e-3
    assert np.abs(live - plain).max() > 1e-2
    own = np.frombuffer(drawn[1.0], np.uint8).reshape(16, 16, 3) / 255
    assert np.abs(own - live).max() <= 1 / 255 + 1e-3


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_the_steps_are_the_same_wherever_latents_are_kept(
    make_recipe: MakeRecipe, tiny_inpainting_folder: Path, tmp_path: Path, cache: str
) -> None:
    """Kept in fp32, encoded in other micro-batches: equal within rounding; pixels are there for the masked picture."""
    options = [f"data.cache={cache}", f"data.cache_dir={tmp_path / 'cache'}", "data.cache_dtype=fp32", "data.flip=true"]
    recipe = make_recipe(*options, base=tiny_inpainting_folder)
    run = build_run(recipe, build_accelerator(recipe))
    batch = collate([run.data[position] for position in range(4)])
    assert batch.pixels is not None and len(batch.pixels) == 4
    assert (batch.latent_mean is None) == (cache == "none")
    plain = make_recipe("data.cache=none", "data.flip=true", base=tiny_inpainting_folder)
    other = build_run(plain, build_accelerator(plain))
    wanted = collate([other.data[position] for position in range(4)])
    assert wanted.pixels is not None
    assert torch.equal(batch.pixels, wanted.pixels)
    words = [(0, 0, position) for position in range(4)]
    assert torch.equal(beside_latents(run.bundle, batch, words), beside_latents(other.bundle, wanted, words))  # type: ignore[arg-type]


def test_the_step_does_not_depend_on_micro_batches(
    make_recipe: MakeRecipe, tiny_inpainting_folder: Path, tmp_path: Path
) -> None:
    losses: list[list[float]] = []
    for size in (4, 1):
        train(make_recipe(f"train.micro_batch_size={size}", base=tiny_inpainting_folder, name=f"by-{size}"))
        read = (tmp_path / f"by-{size}" / "metrics.jsonl").read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, read) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.fixture
def with_masks(picture_folder: Path, tmp_path: Path) -> Path:
    """Pictures with masks beside them, but for the last."""
    folder = tmp_path / "masked"
    folder.mkdir()
    for path in sorted(picture_folder.iterdir()):
        shutil.copy(path, folder / path.name)
        if path.suffix == ".png" and path.stem != "007":
            with Image.open(path) as picture:
                mask = Image.new("L", picture.size)
            ImageDraw.Draw(mask).rectangle((0, 0, mask.width // 2 - 1, mask.height), fill=255)
            mask.save(folder / f"{path.stem}-mask.png")
    return folder


def test_mask_files_say_what_is_filled_where_the_recipe_says_so(
    make_recipe: MakeRecipe, tiny_inpainting_folder: Path, with_masks: Path
) -> None:
    sources = f"data.sources=[{{path: {with_masks}, mask_suffix: -mask}}]"
    filled = make_recipe(sources, "inpainting={masks: data, whole: 0.0}", base=tiny_inpainting_folder)
    run = build_run(filled, build_accelerator(filled))
    samples = [run.data.plain(record) for record in range(8)]
    batch = collate(samples)
    assert batch.masks is None, "all of a picture counts"
    beside = beside_latents(run.bundle, batch, [(0, 0, position) for position in range(8)])
    assert beside is not None
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    assert [bool(one.equal(left)) for one in beside[:7, 0]] == [True] * 7
    assert not beside[7, 0].equal(left), "a picture without a mask gets a drawn one"
    weighed = make_recipe(sources, "inpainting={masks: drawn, whole: 1.0}", base=tiny_inpainting_folder)
    run = build_run(weighed, build_accelerator(weighed))
    batch = collate([run.data.plain(record) for record in range(8)])
    assert batch.masks is not None and not batch.holes
    assert batch.masks[0].equal(left)
    beside = beside_latents(run.bundle, batch, [(0, 0, position) for position in range(8)])
    assert beside is not None and bool(beside[:, 0].eq(1).all())


def test_what_a_mask_file_means_has_to_be_said(
    make_recipe: MakeRecipe, tiny_inpainting_folder: Path, with_masks: Path
) -> None:
    sources = f"data.sources=[{{path: {with_masks}, mask_suffix: -mask}}]"
    for extra in ([], ["inpainting.whole=0.5"]):
        recipe = make_recipe(sources, *extra, base=tiny_inpainting_folder)
        with pytest.raises(RecipeError, match=r"inpainting\.masks: .* is sd1-inpainting, .*`data` .* or `drawn`"):
            build_run(recipe, build_accelerator(recipe))


def test_the_section_is_refused_for_a_base_that_sees_no_mask(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("inpainting.whole=0.5")
    with pytest.raises(RecipeError, match=r"inpainting: is about bases that are given a mask .*tiny-sd1 is sd1"):
        build_run(recipe, build_accelerator(recipe))


def test_validations_measure_and_show_the_same_masks_every_time(
    make_recipe: MakeRecipe, make_picture_folder: Callable[..., Path], tiny_inpainting_folder: Path, tmp_path: Path
) -> None:
    held_out = make_picture_folder(tmp_path / "three", count=3)
    options = [f"validation.held_out={{path: {held_out}}}", "validation.every=2", "validation.prompts=[red apple]"]
    train(make_recipe(*options, "inpainting.shown=2", "optimizer.lr=1e-30", base=tiny_inpainting_folder))
    run = tmp_path / "run"
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line["held_out_loss"] for line in read if "held_out_loss" in line]
    # Nothing was learnt at that rate: the same pictures, masks, noise and timesteps give the same loss.
    assert len(measured) == 3 and measured == pytest.approx([measured[0]] * 3, rel=1e-6)
    drift = [line["drift"] for line in read if "drift" in line]
    assert drift == pytest.approx([0.0] * 3, abs=1e-9)
    sheets = {path.name for path in (run / "samples").glob("filled*")}
    assert sheets == {"filled-step-000000.png", "filled-step-000002.png", "filled-step-000004.png", "filled_final.png"}
    with (
        Image.open(run / "samples" / "filled-step-000000.png") as first,
        Image.open(run / "samples" / "filled-step-000004.png") as last,
        Image.open(run / "samples" / "filled_final.png") as final,
    ):
        assert np.abs(np.asarray(first).astype(int) - np.asarray(last)).max() <= 1
        assert final.width > first.width, "a column for each strength"
        assert final.height == first.height


def test_a_word_alone_has_no_strengths_to_fill_at(
    make_recipe: MakeRecipe, make_picture_folder: Callable[..., Path], tiny_inpainting_folder: Path, tmp_path: Path
) -> None:
    held_out = make_picture_folder(tmp_path / "two", count=2)
    word = ['tokens=[{token: "<toy>", initializer: cat}]', 'data.trigger="<toy>"', "targets=none"]
    options = [*word, f"validation.held_out={{path: {held_out}}}", "train.max_steps=1"]
    train(make_recipe(*options, base=tiny_inpainting_folder))
    samples = tmp_path / "run" / "samples"
    with Image.open(samples / "filled-step-000001.png") as last, Image.open(samples / "filled_final.png") as final:
        assert final.size == last.size


def test_a_full_fine_tune_leaves_a_folder_that_diffusers_inpaints_with(
    make_recipe: MakeRecipe, tiny_inpainting_folder: Path, tmp_path: Path
) -> None:
    rules = 'targets={match: "unet.**", method: full}'
    (path,) = train(make_recipe(rules, "save.dtype=fp32", "train.max_steps=2", base=tiny_inpainting_folder)).paths
    assert json.loads((path / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    assert np.abs(by_diffusers(path) - by_diffusers(tiny_inpainting_folder)).max() > 1e-2


def test_an_adapter_on_a_live_bundle_acts_as_in_training(
    make_recipe: MakeRecipe, tiny_inpainting_folder: Path, tmp_path: Path
) -> None:
    train(make_recipe(RULES, base=tiny_inpainting_folder))
    bundle = bundle_of(tiny_inpainting_folder)
    load_adapter(bundle, tmp_path / "run" / "adapter.safetensors", "style")
    set_scale(bundle.components, {"style": 1.0})
    seen = torch.randn(1, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = bundle.family.condition(bundle, ["red apple"])
    with torch.no_grad():
        split = bundle.family.predict(bundle, seen[:, :4], torch.tensor([500]), condition, seen[:, 4:])
        whole = bundle.unet(seen, torch.tensor([500]), condition).sample
    assert torch.equal(split, whole), "z_t, mask, masked picture, in this order"


def test_the_bases_own_prediction_sees_the_same_mask(
    make_recipe: MakeRecipe, tiny_inpainting_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    """`target: base` asks the base with what the adapted network is given: a new adapter has nothing to learn."""
    source = f"data.sources=[{{path: {picture_folder}, target: base}}]"
    train(make_recipe(source, "optimizer.weight_decay=0.0", base=tiny_inpainting_folder))
    read = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in read if "loss" in line] == [0.0] * 4
