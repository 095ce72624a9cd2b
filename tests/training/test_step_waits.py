"""An optimizer step makes no GPU wait: seen without one, on a device whose values cannot be read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from queue_device import META, Waits, on_meta, put_there, watched
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from lora_kit.data import loader as loader_module
from lora_kit.data import make_loader
from lora_kit.models.moving import moved
from lora_kit.recipe import Recipe
from lora_kit.training.build import build_run
from lora_kit.training.folder import RunFolder
from lora_kit.training.metrics import NoMetrics
from lora_kit.training.one_step import Steps
from lora_kit.training.processes.launch import build_accelerator


def steps_watched(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, count: int = 3) -> list[str]:
    """What of `count` steps waits, the first too, which makes the optimizer's state. Captions are encoded before."""
    accelerator = build_accelerator(recipe)
    run = build_run(recipe, accelerator)
    loader = make_loader(run.data, recipe, accelerator)
    batches = [next(loader) for _ in range(count)]
    captions = [caption for step in batches for batch in step for caption in batch.captions]
    if run.bundle.has_text:
        run.learner.conditions(captions)  # a frozen text encoder's states are kept on the CPU
    run = put_there(run)
    waits = watched(monkeypatch)
    with Steps(run, RunFolder(Path(recipe.output_dir)), NoMetrics()) as steps:
        for step, own in enumerate(batches):
            taken(steps, own, step, waits)
    assert on_meta(run.learner.parameters)
    moments = [value for state in run.learner.optimizer.state.values() for value in state.values()]
    assert moments
    assert on_meta(moments)
    return waits.found


def taken(steps: Steps, batches: Any, step: int, waits: Waits) -> None:
    with waits:
        steps.take(batches, step, 1.0, stop=False)


def of_base(base: Path, *overrides: str) -> tuple[str, ...]:
    return (f"model.base={base}", *overrides)


KINDS = {
    "plain": (),
    "micro-batches": ("train.micro_batch_size=3",),
    "averaged": ("train.ema_decay=0.9",),
    "limited norms": ('targets=[{match: "unet.**.attn*.to_{q,k}", rank: 4, max_norm: 0.01}]', "train.log_every=1"),
    "tokens": (
        "tokens=[{token: <t>, initializer: random, norm_decay: 0.1, until: 2}, {token: <u>, initializer: random}]",
        "data.trigger='<t> <u>'",
        "train.ema_decay=0.9",
    ),
    "text encoder": ("targets={preset: attention, rank: 2, text_encoder: true}",),
    "long captions": (
        "targets={preset: attention, rank: 2, text_encoder: true}",
        "data.captions.long=chunks",
        f"data.trigger='{'word ' * 90}'",
    ),
    "pyramid": ("objective.pyramid_levels=2",),
    "noise": (
        "objective.noise_offset=0.1",
        "objective.adaptive_noise_scale=0.1",
        "objective.input_perturbation=0.1",
        "objective.loss=huber",
        "objective.min_snr_gamma=5",
        "objective.timesteps={distribution: logit_normal, stratified: true}",
    ),
    "encoded in the step": ("data.cache=none",),
    "checkpointed": ("train.gradient_checkpointing=true",),
    "full": ("targets=[{match: 'unet.**', method: full}]",),
    "dropout": ("targets={preset: all, rank: 2, dropout: 0.1, rank_dropout: 0.1, module_dropout: 0.1}",),
} | {
    method: (f"targets={{match: 'unet.**.attn*.to_*', rank: 2, method: {method}}}",)
    for method in ("dora", "rslora", "loha", "lokr")
} | {
    method: (f"targets={{match: 'unet.**.attn*.to_*', method: {method}}}",)
    for method in ("oft", "boft", "diff")
}  # fmt: skip


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_a_step_waits_for_nothing(make_recipe, monkeypatch, overrides):
    assert steps_watched(make_recipe("save.every=0", "train.max_steps=9", *overrides), monkeypatch) == []


def test_masks_weights_and_the_bases_own_predictions_wait_for_nothing(
    make_recipe, make_picture_folder, picture_folder, tmp_path, monkeypatch
):
    masked = make_picture_folder(tmp_path / "masked", size=(16, 16))
    for index in range(4):
        Image.new("L", (16, 16), 128).save(masked / f"{index:03d}-mask.png")
    listed = f"[{{path: {masked}, mask_suffix: -mask}}, {{path: {picture_folder}, target: base, loss_weight: 0.5}}]"
    recipe = make_recipe(f"data.sources={listed}", "save.every=0", "train.max_steps=9")
    assert steps_watched(recipe, monkeypatch) == []


def test_a_step_with_latents_and_pictures_to_encode_waits_for_nothing(make_recipe, monkeypatch):
    found = mixed_batch(make_recipe("save.every=0", "train.max_steps=9"), monkeypatch)
    assert found == []


def mixed_batch(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What waits in a step of which two samples' latents are lost."""
    run = build_run(recipe, build_accelerator(recipe))
    (batch,) = next(make_loader(run.data, recipe, run.accelerator))
    kept = torch.tensor([True, False, True, False])
    assert batch.latent_mean is not None and batch.latent_std is not None
    own = batch._replace(
        is_latent=kept,
        latent_mean=batch.latent_mean[kept],
        latent_std=batch.latent_std[kept],
        pixels=torch.zeros(2, 3, 16, 16),
    )
    run.learner.conditions(batch.captions)
    waits = watched(monkeypatch)
    with Steps(put_there(run), RunFolder(Path(recipe.output_dir)), NoMetrics()) as steps:
        taken(steps, [own], 0, waits)
    return waits.found


@pytest.mark.parametrize("base", ["tiny_sd2_folder", "tiny_inpainting_folder", "tiny_text2im_folder"])
def test_no_other_family_waits(make_recipe, request, monkeypatch, base):
    folder = request.getfixturevalue(base)
    attention = "targets={preset: attention, rank: 2}"
    recipe = make_recipe("save.every=0", "train.max_steps=9", attention, base=folder)
    assert steps_watched(recipe, monkeypatch) == []


def test_super_resolution_waits_for_nothing(
    make_recipe, tiny_super_resolution_folder, make_picture_folder, tmp_path, monkeypatch
):
    pictures = make_picture_folder(tmp_path / "bare", size=(64, 64))
    own = ("targets={preset: attention, rank: 2}", "data.resolution=64", "data.caption_dropout=0")
    recipe = make_recipe(*own, "validation.prompts=[]", base=tiny_super_resolution_folder, pictures=pictures)
    assert steps_watched(recipe, monkeypatch) == []


def test_a_step_that_is_read_at_once_is_seen_to_be_read(make_recipe, monkeypatch):
    monkeypatch.setattr("queue_device.READS_LATE", False)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        steps_watched(make_recipe("save.every=0", "train.max_steps=9"), monkeypatch)


PLANTED = {
    "a copy that waits": (lambda x, y: y.to(META), "[2] copied to meta, waiting"),
    "a copy from ordinary memory": (lambda x, y: y.to(META, non_blocking=True), "not page-locked"),
    "a copy in place": (lambda x, y: x.copy_(y), "[2] copied to meta, waiting"),
    "a list of rows": (lambda x, y: x[[1, 0]], "indexed by a list"),
    "an index on the CPU": (lambda x, y: x[torch.tensor([1, 0])], "on the CPU among the device's"),
    "numbers": (lambda x, y: x.tolist(), "[2] copied to cpu, waiting"),
    "a tensor made of numbers": (lambda x, y: torch.tensor([1.0], device="meta"), "torch.tensor"),
    "a check of a solution": (lambda x, y: torch.linalg.solve(x[:, None] * x, x), "read by the host"),
    "a copy back": (lambda x, y: x.to("cpu"), "[2] copied to cpu, waiting"),
}


@pytest.mark.parametrize(("act", "said"), PLANTED.values(), ids=PLANTED)
def test_the_watch_sees(monkeypatch, act, said):
    waits = watched(monkeypatch)
    x, y = torch.empty(2, device=META), torch.zeros(2)
    with waits:
        act(x, y)
    (found,) = waits.found
    assert said in found


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, float, torch.Tensor.nonzero])
def test_what_reads_a_number_fails(monkeypatch, read):
    value = torch.empty((), device=META)
    with watched(monkeypatch), pytest.raises((NotImplementedError, RuntimeError)):
        read(value)
    assert moved(torch.zeros(2), META).device == META


def test_batches_are_page_locked_for_a_gpu_and_keep_their_form(make_recipe, monkeypatch):
    recipe = make_recipe()
    run = build_run(recipe, build_accelerator(recipe))
    asked = list[bool]()
    made = loader_module.DataLoader

    def watch(*arguments: Any, pin_memory: bool, **options: Any) -> Any:
        asked.append(pin_memory)
        return made(*arguments, **options)

    monkeypatch.setattr(loader_module, "DataLoader", watch)
    for kind in ("cpu", "cuda"):
        processes: Any = SimpleNamespace(num_processes=1, process_index=0, device=torch.device(kind))
        (batch,) = next(make_loader(run.data, recipe, processes))
    assert asked == [False, True]
    locked = list[Tensor]()
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *_: locked.append(tensor) or tensor)
    hole = torch.ones(1, 4, 4)
    whole = batch._replace(holes=[None, hole], masks=torch.ones(4, 8, 8))
    pinned = pin_memory(whole)
    assert isinstance(pinned, type(batch))
    assert (pinned.captions, pinned.ids, pinned.from_base) == (batch.captions, batch.ids, batch.from_base)
    own = [one for one in (*whole, hole) if isinstance(one, Tensor)]
    assert {id(one) for one in locked} == {id(one) for one in own}
