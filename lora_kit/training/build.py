"""Recipe → everything a run needs. Each object is built from its own section."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from lora_kit.adapters import inject, trainable_parameters
from lora_kit.data import TrainingSet, cache_latents, open_training_set, plain_section
from lora_kit.errors import RecipeError
from lora_kit.models import ModelBundle, base_hash, load_bundle
from lora_kit.progress import ProgressBar, no_progress, progress
from lora_kit.recipe import DataSection, Recipe
from lora_kit.targeting import TargetPlan, make_plan, module_tree
from lora_kit.training.checkpoints import named_trainables
from lora_kit.training.conditions import Conditions
from lora_kit.training.ema import WeightAverage
from lora_kit.training.held_out import HeldOut
from lora_kit.training.objective import build_objective
from lora_kit.training.optimizers import build_optimizer, parameter_groups
from lora_kit.training.precision import base_dtype
from lora_kit.training.step import Learner

ADAPTER = "default"
ENCODE_BATCH = 8
MIXED_ALPHAS = (
    "The rules give modules different alphas. diffusers (seen in 0.42) drops an attention layer's alpha unless it is "
    "the file's commonest, and then draws something else; lora_kit reads it right. For diffusers use one alpha."
)


class Run(NamedTuple):
    """All objects of one training run."""

    recipe: Recipe
    accelerator: Accelerator
    bundle: ModelBundle
    plan: TargetPlan
    data: TrainingSet
    held_out: HeldOut | None
    trainable: dict[str, nn.Parameter]
    average: WeightAverage
    learner: Learner
    base_hash: str
    """Of the untrained networks; empty for a full fine-tune, whose result is a whole model."""

    @property
    def notices(self) -> list[str]:
        """What the user should be told once about data and targets."""
        notices = self.data.notices + (self.held_out.pictures.notices if self.held_out else [])
        if self.accelerator.num_processes > 1:
            notices = [f"{self.accelerator.num_processes} processes share each step's pictures.", *notices]
        if len({target.alpha for target in self.plan.targets}) > 1:
            notices = [*notices, MIXED_ALPHAS]
        return notices

    @property
    def is_full(self) -> bool:
        """Whether the networks' own weights are trained, not adapters."""
        return self.plan.targets[0].method == "full"


def build_run(recipe: Recipe, accelerator: Accelerator) -> Run:
    """Load, plan, inject, and make optimizer and data."""
    bundle, plan, hashed = build_model(recipe, accelerator.device)
    bar = progress if accelerator.is_main_process else no_progress
    data = build_data(recipe.data, recipe.seed, bundle, bar)
    held_out = build_held_out(recipe, bundle, bar)
    trainable = named_trainables(bundle.components)
    trains_text = any(target.module.component == "text_encoder" for target in plan.targets)
    groups = parameter_groups(plan, trainable_parameters(bundle.components, plan), recipe.optimizer)
    learner = Learner(
        accelerator=accelerator,
        bundle=bundle,
        objective=build_objective(recipe.objective, bundle),
        conditions=Conditions(bundle, trains_text, recipe.data.captions.long),
        optimizer=accelerator.prepare(build_optimizer(groups, recipe.optimizer)),
        parameters=list(trainable.values()),
        max_grad_norm=recipe.optimizer.max_grad_norm,
        seed=recipe.seed,
    )
    average = WeightAverage(trainable, recipe.train.ema_decay)
    return Run(recipe, accelerator, bundle, plan, data, held_out, trainable, average, learner, hashed)


def build_model(recipe: Recipe, device: torch.device) -> tuple[ModelBundle, TargetPlan, str]:
    """The base on its device, with what the plan picked made trainable in fp32; and the base's hash."""
    bundle = load_bundle(recipe.model, dtype=base_dtype(recipe), seed=recipe.seed)
    plan = make_plan(recipe.targets, module_tree(bundle.components))
    hashed = "" if plan.targets[0].method == "full" else base_hash(bundle)
    networks: list[nn.Module] = [bundle.unet, bundle.vae, bundle.text_encoder]
    for network in networks:
        network.to(device)
    # Convolutions over channels-last memory measured 10 % faster on a CPU; numbers and names stay the same.
    bundle.unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (stub lacks the overload)
    inject(bundle.components, plan, adapter_name=ADAPTER, seed=recipe.seed)
    if recipe.train.gradient_checkpointing:
        bundle.unet.enable_gradient_checkpointing()
        bundle.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    set_training(bundle, True)
    return bundle, plan, hashed


def build_data(section: DataSection, seed: int, bundle: ModelBundle, bar: ProgressBar) -> TrainingSet:
    """The training set, its latents encoded once where the recipe allows it, otherwise its pictures checked."""
    refuse_unread(section)
    data = open_training_set(section, seed, bar=bar)
    cache_latents(data, lambda pixels: bundle.family.encode(bundle, pixels.to(bundle.device)), ENCODE_BATCH, bar)
    captions = data.longest_captions() if section.captions.long == "cut" else []
    cut = bundle.family.truncated(bundle, captions) if captions else 0
    if cut:
        data.notices.append(f"{cut} of {len(captions)} captions are longer than the text encoder reads; cut off.")
    return data


def refuse_unread(section: DataSection) -> None:
    """Raise RecipeError for what the data room reads but training does not follow yet: it would be dropped silently."""
    masked = section.alpha == "mask" or any(source.alpha == "mask" for source in section.sources)
    weighted = any(source.loss_weight != 1.0 for source in section.sources)
    unread = {
        "data.cache: disk (filled by `lora-kit cache`); use memory, or none": section.cache == "disk",
        "alpha: mask; name a colour": masked,
        "loss_weight of a source; use its weight or repeats": weighted,
    }
    named = [name for name, is_set in unread.items() if is_set]
    if named:
        raise RecipeError(f"Training does not follow yet: {'. '.join(named)}.")


def build_held_out(recipe: Recipe, bundle: ModelBundle, bar: ProgressBar) -> HeldOut | None:
    """The held-out set: no repeats, nothing random, and with buckets each picture in its own."""
    validation = recipe.validation
    if validation.held_out is None:
        return None
    section = plain_section(recipe.data, validation.held_out)
    return HeldOut(build_data(section, 0, bundle, bar), validation.held_out_timesteps, validation.seed)


def set_training(bundle: ModelBundle, training: bool) -> None:
    """Train or eval mode of the networks that are trained (dropout is the only difference)."""
    for module in bundle.components.values():
        module.train(training)
