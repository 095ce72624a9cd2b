"""Stable Diffusion 1 and 2 the whole way: plan, train, resume, save and load, scale, merge, sample.

On random bases with the published ones' very blocks, layers and schedules, narrow (real_configs.narrowed). LoRA on
every linear and convolution of the UNet and on the text encoder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from adapter_samples import bundle_of
from merge_samples import assert_within_rounding, expected_weights, networks_of, weights_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lora_kit.adapters import AdapterState, load_adapter, read_adapter, set_scale
from lora_kit.cli.main import main
from lora_kit.inference import SamplingSettings, draw, generate, prepare
from lora_kit.merging import MergeOptions, merge
from lora_kit.recipe import load_recipe
from lora_kit.training import train

MODULES = {"sd1": 282 + 6 * 12, "sd2-base": 282 + 6 * 23, "sd2-v": 282 + 6 * 23}
"""As test_real_configs.py counts them on the published configs."""
RECIPE = """
model: {{base: {base}}}
targets: {{preset: all, text_encoder: true, rank: 2, alpha: 2}}
data:
  sources: [{{path: {pictures}}}]
  resolution: 128   # the middle block then has four places to attend to
  batch_size: 2
  workers: 0
optimizer: {{lr: 0.01}}
train: {{max_steps: 4, log_every: 1}}
save: {{every: 2, dtype: fp32}}
validation: {{every: 0, steps: 2}}
output_dir: {out}
"""
SETTINGS = SamplingSettings(steps=3, guidance=3.0, negative_prompt="grey house", width=64, height=64)


class Trained(NamedTuple):
    """A base, and a run on it."""

    name: str
    base: Path
    recipe: Path
    run: Path

    @property
    def adapter(self) -> Path:
        return self.run / "adapter.safetensors"

    @property
    def predicts(self) -> str:
        return "v_prediction" if self.name == "sd2-v" else "epsilon"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", params=MODULES)
def trained(
    request: pytest.FixtureRequest,
    small_real_base: Callable[[str], Path],
    picture_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    base, place = small_real_base(request.param), tmp_path_factory.mktemp("family")
    recipe, run = place / "recipe.yaml", place / "run"
    recipe.write_text(RECIPE.format(base=base, pictures=picture_folder, out=run))
    train(load_recipe(recipe))
    return Trained(request.param, base, recipe, run)


@pytest.fixture(scope="module")
def state(trained: Trained) -> AdapterState:
    return read_adapter(trained.adapter, bundle_of(trained.base).components)


@pytest.fixture(scope="module")
def merged(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "base"
    merge(trained.base, [(trained.adapter, 1.0)], out, MergeOptions(verify_network=True))
    return out


def test_plan(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(trained.recipe), "--json"])
    assert caught.value.code == 0
    planned = json.loads(capsys.readouterr().out)["plan"]
    assert len(planned["targets"]) == MODULES[trained.name]
    assert planned == json.loads((trained.run / "plan.json").read_text())


def test_train(trained: Trained, state: AdapterState) -> None:
    """Every module that was planned has moved; the losses are of the right size for noise and v of unit variance."""
    assert len(state.updates) == MODULES[trained.name]
    still = [name for name, update in state.updates.items() if not bool(update.weight_delta(1.0, None).any())]
    assert still == []
    lines = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4
    assert all(0.1 < loss < 10 for loss in losses)


def test_resume(trained: Trained, tmp_path: Path) -> None:
    """From the checkpoint at half way to the same bits."""
    again = tmp_path / "run"
    shutil.copytree(trained.run, again)
    (again / "adapter.safetensors").unlink()
    options = [f"output_dir={again}", f"train.resume={again / 'checkpoints' / 'step-000002'}"]
    train(load_recipe(trained.recipe, options))
    assert digest(again / "adapter.safetensors") == digest(trained.adapter)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_save_and_load(trained: Trained, state: AdapterState) -> None:
    """The file has the very weights of the last checkpoint, and says whose they are."""
    held = load_file(trained.run / "checkpoints" / "step-000004" / "trainable.safetensors")
    got = sorted((part.flatten().tolist() for one in state.updates.values() for part in one.parts().values()), key=str)
    assert got == sorted((tensor.flatten().tolist() for tensor in held.values()), key=str)
    with safe_open(trained.adapter, "pt") as file:
        told = file.metadata()
    words = {
        "sd1": ("sd1", "sd_v1", "stable-diffusion-v1/lora", "epsilon"),
        "sd2-base": ("sd2", "sd_v2", "stable-diffusion-v2-512/lora", "epsilon"),
        "sd2-v": ("sd2", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v"),
    }[trained.name]
    keys = ("lora_kit.family", "ss_base_model_version", "modelspec.architecture", "modelspec.prediction_type")
    assert tuple(told[key] for key in keys) == words
    assert json.loads(told["lora_kit.scheduler"]) == {"prediction_type": trained.predicts}


def outputs(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """Text states, and the UNet's output from fixed ones."""
    generator = torch.Generator().manual_seed(0)
    dtype = networks["unet"].conv_in.weight.dtype
    width = networks["unet"].config.cross_attention_dim
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    states = torch.randn(2, 77, width, generator=generator).to(dtype)
    ids = torch.randint(20, (2, 77), generator=generator)
    with torch.no_grad():
        return {
            "unet": networks["unet"](latents, torch.tensor([10, 900]), states).sample,
            "text_encoder": networks["text_encoder"](ids).last_hidden_state,
        }


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_scale(scale: float, trained: Trained, state: AdapterState) -> None:
    """Live at a strength: the network with that many times α/r · up · down in its weights, reckoned in float64."""
    live, exact = bundle_of(trained.base), bundle_of(trained.base, torch.float64)
    untouched = outputs(live.components)
    for name, update in state.updates.items():
        component, _, inner = name.partition(".")
        up, down = update.parts()["up"].double(), update.parts()["down"].double()
        weight = exact.components[component].get_parameter(f"{inner}.weight")
        with torch.no_grad():
            weight += scale * update.alpha / len(down) * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    load_adapter(live, trained.adapter)
    set_scale(live, {"default": scale})
    wanted, got = outputs(exact.components), outputs(live.components)
    for component, output in got.items():
        if scale == 0:
            assert torch.equal(output, untouched[component])
        else:
            assert not torch.equal(output, untouched[component])
        # fp32 against float64: a rounding for each of a few products in each of some 150 layers one behind the other.
        tolerance = 150 * 4 * torch.finfo(torch.float32).eps
        assert (output - wanted[component]).abs().max() <= tolerance * wanted[component].abs().max()


def test_merge(trained: Trained, state: AdapterState, merged: Path) -> None:
    """Every weight is W + α/r · up · down within fp32's rounding, and the folder is the base's in all else."""
    before, after = weights_of(networks_of(trained.base)), weights_of(networks_of(merged))
    wanted, sizes = expected_weights(before, [(state, 1.0)])
    assert_within_rounding(after, wanted, sizes)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == MODULES[trained.name]
    for path in ("scheduler/scheduler_config.json", "model_index.json", "vae/config.json", "unet/config.json"):
        assert (merged / path).read_bytes() == (trained.base / path).read_bytes()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.int16)


def by_diffusers(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """diffusers' own pipeline with DDIM over the folder's own schedule."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    if adapter is not None:
        pipe.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    made = pipe(
        "red apple",
        negative_prompt=SETTINGS.negative_prompt,
        num_inference_steps=SETTINGS.steps,
        guidance_scale=SETTINGS.guidance,
        width=SETTINGS.width,
        height=SETTINGS.height,
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)),
    )
    return pixels(made.images[0])


def test_sample(trained: Trained, merged: Path) -> None:
    """The same picture four ways: by diffusers and by us, with the adapter and from the merged folder."""
    prepared = prepare(str(trained.base), [trained.adapter])
    assert prepared.warnings == ()
    assert prepared.bundle.prediction_type == trained.predicts
    ours = pixels(generate(prepared, ["red apple"], [3], [1.0], SETTINGS)[0].image)
    ways = {
        "merged": pixels(draw(bundle_of(merged), ["red apple"], [3], settings=SETTINGS)[0]),
        "diffusers, adapter": by_diffusers(trained.base, trained.adapter),
        "diffusers, merged": by_diffusers(merged),
    }
    # The same in fp32 but for the order of sums; a value on the edge between two bytes may fall either way.
    assert {way: int(np.abs(other - ours).max()) for way, other in ways.items()} == pytest.approx(
        dict.fromkeys(ways, 0), abs=1
    )
    plain = pixels(generate(prepared, ["red apple"], [3], [0.0], SETTINGS)[0].image)
    assert np.array_equal(plain, pixels(draw(bundle_of(trained.base), ["red apple"], [3], settings=SETTINGS)[0]))
    assert np.abs(plain - ours).max() > 20


def test_an_adapter_of_the_other_prediction_is_told_and_drawn_rightly(
    trained: Trained, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights under a config that says the wrong thing: pictures and the merged folder follow the adapter."""
    wrong = tmp_path / "wrong"
    shutil.copytree(trained.base, wrong)
    config = wrong / "scheduler" / "scheduler_config.json"
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[trained.predicts]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": other}))
    options = ["--prompt", "red apple", "--seed", "3", "--steps", "3", "--guidance", "3", "--negative", "grey house"]
    command = ["generate", str(wrong), "--adapter", str(trained.adapter), *options, "--size", "64x64"]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--out", str(tmp_path / "pictures")])
    assert caught.value.code == 0
    said = capsys.readouterr().err
    assert f"was trained to predict {trained.predicts}, which {wrong} by its config was not" in said
    right = pixels(draw(bundle_of(merged), ["red apple"], [3], settings=SETTINGS)[0])
    with Image.open(next((tmp_path / "pictures").glob("*.png"))) as drawn:
        assert np.abs(pixels(drawn) - right).max() <= 1
    report = merge(wrong, [(trained.adapter, 1.0)], tmp_path / "merged")
    assert any("the merged scheduler_config.json says so" in note for note in report.notes)
    assert np.abs(by_diffusers(tmp_path / "merged") - right).max() <= 1
