"""Whole runs on the small base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from lora_kit.errors import DataError, RecipeError, TrainingError
from lora_kit.models.loading import TINY_FOLDER
from lora_kit.training import train


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def last_checkpoint_digest(folder: Path) -> list[str]:
    step = folder / "checkpoints" / "step-000004"
    return [digest(step / name) for name in ("trainable.safetensors", "optimizer.safetensors")]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_contract_says(make_recipe, tmp_path):
    outcome = train(make_recipe("validation.prompts=[red apple]"))
    run = tmp_path / "run"
    assert outcome.path == run / "adapter.safetensors"
    expected = (
        "recipe.yaml",
        "plan.json",
        "metrics.jsonl",
        "logs",
        "samples/step-000000.png",
        "samples/final_grid.png",
    )
    assert [name for name in expected if not (run / name).exists()] == []
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    logged = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert {"lr", "grad_norm", "samples_per_s"} <= logged[0].keys()


def test_the_same_recipe_gives_the_same_bits(make_recipe, tmp_path):
    train(make_recipe())
    first = digest(tmp_path / "run" / "adapter.safetensors")
    train(make_recipe("train.overwrite=true"))
    assert digest(tmp_path / "run" / "adapter.safetensors") == first


def test_a_resumed_run_is_bit_identical_to_one_never_stopped(make_recipe, tmp_path):
    train(make_recipe())
    whole = digest(tmp_path / "run" / "adapter.safetensors")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    (tmp_path / "run" / "adapter.safetensors").unlink()
    train(make_recipe(f"train.resume={checkpoint}"))
    assert digest(tmp_path / "run" / "adapter.safetensors") == whole
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]


FULL = 'targets=[{match: "unet.**", method: full}, {match: "text_encoder.**", method: full}]'


@pytest.mark.parametrize(
    "overrides", [["optimizer.name=adamw8bit"], [FULL, "train.ema_decay=0.9"]], ids=["8bit", "full"]
)
def test_resuming_gives_the_same_bits_for_every_optimizer_state(make_recipe, tmp_path, overrides):
    # Full fine-tuning holds convolutions and their moments channels-last: a resume must give them back so.
    train(make_recipe(*overrides))
    whole = last_checkpoint_digest(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    train(make_recipe(*overrides, f"train.resume={checkpoint}"))
    assert last_checkpoint_digest(tmp_path / "run") == whole


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_learning_curve_does_not_depend_on_how_a_batch_is_cut(make_recipe, tmp_path, micro_batch_size):
    # Plain gradient descent would differ by rounding alone; AdamW divides by the gradient's own size, so a first
    # step is lr × sign(g) wherever |g| is far from eps. The losses are means of b × c × h × w = 1024 fp32 terms of
    # the same numbers: √1024 × 2^-24 relative in the first step, and a few steps' growth of it after.
    curves = []
    for name, overrides in {"whole": [], "cut": [f"train.micro_batch_size={micro_batch_size}"]}.items():
        train(make_recipe("optimizer.lr=1e-4", *overrides, name=name))
        curves.append([line["loss"] for line in lines(tmp_path / name) if "loss" in line])
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=0)


def test_training_lowers_the_held_out_loss(make_recipe, tmp_path):
    recipe = make_recipe(
        "train.max_steps=30", "data.batch_size=8", "data.caption_dropout=0.0", "optimizer.lr=3e-3", "save.every=0"
    )
    held_out = recipe.validation.model_copy(update={"held_out": recipe.data.sources[0]})
    train(recipe.model_copy(update={"validation": held_out}))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    # Better than the base by more than chance would give: three standard errors of the paired difference.
    assert result["held_out_difference"] < -3 * result["held_out_standard_error"]


def test_an_untrained_adapter_is_the_base_in_the_held_out_loss(make_recipe, tmp_path):
    recipe = make_recipe("optimizer.lr=1e-30", "optimizer.weight_decay=0.0", "train.max_steps=1")
    held_out = recipe.validation.model_copy(update={"held_out": recipe.data.sources[0]})
    train(recipe.model_copy(update={"validation": held_out}))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["held_out_difference"] == 0.0


def test_a_finished_run_is_not_overwritten_unless_asked(make_recipe, tmp_path):
    train(make_recipe("train.max_steps=1"))
    before = digest(tmp_path / "run" / "adapter.safetensors")
    with pytest.raises(RecipeError, match=r"already holds a run.*train.resume=latest.*train.overwrite=true"):
        train(make_recipe("train.max_steps=1"))
    assert digest(tmp_path / "run" / "adapter.safetensors") == before


def test_a_run_that_failed_before_its_first_step_can_be_started_again(make_recipe, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    (broken / "a.txt").write_text("red apple")
    with pytest.raises(DataError, match=r"a\.png"):
        train(make_recipe("train.max_steps=1", pictures=broken))
    (tmp_path / "run" / "samples").mkdir(parents=True, exist_ok=True)  # empty, such as an earlier version made
    train(make_recipe("train.max_steps=1"))
    assert (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_non_finite_loss_names_step_samples_and_last_checkpoint(make_recipe, tmp_path):
    with pytest.raises(TrainingError, match=r"step 2 is nan.*eight/\d+\.png.*step-000001"):
        train(make_recipe("optimizer.lr=1e30", "save.every=1", "optimizer.max_grad_norm=0.0"))
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_checkpoint_of_other_targets_is_refused(make_recipe, tmp_path):
    train(make_recipe("train.max_steps=2"))
    with pytest.raises(TrainingError, match="other targets"):
        train(make_recipe("targets.0.rank=8", "train.resume=latest"))


def test_full_fine_tuning_trains_everything_and_writes_a_diffusers_folder(make_recipe, tmp_path, tiny_sd1_folder):
    recipe = make_recipe(
        'targets=[{match: "unet.**", method: full}, {match: "text_encoder.**", method: full}]',
        "model.weights=fresh",
        "train.ema_decay=0.9",
        "train.max_steps=2",
    )
    outcome = train(recipe)
    assert outcome.path == tmp_path / "run" / "model"
    for component in ("unet", "text_encoder"):
        (file,) = (outcome.path / component).glob("*.safetensors")
        (base,) = (tiny_sd1_folder / component).glob("*.safetensors")
        trained, before = load_file(file), load_file(base)
        assert trained.keys() == before.keys()
        assert not any(torch.equal(trained[name], before[name]) for name in trained if trained[name].std() > 0)


def test_a_full_fine_tune_saved_in_fp16_is_sampled_by_diffusers_as_it_lies(make_recipe):
    # Named no dtype: diffusers then holds the U-Net in fp32, transformers the text encoder as its config says.
    rules = 'targets=[{match: "unet.**", method: full}]'
    outcome = train(make_recipe(rules, "save.dtype=fp16", "train.max_steps=1"))
    draw_with_diffusers(outcome.path)


def test_the_packaged_base_is_sampled_by_diffusers_as_it_lies():
    draw_with_diffusers(TINY_FOLDER)


def draw_with_diffusers(folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("red apple", num_inference_steps=2, output_type="np").images
    assert torch.isfinite(torch.from_numpy(drawn)).all()


def test_text_encoder_adapters_train_at_their_own_rate(make_recipe, tmp_path):
    rules = 'targets=[{match: "unet.**.to_q", rank: 2}, {match: "text_encoder.**.q_proj", rank: 2}]'
    train(make_recipe(rules, "optimizer.text_encoder_lr=1e-9", "optimizer.weight_decay=0.0", "train.max_steps=1"))
    tensors = load_file(tmp_path / "run" / "adapter.safetensors")
    moved = {key.split("_")[1]: float(t.abs().max()) for key, t in tensors.items() if key.endswith("lora_up.weight")}
    # AdamW's first step is the rate times the sign of the gradient (up begins at zero).
    assert moved["unet"] == pytest.approx(0.01, rel=1e-3)
    assert moved["te"] == pytest.approx(1e-9, rel=1e-2)


@pytest.mark.parametrize(
    "override",
    [
        "train.mixed_precision=bf16",
        "train.gradient_checkpointing=true",
        "optimizer.name=adamw8bit",
        "data.cache=none",
    ],
)
def test_every_way_to_run_a_step_works(make_recipe, tmp_path, override):
    train(make_recipe(override, "train.max_steps=2", "schedule.name=cosine", "objective.min_snr_gamma=5.0"))
    tensors = load_file(tmp_path / "run" / "adapter.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_clipping_clips_what_the_optimizer_uses(make_recipe, tmp_path):
    # With a tiny norm AdamW's eps matters: the first update is lr × g / (|g| + eps), far below lr.
    train(make_recipe("optimizer.max_grad_norm=1e-12", "optimizer.weight_decay=0.0", "train.max_steps=1"))
    tensors = load_file(tmp_path / "run" / "adapter.safetensors")
    largest = max(float(t.abs().max()) for key, t in tensors.items() if key.endswith("lora_up.weight"))
    assert 0 < largest < 0.01 * 1e-12 / 1e-8
