"""An optimizer step makes no GPU wait: seen without one, on a device whose values cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from queue_device import Waits, on_meta, put_there, watched

from lora_kit.data import make_loader
from lora_kit.recipe import Recipe
from lora_kit.training.build import build_run
from lora_kit.training.folder import RunFolder
from lora_kit.training.metrics import NoMetrics
from lora_kit.training.one_step import Steps
from lora_kit.training.processes.launch import build_accelerator


def steps_watched(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, count: int = 3) -> list[str]:
    """What of `count` steps waits, but for the first: it makes the optimizer's state, and encodes captions."""
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
