"""A step's memory as it is reckoned beforehand, against what a real one keeps and holds, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from lora_kit.recipe import Recipe, load_recipe
from lora_kit.targeting import make_plan, module_tree
from lora_kit.targeting.quantised import quantised_layers
from lora_kit.training.build import build_run
from lora_kit.training.objects import Run
from lora_kit.training.probe import made_up, stand_in_data
from lora_kit.training.reckoning.fake_step import Activations, reckon
from lora_kit.training.reckoning.live_bytes import LiveBytes, saved_bytes
from lora_kit.training.reckoning.scratch import cpu_scratch
from lora_kit.training.sizes import micro_batch

ALL = "targets={preset: all, rank: 4, text_encoder: true}"
BF16 = "train.mixed_precision=bf16"
CHECKPOINTS = "train.gradient_checkpointing=true"
RECIPE = """
model: {{base: {base}}}
targets: {{preset: attention, rank: 4}}
data: {{sources: [{{path: {pictures}}}], resolution: 32, batch_size: 3}}
output_dir: out
"""


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _held(run: Run) -> Activations:
    """What a real micro-batch keeps and holds; its loss is the one that is reckoned."""
    recipe, bundle = run.recipe, run.bundle
    weights = [value for network in bundle.networks for value in [*network.parameters(), *network.buffers()]]
    batch = made_up(run, run.accelerator)[0]
    condition: Any = run.learner.conditions(batch.captions)  # a frozen encoder's states are kept from here on
    with LiveBytes(weights, cpu_scratch) as live:
        mean: Any = batch.latent_mean
        noisy = mean + 1
        half = recipe.train.mixed_precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=half), saved_bytes(weights) as saved:
            condition = run.learner.conditions(batch.captions)
            times = torch.zeros(len(noisy), dtype=torch.int64)
            predicted = bundle.family.predict(bundle, noisy, times, condition)
            loss = (predicted.float() - (mean - 1)).square().mean()
        kept = sum(saved.values())
        loss.backward()
    gradients = [weight.grad for weight in run.trainable.values() if weight.grad is not None]
    return Activations(kept, live.peak, sum(_bytes(gradient) for gradient in gradients))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("base", ["tiny_sd1_folder", "tiny_sd2_folder", "tiny_text2im_folder"])
@pytest.mark.parametrize(
    "options", [(), (BF16, ALL), pytest.param((BF16, CHECKPOINTS), marks=pytest.mark.slow), (CHECKPOINTS, ALL)], ids=str
)
def test_what_is_kept_is_what_a_real_step_keeps(
    base: str, options: tuple[str, ...], request: pytest.FixtureRequest, picture_folder: Path, tmp_path: Path
) -> None:
    recipe = _recipe(request.getfixturevalue(base), picture_folder, tmp_path, options)
    run = build_run(recipe, _accelerator(recipe), resumes=True, data=stand_in_data(recipe))
    found, real = reckon(recipe, run.plan), _held(run)
    assert found.saved == real.saved > 0
    assert found.gradients == real.gradients
    # Beside that, the latents that the loss is made of and a caption's ids: a few tensors of the latents' size.
    latents = micro_batch(recipe) * 4 * 16 * 16 * 4
    states = 3 * 77 * 64 * 4
    assert abs(found.peak - real.peak) <= 4 * latents + 4 * states


@pytest.mark.parametrize(
    "options",
    [
        ("targets={preset: attention, method: full}",),
        ("targets={preset: attention, method: loha, rank: 2}", BF16),
        ("targets={preset: attention, method: dora, rank: 2}", BF16),
        ("targets={preset: attention, init: pissa, rank: 2}",),
        ("targets={preset: all, method: lokr, rank: 2}", CHECKPOINTS),
        ("model.quantize=int8",),
        ("model.quantize=nf4", BF16, CHECKPOINTS),
        ('tokens=[{token: "<toy>", initializer: cat}]', "targets=none", 'data.trigger="<toy>"'),
        ("data.cache=none",),
        ("train.micro_batch_size=1",),
    ],
    ids=str,
)
def test_every_kind_of_recipe_is_reckoned(
    options: tuple[str, ...], tiny_sd1_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    found = _reckoned(_recipe(tiny_sd1_folder, picture_folder, tmp_path, options))
    assert 0 < found.saved <= found.peak
    assert found.gradients > 0


@pytest.mark.parametrize("base", ["tiny_inpainting_folder", "tiny_super_resolution_folder"])
def test_bases_that_are_given_more_than_latents(
    base: str, request: pytest.FixtureRequest, picture_folder: Path, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    match = "targets=[{match: 'unet.**.to_{q,k,v}', rank: 2}]"
    assert _reckoned(_recipe(folder, picture_folder, tmp_path, (match, "data.resolution=64"))).saved > 0


def test_checkpointing_and_smaller_batches_keep_less(
    tiny_sd1_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    def reckoned(*options: str) -> Activations:
        return _reckoned(_recipe(tiny_sd1_folder, picture_folder, tmp_path, options))

    plain, one = reckoned(), reckoned("train.micro_batch_size=1")
    assert reckoned(CHECKPOINTS).saved < plain.saved
    assert one.saved < plain.saved
    assert one.peak > reckoned("data.batch_size=1").peak  # the gradients of the micro-batches before


def test_live_bytes_are_those_of_storages_not_of_views() -> None:
    with LiveBytes() as live:
        whole = torch.zeros(1000)
        view = whole[:10]
        assert live.live == 4000
        other = whole + 1
        del other
        assert (live.live, live.peak) == (4000, 8000)
        del whole
        assert live.live == 4000  # the view holds it
        del view
    assert live.live == 0


def test_weights_are_not_counted_as_kept() -> None:
    layer = nn.Linear(8, 8)
    x = torch.ones(2, 8, requires_grad=True)
    with saved_bytes(layer.parameters()) as saved:
        made = layer(x).square()
        assert sorted(saved.values()) == [64, 64]  # the linear layer's input, and the square's
        del made
        assert list(saved.values()) == [64]  # x lives on


def _recipe(base: Path, pictures: Path, place: Path, options: tuple[str, ...]) -> Recipe:
    path = place / "recipe.yaml"
    path.write_text(RECIPE.format(base=base, pictures=pictures))
    return load_recipe(path, options)


def _reckoned(recipe: Recipe) -> Activations:
    from lora_kit.models import skeleton

    tree = module_tree(skeleton(recipe.model).components)
    plan = make_plan(recipe.targets, tree)
    return reckon(recipe, plan, quantised_layers(recipe.model.quantize, tree, plan))


def _accelerator(recipe: Recipe) -> Accelerator:
    return Accelerator(cpu=True, mixed_precision=recipe.train.mixed_precision)
