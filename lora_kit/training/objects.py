"""All objects of one training run, and what can be told of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import nn

from lora_kit.adapters import Update
from lora_kit.data import Flaw, TrainingSet
from lora_kit.data.records import name_some
from lora_kit.models import ModelBundle
from lora_kit.models.adapter_layouts import layout_for
from lora_kit.models.repeated_blocks import CompilePlan
from lora_kit.recipe import Recipe
from lora_kit.recipe.save import Layout
from lora_kit.targeting import TargetPlan, plan_to_json
from lora_kit.training.learned_tokens import LearnedTokens, token_notices
from lora_kit.training.objective import objective_notices, schedule_notices
from lora_kit.training.optimization.ema import WeightAverage
from lora_kit.training.optimization.max_norm import Limited
from lora_kit.training.precision import precision_notices
from lora_kit.training.prepared import PreparedData
from lora_kit.training.processes.launch import sharding_of
from lora_kit.training.quantised_base import QuantisedBase
from lora_kit.training.step import Learner
from lora_kit.training.validation.held_out import MeasuredSet, train_subset

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
    compiled: CompilePlan | None = None
    """What is compiled; None: nothing."""

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
        notices += precision_notices(self.recipe, self.accelerator.device)
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
        if self.compiled is not None:
            notices = [*notices, f"{self.compiled.line()}. The first step of each shape takes longer: it compiles."]
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
        return is_full(self.plan)

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter whose strength can be set; not in a full fine-tune, nor with tokens alone."""
        return bool(self.plan.targets) and not self.is_full

    @property
    def plan_document(self) -> dict[str, Any]:
        """What is trained, as JSON: what a checkpoint must agree with."""
        learned = {"tokens": self.tokens.sizes} if self.tokens is not None else {}
        return plan_to_json(self.plan) | learned


def is_full(plan: TargetPlan) -> bool:
    """Whether the networks' own weights are trained, so that the result is a whole model."""
    return any(target.method == "full" for target in plan.targets)
