"""LDM text-to-image, the whole way: train, resume, load, scale, merge, sample; and what is refused before that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LDMTextToImagePipeline
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from lora_kit.adapters import load_adapter, read_adapter, set_scale
from lora_kit.adapters.token_files import read_embedding
from lora_kit.cli.main import main
from lora_kit.errors import RecipeError
from lora_kit.inference import SamplingSettings, generate, prepare
from lora_kit.merging import MergeOptions, merge
from lora_kit.models import ModelBundle, load_bundle
from lora_kit.recipe import ModelSection, Recipe
from lora_kit.training import train

MakeRecipe = Callable[..., Recipe]
TARGETS = json.dumps(
    [
        {"match": "unet.**.attn*.to_{q,k,v,out.0}", "rank": 4},
        {"match": "unet.**.resnets.*.conv1", "rank": 4},
        {"match": "text_encoder.**.layers.*.{self_attn.{q,k,v,out}_proj,fc{1,2}}", "rank": 4},
    ]
)
SETTINGS = SamplingSettings(steps=3, guidance=3.0, width=64, height=64)


@pytest.fixture
def make_text2im(make_recipe: MakeRecipe, tiny_text2im_folder: Path) -> MakeRecipe:
    def make(*overrides: str, name: str = "run") -> Recipe:
        own = ("data.resolution=64", f"targets={TARGETS}")
        return make_recipe(*own, *overrides, base=tiny_text2im_folder, name=name)

    return make


@pytest.fixture
def adapter(make_text2im: MakeRecipe) -> Path:
    return train(make_text2im()).path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def curve(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def bundle_at(folder: Path) -> ModelBundle:
    return load_bundle(ModelSection(base=str(folder)))


def theirs(folder: Path) -> Any:
    pipe = LDMTextToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any) -> np.ndarray:
    """A picture of LDMTextToImagePipeline's, in bytes."""
    generator = torch.Generator().manual_seed(0)
    found = pipe("red apple", num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="pt")
    return (found.images[0].permute(1, 2, 0).numpy() * 255).round().astype(np.int16)


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def test_the_adapter_is_a_diffusers_file_that_names_its_family_and_changes_both_networks(
    adapter: Path, tiny_text2im_folder: Path
) -> None:
    with safe_open(str(adapter), "pt") as file:
        keys, header = list(file.keys()), file.metadata()
    assert header["lora_kit.family"] == "ldm_text2im"
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in keys
    assert "text_encoder.model.layers.0.fc1.lora_B.weight" in keys
    state = read_adapter(adapter, bundle_at(tiny_text2im_folder).components)
    assert len(state.updates) * 2 == len(keys)
    deltas = {name: update.weight_delta(1.0) for name, update in state.updates.items()}
    still = [name for name, delta in deltas.items() if delta is None or not delta.any()]
    assert still == []


def test_a_resumed_run_is_bit_identical_to_one_never_stopped(make_text2im: MakeRecipe, tmp_path: Path) -> None:
    whole = train(make_text2im())
    expected = digest(whole.path)
    whole.path.unlink()
    train(make_text2im(f"train.resume={tmp_path / 'run' / 'checkpoints' / 'step-000002'}"))
    assert digest(whole.path) == expected


def test_a_saved_adapter_is_loaded_back_as_it_was_trained(make_text2im: MakeRecipe, tmp_path: Path) -> None:
    first = train(make_text2im())
    # No step's worth of change: a rate of nearly nothing leaves the file's weights.
    again = train(make_text2im(f"model.adapter={first.path}", "train.max_steps=1", "optimizer.lr=1e-30", name="again"))
    with safe_open(str(first.path), "pt") as one, safe_open(str(again.path), "pt") as other:
        assert set(one.keys()) == set(other.keys())
        assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in one.keys())  # noqa: SIM118


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_diffusers_draws_the_live_and_the_merged_adapter_alike(
    scale: float, adapter: Path, tiny_text2im_folder: Path, tmp_path: Path
) -> None:
    merge(tiny_text2im_folder, [(adapter, scale)], tmp_path / "merged")
    live = theirs(tiny_text2im_folder)
    base = drawn(live)
    load_adapter(live, adapter)
    set_scale(live, {"default": scale})
    adapted = drawn(live)
    # fp32 through some hundred layers; a value on the edge between two bytes may fall either way.
    assert apart(drawn(theirs(tmp_path / "merged")), adapted) <= 1
    assert apart(adapted, base) > 10
    set_scale(live, {"default": 0.0})
    assert apart(drawn(live), base) == 0


def test_generate_draws_what_diffusers_pipeline_draws(
    adapter: Path, tiny_text2im_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = theirs(tiny_text2im_folder)
    load_adapter(pipe, adapter)
    out = tmp_path / "pictures"
    options = ["--prompt", "red apple", "--steps", "3", "--guidance", "3", "--size", "64x64", "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(tiny_text2im_folder), "--adapter", str(adapter), *options])
    assert stop.value.code == 0, capsys.readouterr().err
    from PIL import Image

    (file,) = out.glob("*.png")
    with Image.open(file) as picture:
        assert apart(np.asarray(picture, dtype=np.int16), drawn(pipe)) <= 1


def test_a_merge_is_verified_by_the_networks_and_unmerged_again(
    adapter: Path, tiny_text2im_folder: Path, tmp_path: Path
) -> None:
    merged, back = tmp_path / "merged", tmp_path / "back"
    report = merge(tiny_text2im_folder, [(adapter, 1.0)], merged, MergeOptions(verify_network=True))
    assert report.modules.keys() == {"unet", "text_encoder"}
    assert {error.component for error in report.networks} == {"unet", "text_encoder"}
    assert sorted(path.name for path in merged.iterdir()) == sorted(p.name for p in tiny_text2im_folder.iterdir())
    for name in ("vqvae/diffusion_pytorch_model.safetensors", "bert/config.json", "model_index.json"):
        assert (merged / name).read_bytes() == (tiny_text2im_folder / name).read_bytes()
    report = merge(merged, [(adapter, 1.0)], back, MergeOptions(unmerge=True, original=tiny_text2im_folder))
    assert report.distance is not None
    assert report.bound is not None
    assert report.distance.relative <= report.bound


@torch.no_grad()
def _noise(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 77, 48, generator=generator)
    return unet(torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 900]), states).sample


@torch.no_grad()
def _states(text_encoder: Any) -> Tensor:
    return text_encoder(torch.arange(5, 5 + 2 * 20).view(2, 20), return_dict=True).last_hidden_state


def _adapted(folder: Path, path: Path) -> Mapping[str, Tensor]:
    bundle = bundle_at(folder)
    load_adapter(bundle, path)
    return {"unet": _noise(bundle.unet), "text_encoder": _states(bundle.text_encoder)}


def _rounding(wanted: Tensor) -> float:
    """Of fp32 over 60 layers in sequence, each a sum of at most 576 products, whose errors add up as a random walk."""
    return 60 * 576**0.5 * torch.finfo(torch.float32).eps * float(wanted.abs().max())


def test_diffusers_and_peft_read_the_files_as_we_do(
    make_text2im: MakeRecipe, adapter: Path, tiny_text2im_folder: Path
) -> None:
    wanted = _adapted(tiny_text2im_folder, adapter)
    unet = theirs(tiny_text2im_folder).unet
    unet.load_lora_adapter(str(adapter.parent), weight_name=adapter.name, prefix="unet")
    assert (_noise(unet) - wanted["unet"]).abs().max() <= _rounding(wanted["unet"])
    folder = train(make_text2im("save.format=peft", name="peft")).path
    assert folder.is_dir()
    networks = {"unet": theirs(tiny_text2im_folder).unet, "text_encoder": theirs(tiny_text2im_folder).bert}
    outputs = {"unet": _noise, "text_encoder": _states}
    for name, network in networks.items():
        base = outputs[name](network)
        found = outputs[name](PeftModel.from_pretrained(network, folder / name))
        assert (found - wanted[name]).abs().max() <= _rounding(wanted[name])
        assert (found - base).abs().max() > 10 * _rounding(wanted[name])
    assert torch.equal(_adapted(tiny_text2im_folder, folder)["unet"], wanted["unet"])


def test_a_full_fine_tune_is_the_bases_folder_with_other_weights(
    make_text2im: MakeRecipe, tiny_text2im_folder: Path
) -> None:
    rules = 'targets=[{match: "unet.**", method: full}, {match: "text_encoder.**", method: full}]'
    path = train(make_text2im(rules, "train.ema_decay=0.9")).path
    assert {one.name for one in path.iterdir()} == {one.name for one in tiny_text2im_folder.iterdir()}
    assert json.loads((path / "bert" / "config.json").read_text())["dropout"] == 0.1
    before, after = theirs(tiny_text2im_folder), theirs(path)
    for name in ("unet", "bert"):
        old, new = getattr(before, name).state_dict(), getattr(after, name).state_dict()
        same = [key for key in old if torch.equal(old[key], new[key])]
        # No gradient reaches the head over words.
        assert {key.rpartition(".")[0] for key in same} <= {"to_logits"}
    assert bundle_at(path).family.name == "ldm_text2im"
    assert drawn(after).shape == (64, 64, 3)


def test_a_run_from_the_disk_is_the_run_from_memory(make_text2im: MakeRecipe, tmp_path: Path) -> None:
    settings = ("targets={preset: attention, rank: 2}", "optimizer.lr=1e-4", "data.flip=true")
    disk = ("data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}")
    train(make_text2im(*settings, name="memory"))
    train(make_text2im(*settings, *disk, name="disk"))
    # The first stage may see the same pictures in other batches, which changes a latent's last bits and nothing else.
    torch.testing.assert_close(curve(tmp_path / "disk"), curve(tmp_path / "memory"), rtol=1e-5, atol=0)


def test_recomputed_activations_and_chunks_change_nothing_of_short_captions(
    make_text2im: MakeRecipe, tmp_path: Path
) -> None:
    train(make_text2im("optimizer.lr=1e-4", name="plain"))
    options = ("train.gradient_checkpointing=true", "data.captions.long=chunks")
    train(make_text2im("optimizer.lr=1e-4", *options, name="other"))
    torch.testing.assert_close(curve(tmp_path / "other"), curve(tmp_path / "plain"), rtol=1e-5, atol=0)


def test_strengths_are_drawn_between_base_and_adapter(adapter: Path, tiny_text2im_folder: Path) -> None:
    prepared = prepare(str(tiny_text2im_folder), [adapter])
    assert prepared.warnings == ()
    pictures = [generate(prepared, ["red apple"], [0], [scale], SETTINGS)[0].image for scale in (0.0, 0.5, 1.0)]
    base, half, whole = (np.asarray(picture, dtype=np.int16) for picture in pictures)
    assert apart(base, drawn(theirs(tiny_text2im_folder))) <= 1
    assert 0 < np.abs(half - base).mean() < np.abs(whole - base).mean()


def test_a_word_is_learned_beside_the_adapter_and_drawn(
    make_text2im: MakeRecipe, tiny_text2im_folder: Path, tmp_path: Path
) -> None:
    tokens = ('tokens=[{token: "<toy>", initializer: cat, vectors: 2}]', 'data.trigger="<toy>"')
    outcome = train(make_text2im(*tokens))
    adapter, word = outcome.paths
    embedding = read_embedding(word)
    bundle = bundle_at(tiny_text2im_folder)
    cat = bundle.tokenizer.convert_tokens_to_ids("cat")
    before = bundle.text_encoder.get_input_embeddings().weight[cat]
    assert bool((embedding.vectors != before).any(dim=1).all())
    prepared = prepare(str(tiny_text2im_folder), [adapter], embeddings=[embedding])
    drawn = [generate(prepared, [prompt], [0], [1.0], SETTINGS)[0].image for prompt in ("red <toy>", "red cat")]
    assert drawn[0].tobytes() != drawn[1].tobytes()
    whole = [digest(path) for path in outcome.paths]
    train(make_text2im(*tokens, f"train.resume={tmp_path / 'run' / 'checkpoints' / 'step-000002'}"))
    assert [digest(path) for path in outcome.paths] == whole
    with pytest.raises(RecipeError, match=r"save\.bundle_tokens: the diffusers layout holds no tokens"):
        train(make_text2im(*tokens, "save.bundle_tokens=true", name="bundled"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["save.format=kohya"], r"save\.format: kohya's layout has no names for ldm_text2im.*`diffusers` or `peft`"),
        (["targets={preset: attention, rank: 2, method: loha}"], "diffusers layout holds LoRA.*say loha; use one of"),
        (
            ['targets=[{preset: attention, rank: 2}, {match: "unet.**.norm1", method: diff}]'],
            "diffusers layout holds LoRA.*say diff",
        ),
    ],
)
def test_what_its_files_cannot_hold_is_refused_when_the_plan_is_made(
    overrides: list[str], message: str, make_text2im: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(make_text2im(*overrides))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(tmp_path / "recipe.yaml"), "data.resolution=64", f"targets={TARGETS}", *overrides])
    assert stop.value.code == 2
    assert "save.format: " in capsys.readouterr().err
