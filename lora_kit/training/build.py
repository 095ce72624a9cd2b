"""Recipe → everything a run needs. Each object is built from its own section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from lora_kit.adapters import Update, inject, read_raw, trainable_parameters
from lora_kit.adapters.state import adaptable_modules
from lora_kit.data import Flaw, TrainingSet
from lora_kit.data.records import name_some
from lora_kit.models import ModelBundle, base_hash, load_bundle
from lora_kit.models.adapter_layouts import layout_for
from lora_kit.models.text_models import checkpoint_activations
from lora_kit.progress import no_progress, progress
from lora_kit.recipe import Recipe
from lora_kit.recipe.save import Layout
from lora_kit.targeting import TargetPlan, make_plan, module_tree, plan_to_json
from lora_kit.targeting.quantised import quantised_layers
from lora_kit.training.checkpoints import named_trainables
from lora_kit.training.conditions import Conditions
from lora_kit.training.ema import WeightAverage
from lora_kit.training.held_out import MeasuredSet, train_subset
from lora_kit.training.launch import sharding_of
from lora_kit.training.learned_tokens import LearnedTokens, start_tokens, token_notices
from lora_kit.training.max_norm import Limited, limited_modules
from lora_kit.training.objective import adopt_schedule, build_objective, objective_notices, schedule_notices
from lora_kit.training.optimizers import build_optimizer, parameter_groups, up_matrices
from lora_kit.training.precision import base_dtype
from lora_kit.training.prepared import PreparedData, place_networks, prepare_data
from lora_kit.training.quantised_base import QuantisedBase, exact_losses, quantise_base
from lora_kit.training.sharding import shard
from lora_kit.training.start import starting_updates
from lora_kit.training.step import Learner

ADAPTER = "default"
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
    prepared: PreparedData
    trainable: dict[str, nn.Parameter]
    average: WeightAverage
    learner: Learner
    base_hash: str
    """Of the untrained networks; empty for a full fine-tune, whose result is a whole model."""
    start: dict[str, Update] | None = None
    """What of `model.adapter` is to be put in before the first step; None: nothing."""
    limited: Sequence[Limited] = ()
    """Modules whose updates are kept below a norm."""
    quantised: QuantisedBase | None = None
    """What `model.quantize` did; None: nothing."""
    tokens: LearnedTokens | None = None
    """New words whose vectors are trained; None: none."""

    @property
    def data(self) -> TrainingSet:
        """What is trained on."""
        return self.prepared.training

    @property
    def held_out(self) -> MeasuredSet | None:
        """The held-out pictures, and how they are measured."""
        section, pictures = self.recipe.validation, self.prepared.held_out
        if pictures is None:
            return None
        return MeasuredSet(pictures, tuple(range(pictures.record_count)), section.held_out_timesteps, section.seed)

    @property
    def train_subset(self) -> MeasuredSet | None:
        """As many training pictures, measured in the same way."""
        section, held_out = self.recipe.validation, self.prepared.held_out
        if held_out is None or not section.train_subset:
            return None
        records = train_subset(self.data, held_out.record_count, section.seed)
        return MeasuredSet(self.data, records, section.held_out_timesteps, section.seed, "train-subset")

    @property
    def skipped(self) -> list[Flaw]:
        """Pictures of the training and held-out sets that cannot be used."""
        held_out = self.prepared.held_out
        return [*self.data.skipped, *(held_out.skipped if held_out is not None else [])]

    @property
    def notices(self) -> list[str]:
        """What the user should be told once about data and targets."""
        sets = [data for data in (self.data, self.prepared.held_out) if data is not None]
        notices = [*self.prepared.notices, *(notice for data in sets for notice in data.notices)]
        notices += [*schedule_notices(self.bundle), *objective_notices(self.learner.objective)]
        if self.skipped:
            names = name_some([flaw.id for flaw in self.skipped])
            notices = [
                *notices,
                f"{len(self.skipped)} pictures cannot be used and are skipped: {names}. More at the end.",
            ]
        if self.accelerator.num_processes > 1:
            notices = [f"{self.accelerator.num_processes} processes share each step's pictures.", *notices]
        if self.quantised is not None:
            notices = [*notices, self.quantised.line()]
        if self.tokens is not None:
            notices = [*notices, *token_notices(self.tokens, self.recipe, self.data)]
        if len({target.alpha for target in self.plan.targets}) > 1:
            notices = [*notices, MIXED_ALPHAS]
        return notices

    @property
    def layout(self) -> Layout:
        """Layout of the adapter's file. Raises RecipeError where the family or the methods have it not."""
        return layout_for(self.recipe.save, self.bundle.family.name, self.plan.methods)

    @property
    def is_sharded(self) -> bool:
        """Whether the networks' weights are spread over the processes (FSDP)."""
        return sharding_of(self.accelerator) is not None

    @property
    def is_full(self) -> bool:
        """Whether the networks' own weights are trained, not adapters."""
        return _is_full(self.plan)

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter whose strength can be set; not in a full fine-tune, nor with tokens alone."""
        return bool(self.plan.targets) and not self.is_full

    @property
    def plan_document(self) -> dict[str, Any]:
        """What is trained, as JSON: what a checkpoint must agree with."""
        learned = {"tokens": self.tokens.sizes} if self.tokens is not None else {}
        return plan_to_json(self.plan) | learned


def build_run(recipe: Recipe, accelerator: Accelerator, resumes: bool = False, data: PreparedData | None = None) -> Run:
    """Load, plan, encode the data, inject, and make the optimizer.

    resumes: a checkpoint's weights follow, so that `model.adapter` need not be there any more. data: what is there in
    place of the recipe's own.
    """
    file = Path(recipe.model.adapter) if recipe.model.adapter and not resumes else None
    raw = read_raw(file) if file else None
    bundle = load_bundle(recipe.model, dtype=base_dtype(recipe), seed=recipe.seed)
    bundle.family = bundle.family.for_recipe(recipe)
    adopt_schedule(recipe.objective, bundle)
    tree = module_tree(bundle.components)
    plan = make_plan(recipe.targets, tree)
    layout_for(recipe.save, bundle.family.name, plan.methods)  # what cannot be written is refused now
    few_bits = quantised_layers(recipe.model.quantize, tree, plan)
    modules, family = adaptable_modules(bundle.components), bundle.family.name
    start = starting_updates(file, raw, modules, plan, family) if file and raw else None
    hashed = "" if _is_full(plan) else base_hash(bundle)
    trains_text = bool(recipe.tokens) or any(target.module.component == "text_encoder" for target in plan.targets)
    tokens = start_tokens(bundle, recipe.tokens, recipe.seed) if recipe.tokens else None
    bar = progress if accelerator.is_main_process else no_progress
    data = data or prepare_data(recipe, bundle, trains_text, accelerator, bar)
    sharding = sharding_of(accelerator)
    quantised = None
    if few_bits.modules:  # before the networks are placed, so that the device never holds them whole
        exact = [] if resumes else exact_losses(recipe, bundle, data, trains_text, accelerator)
        make_trainable(recipe, bundle, plan)
        quantised = quantise_base(bundle.components, few_bits, accelerator.device, exact)
    place_networks(bundle, data, trains_text, accelerator.device, sharded=sharding is not None)
    if quantised is None:
        make_trainable(recipe, bundle, plan)
    if tokens is not None:
        tokens.unfreeze(0)  # injecting froze all of the text encoder
    if sharding is not None:  # a frozen text encoder runs where a caption is new, so not everywhere at once
        names = ("unet", "text_encoder") if trains_text else ("unet",)
        shard({name: bundle.components[name] for name in names}, sharding, accelerator.device)
    trainable = named_trainables(bundle.components)
    by_module = trainable_parameters(bundle.components, plan)
    groups = parameter_groups(plan, by_module, recipe.optimizer, up_matrices(trainable))
    groups += tokens.groups(recipe.optimizer) if tokens is not None else []
    learner = Learner(
        accelerator=accelerator,
        bundle=bundle,
        objective=build_objective(recipe.objective, bundle),
        conditions=Conditions(bundle, trains_text, recipe.data.captions.long, data.texts),
        optimizer=accelerator.prepare(build_optimizer(groups, recipe)),
        parameters=list(trainable.values()),
        max_grad_norm=recipe.optimizer.max_grad_norm,
        seed=recipe.seed,
    )
    average = WeightAverage(trainable, recipe.train, learner.optimizer.optimizer)
    limited = limited_modules(plan, by_module)
    return Run(
        recipe, accelerator, bundle, plan, data, trainable, average, learner, hashed, start, limited, quantised, tokens
    )


def make_trainable(recipe: Recipe, bundle: ModelBundle, plan: TargetPlan) -> None:
    """What the plan picked, trainable in fp32, in the networks where they lie."""
    # Convolutions over channels-last memory measured 10 % faster on a CPU; numbers and names stay the same.
    bundle.unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (stub lacks the overload)
    if plan.targets:
        inject(bundle.components, plan, adapter_name=ADAPTER, seed=recipe.seed)
    if recipe.train.gradient_checkpointing:
        bundle.unet.enable_gradient_checkpointing()
        if bundle.has_text:
            checkpoint_activations(bundle.text_encoder)
    set_training(bundle, True)


def _is_full(plan: TargetPlan) -> bool:
    return any(target.method == "full" for target in plan.targets)


def set_training(bundle: ModelBundle, training: bool) -> None:
    """Train or eval mode of the networks that are trained (dropout is the only difference)."""
    for module in bundle.components.values():
        module.train(training)
