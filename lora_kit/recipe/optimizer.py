"""The `optimizer:` section, and which optimizers have a name of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, cast

from pydantic import Field, model_validator

from lora_kit.errors import did_you_mean
from lora_kit.recipe.base import Decay, Problem, Section, refuse, shown

_ALL = ("betas", "weight_decay", "eps")
PRODIGY_LEAST_LR = 0.01
"""Below it `lr` was surely meant as a plain learning rate: Prodigy's `lr` multiplies the one that it finds."""


class KnownOptimizer(NamedTuple):
    """An optimizer that a recipe can name in one word."""

    place: str
    """Where its class is: `module.Class`."""
    lr: float
    """Default of `optimizer.lr`."""
    state_bytes: float
    """What it keeps of each trained weight, bytes; 8-bit moments without their scales, factored ones nothing."""
    takes: tuple[str, ...] = _ALL
    """Fields of the section that are arguments of its own."""
    package: str = ""
    """The package that brings it, where it is no dependency of lora_kit's."""

    @property
    def is_schedule_free(self) -> bool:
        """Whether it averages weights instead of lowering the rate (Defazio et al. 2024)."""
        return self.package == "schedulefree"


OPTIMIZERS: dict[str, KnownOptimizer] = {
    "adamw": KnownOptimizer("torch.optim.AdamW", 1e-4, 8),
    "adam": KnownOptimizer("torch.optim.Adam", 1e-4, 8),
    "sgd": KnownOptimizer("torch.optim.SGD", 1e-2, 0, ("weight_decay",)),
    "adamw8bit": KnownOptimizer("bitsandbytes.optim.AdamW8bit", 1e-4, 2),
    "lion8bit": KnownOptimizer("bitsandbytes.optim.Lion8bit", 1e-5, 1, ("betas", "weight_decay")),
    "paged_adamw": KnownOptimizer("bitsandbytes.optim.PagedAdamW", 1e-4, 8),
    "paged_adamw8bit": KnownOptimizer("bitsandbytes.optim.PagedAdamW8bit", 1e-4, 2),
    "paged_lion8bit": KnownOptimizer("bitsandbytes.optim.PagedLion8bit", 1e-5, 1, ("betas", "weight_decay")),
    "adafactor": KnownOptimizer("transformers.optimization.Adafactor", 1e-4, 0, ("weight_decay",)),
    "prodigy": KnownOptimizer("prodigyopt.Prodigy", 1.0, 16, package="prodigyopt"),
    "adamw_schedulefree": KnownOptimizer("schedulefree.AdamWScheduleFree", 2.5e-4, 8, package="schedulefree"),
    "radam_schedulefree": KnownOptimizer("schedulefree.RAdamScheduleFree", 2.5e-4, 8, package="schedulefree"),
    "sgd_schedulefree": KnownOptimizer(
        "schedulefree.SGDScheduleFree", 1e-2, 4, ("weight_decay",), package="schedulefree"
    ),
}
"""Every name but `package.Class`."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_OWN_FIELDS = {"lr": "optimizer.lr", "params": "targets"}


class OptimizerSection(Section):
    """How weights are updated."""

    name: str = "adamw"
    """`adamw`, `adam`, `sgd`: torch's, fused. `adamw8bit`, `lion8bit`: bitsandbytes', a quarter of the memory or less;
    `paged_…` of them lets it overflow to the CPU's memory and needs a CUDA GPU. `adafactor`: next to no memory.
    `prodigy` finds its own rate: leave `lr` at 1. `adamw_schedulefree`, `radam_schedulefree`, `sgd_schedulefree`: no
    schedule needed. Or `package.Class`, any torch optimizer that is installed."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of the UNet's modules. Default by `name`: 1e-4 for adamw, adam, adafactor and a class of your own,
    1e-5 for Lion (a third to a tenth of AdamW's, Chen et al. 2023), 2.5e-4 schedule-free, 1e-2 for sgd, 1 for prodigy,
    whose own estimate it multiplies."""
    text_encoder_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the text encoder's modules. Default: half of `lr`."""
    token_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the vectors of `tokens`. They decay as all weights do. Default: 5e-4; with prodigy, `lr`."""
    lr_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+ (Hayou et al. 2024): the up matrices' rate over the down matrices', which have the rate above. The paper's
    choice is 16, with `lr` a few times lower than without. Default: both the same."""
    block_lr: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Factors on the rates by glob over the trained modules, such as `{"unet.down_blocks.**": 0.5}`; the last that
    matches a module counts."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] | None = None
    """Decay of the first and second moments. Default: the optimizer's own, 0.9 and 0.999 in AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Decay of the weights. Default: the optimizer's own: 0.01 in AdamW, 0 in most others."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """The denominator's floor. Default: the optimizer's own, 1e-8 in AdamW."""
    args: dict[str, Any] = Field(default={})
    """Further arguments of the optimizer's class, by its own names, such as `{momentum: 0.9}` for sgd or
    `{d_coef: 2.0}` for prodigy. A list stands for a tuple."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global 2-norm. 0 does not clip."""

    @model_validator(mode="before")
    @classmethod
    def _own_rate(cls, values: object) -> object:
        """`lr` where it is not written: what suits the optimizer."""
        if not isinstance(values, dict) or "lr" in values:
            return cast("object", values)
        given = cast("dict[str, Any]", values)
        name = given.get("name")
        known = OPTIMIZERS.get(name) if isinstance(name, str) else None
        return {**given, "lr": known.lr} if known else given

    @model_validator(mode="after")
    def _agrees(self) -> OptimizerSection:
        refuse("OptimizerSection", _problems(self))
        return self

    @property
    def known(self) -> KnownOptimizer | None:
        """What is known of the optimizer; None of a `package.Class`."""
        return OPTIMIZERS.get(self.name)

    @property
    def is_schedule_free(self) -> bool:
        """Whether it is one of the schedule-free family, named in one word or by its class."""
        return self.name.startswith("schedulefree.") or (self.known is not None and self.known.is_schedule_free)

    @property
    def is_prodigy(self) -> bool:
        """Whether it is Prodigy, whose `lr` is a factor."""
        return self.name in ("prodigy", OPTIMIZERS["prodigy"].place)

    def given(self) -> dict[str, Any]:
        """The class's arguments that the recipe names, but for the rates."""
        fields = {key: getattr(self, key) for key in _ALL if getattr(self, key) is not None}
        return fields | {key: _tuples(value) for key, value in self.args.items()}


def _problems(section: OptimizerSection) -> Iterator[Problem]:
    if section.known is None and not _DOTTED.fullmatch(section.name):
        said = f"got {shown(section.name)}; allowed: {', '.join(OPTIMIZERS)}, or package.Class."
        yield Problem(("name",), said + did_you_mean(section.name.lower(), OPTIMIZERS))
    for key in _ALL if section.known else ():
        if getattr(section, key) is not None and section.known and key not in section.known.takes:
            other = " Its own `eps` is a pair: `args: {eps: [1e-30, 1e-3]}`." if section.name == "adafactor" else ""
            yield Problem((key,), f"`{section.name}` has no single `{key}`; remove it.{other}")
    for key in section.args:
        if key in _OWN_FIELDS:
            yield Problem(("args", key), f"is set by `{_OWN_FIELDS[key]}`; write it there.")
        elif key in _ALL and getattr(section, key) is not None:
            yield Problem(("args", key), f"is there twice, here and as `optimizer.{key}`; keep one.")
    if section.is_prodigy and section.lr < PRODIGY_LEAST_LR:
        said = f"got {section.lr:g}; Prodigy finds the rate itself, and `lr` multiplies what it finds: write 1.0"
        yield Problem(("lr",), f"{said} (at least {PRODIGY_LEAST_LR:g}), or remove it.")
    if section.name == "adafactor" and section.args.get("relative_step"):
        said = "`relative_step: true` lets Adafactor ignore every learning rate of the recipe; remove it"
        yield Problem(("args", "relative_step"), f"{said}, and set `optimizer.lr`.")


def _tuples(value: Any) -> Any:
    """YAML has no tuples; torch's optimizers expect them (`betas`)."""
    return tuple(_tuples(part) for part in cast("list[Any]", value)) if isinstance(value, list) else value
