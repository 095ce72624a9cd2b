"""Runs on pictures of several shapes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import lora_kit.training.validation.held_out as held_out_module
from lora_kit.data import collate
from lora_kit.training import train
from lora_kit.training.build import build_run
from lora_kit.training.processes.launch import build_accelerator
from lora_kit.training.step import training_step
from lora_kit.training.validation.held_out import draw_losses

ON = "data.buckets={step: 8, min_side: 8, max_side: 32}"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Seven captioned pictures; at 16 pixels two go to 32 × 8, one to 8 × 32, three to 16 × 16, and the last, which
    fills no 8 × 32, to the 8 × 8 of the next smaller resolution."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    shapes = [(32, 8), (8, 32), (32, 8), (16, 16), (20, 20), (30, 30), (8, 30)]
    for index, size in enumerate(shapes):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("red apple")
    return folder


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("short", ["wrap", "short"])
def test_the_learning_curve_does_not_depend_on_how_a_batch_is_cut(make_recipe, mixed, tmp_path, short):
    # Tolerance as of the same test on squares: rounding of sums of fp32 terms.
    curves = []
    for name, micro in {"whole": "null", "cut": "1"}.items():
        overrides = [ON, f"data.buckets.short={short}", "data.flip=true", f"train.micro_batch_size={micro}"]
        train(make_recipe(*overrides, "optimizer.lr=1e-4", name=name, pictures=mixed))
        curves.append(losses(tmp_path / name))
    assert len(curves[0]) == 4
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=0)


def test_a_resumed_run_is_bit_identical_to_one_never_stopped(make_recipe, mixed, tmp_path):
    train(make_recipe(ON, pictures=mixed))
    whole = digest(tmp_path / "run" / "adapter.safetensors")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    (tmp_path / "run" / "adapter.safetensors").unlink()
    train(make_recipe(ON, f"train.resume={checkpoint}", pictures=mixed))
    assert digest(tmp_path / "run" / "adapter.safetensors") == whole


def test_cached_and_uncached_latents_train_the_same(make_recipe, mixed, tmp_path):
    for name, cache in {"kept": "memory", "anew": "none"}.items():
        train(make_recipe(ON, "optimizer.lr=1e-4", f"data.cache={cache}", name=name, pictures=mixed))
    kept, anew = (torch.tensor(losses(tmp_path / name)) for name in ("kept", "anew"))
    torch.testing.assert_close(kept, anew, rtol=1e-5, atol=0)


def test_a_short_step_is_the_mean_of_its_own_samples(make_recipe, mixed):
    still = ("optimizer.lr=1e-30", "optimizer.weight_decay=0.0", "data.caption_dropout=0.0")
    recipe = make_recipe(ON, "data.buckets.short=short", *still, pictures=mixed)
    run = build_run(recipe, build_accelerator(recipe))
    size = recipe.data.batch_size
    step = next(step for step in range(9) if run.data.order.size_of(step) == 2)
    pair = [run.data[step * size], run.data[step * size + 1]]
    both = training_step(run.learner, [collate(pair)], step)
    single = [training_step(run.learner, [collate([sample._replace(step_samples=1)])], step).loss for sample in pair]
    # The weights stay (lr): the same terms in another order of summing, as for micro-batches.
    assert both.loss == pytest.approx(sum(single) / 2, rel=1e-5)


def test_a_process_without_a_sample_adds_nothing(make_recipe, mixed):
    recipe = make_recipe(ON, "optimizer.weight_decay=0.0", pictures=mixed)
    run = build_run(recipe, build_accelerator(recipe))
    before = [parameter.detach().clone() for parameter in run.learner.parameters]
    done = training_step(run.learner, [], 0)
    assert (done.loss, done.grad_norm) == (0.0, 0.0)
    assert all(torch.equal(new, old) for new, old in zip(run.learner.parameters, before, strict=True))


def test_held_out_pictures_are_measured_in_their_own_shapes(make_recipe, mixed, monkeypatch):
    recipe = make_recipe(ON, "train.max_steps=1", f"validation.held_out.path={mixed}")
    run = build_run(recipe, build_accelerator(recipe))
    assert run.held_out is not None
    pictures = run.held_out.pictures
    shapes = [pictures.plain(record).latent_mean.shape[1:] for record in range(7)]  # pyright: ignore
    assert [(2 * w, 2 * h) for h, w in shapes] == [pictures.places.sizes_of(record)[0] for record in range(7)]
    assert len(set(shapes)) == 4
    parts = (run.held_out, run.learner.objective, run.bundle, run.learner.conditions)
    found = draw_losses(*parts).flatten().tolist()
    monkeypatch.setattr(held_out_module, "_batches", lambda _: [[record] for record in range(7)])
    # One after the other: the results are in the records' order, whatever batches they were measured in.
    assert draw_losses(*parts).flatten().tolist() == pytest.approx(found, rel=1e-5)


def test_a_run_with_buckets_leaves_finite_weights(make_recipe, mixed, tmp_path):
    train(make_recipe(ON, "data.crop=random", "train.max_steps=2", pictures=mixed))
    tensors = load_file(tmp_path / "run" / "adapter.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
