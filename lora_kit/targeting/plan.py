"""What the rules picked: plain data, and its JSON form for plan.json and adapter headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from lora_kit.errors import TargetError
from lora_kit.recipe import TargetRule
from lora_kit.targeting.modules import ModuleInfo
from lora_kit.targeting.parts import Settings, part_shapes

PLAN_FORMAT = 1
"""Version of the JSON form."""


class Target(NamedTuple):
    """One module, and what it gets."""

    module: ModuleInfo
    rule: int
    """Index of the deciding rule in `TargetPlan.rules`."""
    method: str
    rank: int
    """0 for methods without one; so is `alpha`."""
    alpha: float
    """As the rule has it, or its default; see `effective_alpha`."""
    dropout: float
    lr_scale: float
    factor: int | None = None
    """LoKr's."""
    block_size: int = 0
    """OFT's and BOFT's, before it is fitted to the module."""
    stages: int = 0
    """BOFT's."""
    only: str = "all"
    """What of the module `diff` trains."""
    init: str = "default"
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    max_norm: float | None = None
    """Frobenius norm that ΔW may have; None: any."""

    @property
    def effective_alpha(self) -> float:
        """What, over the rank, is the update's scale: rsLoRA's alpha / √rank is √rank · alpha / rank."""
        return self.alpha * math.sqrt(self.rank) if self.method == "rslora" else self.alpha

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Trainable tensors by their neutral names. Raises TargetError if the method cannot be had for the module."""
        settings = Settings(self.rank, self.factor, self.block_size, self.stages, self.only)
        return part_shapes(self.method, self.module, settings)

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        if self.method == "full":
            return self.module.parameters
        return sum(math.prod(shape) for shape in self.shapes.values())


class PlanRule(NamedTuple):
    """A rule and where it stands."""

    path: str
    """Path in the recipe: `targets.1`. The rules of one preset share theirs."""
    preset: str | None
    """Name of the preset it comes from."""
    rule: TargetRule


class TargetPlan(NamedTuple):
    """What will be trained, in the module tree's order."""

    targets: tuple[Target, ...]
    rules: tuple[PlanRule, ...]
    base_parameters: dict[str, int]
    """Parameters of each component."""

    @property
    def trainable_parameters(self) -> int:
        """Sum over all targets."""
        return sum(target.parameters for target in self.targets)

    @property
    def methods(self) -> frozenset[str]:
        """Of all targets."""
        return frozenset(target.method for target in self.targets)


class _PlanFile(NamedTuple):
    format: int
    targets: tuple[Target, ...]
    rules: tuple[PlanRule, ...]
    base_parameters: dict[str, int]


_PLAN_FILE = TypeAdapter(_PlanFile)


def plan_to_json(plan: TargetPlan) -> dict[str, Any]:
    """The plan as JSON's own types, every field under its name; `plan_from_json` reads it back as an equal plan."""
    return {
        "format": PLAN_FORMAT,
        "base_parameters": dict(plan.base_parameters),
        "rules": [rule._asdict() | {"rule": rule.rule.model_dump()} for rule in plan.rules],
        "targets": [_target_to_json(target) for target in plan.targets],
    }


def plan_from_json(document: Mapping[str, Any]) -> TargetPlan:
    """Read what `plan_to_json` wrote. Raises TargetError if it is damaged or of another version."""
    if document.get("format") != PLAN_FORMAT:
        raise TargetError(f"got a plan of format {document.get('format')!r}; this version reads {PLAN_FORMAT}.")
    try:
        read = _PLAN_FILE.validate_python(dict(document))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise TargetError(f"the plan is damaged at `{where}`: {first['msg']}. Take it from the run again.") from error
    return TargetPlan(read.targets, read.rules, read.base_parameters)


def _target_to_json(target: Target) -> dict[str, Any]:
    return target._asdict() | {"module": target.module._asdict() | {"shape": list(target.module.shape)}}
