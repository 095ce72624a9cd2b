"""What a rule gives the modules that it picks: the method and its settings, shared by rules and presets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_kit.recipe.base import Decay, Method, Positive, Problem, Section, idle, refuse

WITH_UP_AND_DOWN = ("lora", "rslora", "dora")
"""Methods made of a down and an up matrix."""
IN_PEFT_LAYERS = ("lora", "rslora", "dora")
"""Methods that diffusers' and PEFT's layouts hold."""
_WITH_RANK = (*WITH_UP_AND_DOWN, "loha", "lokr")
_TAKERS: dict[str, tuple[str, ...]] = {
    "rank": _WITH_RANK,
    "alpha": _WITH_RANK,
    "dropout": _WITH_RANK,
    "factor": ("lokr",),
    "block_size": ("oft", "boft"),
    "stages": ("boft",),
    "only": ("diff",),
    "init": WITH_UP_AND_DOWN,
    "rank_dropout": ("lora", "rslora", "loha", "lokr"),
    "module_dropout": (*_WITH_RANK, "oft", "boft", "diff"),
    "max_norm": ("lora", "rslora", "loha", "lokr", "diff"),
}
"""Key → the methods that it means something to."""


class MethodSection(Section):
    """A method and its settings."""

    method: Method = "lora"
    """`lora`: ΔW = alpha / rank · up · down (Hu et al. 2021). `rslora`: alpha / √rank instead (Kalajdzievski 2023).
    `dora`: lora, and each output's magnitude apart from its direction (Liu et al. 2024). `loha`: the elementwise
    product of two such pairs, of rank up to rank² (Hyeon-Woo et al. 2022). `lokr`: a Kronecker product (Yeh et al.
    2023). `oft`, `boft`: the weight's outputs turned by orthogonal blocks (Qiu et al. 2023, Liu et al. 2024). `diff`:
    the whole difference of the module's weight and bias, norms' too, kept in the adapter. `full`: the networks' own
    weights, and a whole model as the result."""
    rank: Positive = 16
    """Rank r of the update. Higher holds more detail and costs memory in proportion."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank (`rslora`: alpha / √rank). Default: alpha = rank, a scale of 1; `rslora`:
    √rank. A `lokr` whose second factor is whole is not scaled."""
    dropout: Decay = 0.0
    """Probability of dropping an input feature of the adapter while training."""
    factor: Positive | None = None
    """`lokr`: the first factor's sides are the largest divisors of the weight's that are at most this, and at most
    their square roots, the default. Smaller makes more parameters."""
    block_size: Annotated[int, Field(ge=2)] = 32
    """`oft`, `boft`: the blocks' side is the largest divisor of the outputs that is at most this. Larger turns more
    freely, and costs memory in proportion."""
    stages: Positive = 2
    """`boft`: butterfly stages; each mixes outputs twice as far apart as the one before."""
    init: Literal["default", "gaussian", "orthogonal", "pissa"] = "default"
    """How `lora`, `rslora` and `dora` begin. `default`: down Kaiming-uniform, up zero. `gaussian`: down normal with
    deviation 1 / rank. `orthogonal`: both drawn, in directions whose product is zero; an even rank. `pissa`: at the
    weight's principal singular vectors (Meng et al. 2024), which the adapter takes away again, so that the base
    stays the base: the file has twice the rank. Not for `dora`."""
    rank_dropout: Decay = 0.0
    """Probability of leaving out, while training, each of the r directions for a sample, the rest scaled up
    (`lora`, `rslora`; as sd-scripts), or each output of ΔW, without scaling (`loha`, `lokr`; as LyCORIS)."""
    module_dropout: Decay = 0.0
    """Probability of leaving the whole module's update out of a forward pass while training."""
    max_norm: Annotated[float, Field(gt=0)] | None = None
    """After each step, an update whose Frobenius norm is larger is scaled down to it (sd-scripts'
    `scale_weight_norms`, where 1 is usual)."""
    only: Literal["all", "weight", "bias"] = "all"
    """`diff`: train the weight's difference, the bias's, or both. With `bias`, modules without one are not picked."""
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the learning rate of the modules this rule decides."""

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> MethodSection:
        if not getattr(self, "exclude", False):
            refuse(type(self).__name__, [*_foreign(self), *_no_such_init(self)])
        return self


def _foreign(section: MethodSection) -> Iterator[Problem]:
    """Settings that are another method's."""
    for key, methods in _TAKERS.items():
        if section.method not in methods:
            allowed = ", ".join(methods)
            why = f"does nothing with `method: {section.method}`; it is for {allowed}. Remove it, or change the method."
            yield from idle(section, (key,), why)


def _no_such_init(section: MethodSection) -> Iterator[Problem]:
    if section.init == "orthogonal" and section.rank % 2:
        yield Problem(("rank",), f"got {section.rank}; `init: orthogonal` takes an even rank, two halves.")
    if section.init == "pissa" and section.method == "dora":
        yield Problem(("init",), "`pissa` takes part of the weight's direction away, which `dora` turns; use `lora`.")
    if section.init == "pissa" and section.max_norm is not None:
        said = "would scale down what `init: pissa` adds, but not what it takes away; remove one of the two."
        yield Problem(("max_norm",), said)
