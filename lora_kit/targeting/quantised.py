"""Which layers of a frozen base are quantised, and their bytes before and after. From names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lora_kit.errors import TargetError
from lora_kit.targeting.modules import ModuleInfo
from lora_kit.targeting.plan import TargetPlan

SMALLEST = 4096
"""Elements of the smallest weight that is quantised: below it, nf4's tables (1.1 kB a layer) eat up the gain."""
_NF4_BLOCK = 64  # weights under one scale, itself 8 bits wide
_NF4_GROUP = 256  # scales under one fp32 scale: Dettmers et al. 2023, double quantisation
_NF4_TABLES = (16 + 256 + 1) * 4  # the 16 values, the scales' 256, and the scales' mean, fp32, of each layer
_SHOWN = 10


class Quantised(NamedTuple):
    """The layers that are quantised, and what their weights take."""

    modules: list[ModuleInfo]
    kind: str
    """`nf4` or `int8`."""

    def before(self, width: int) -> int:
        """Bytes of the weights, biases not counted, held in `width` bytes each."""
        return sum(math.prod(module.shape) for module in self.modules) * width

    @property
    def after(self) -> int:
        """Bytes of the quantised weights with their scales and tables."""
        return sum(quantised_bytes(module.shape, self.kind) for module in self.modules)


def quantised_layers(kind: str, tree: Sequence[ModuleInfo], plan: TargetPlan) -> Quantised:
    """The linear layers, of `SMALLEST` elements at least, of the networks that a step differentiates through.

    That is the UNet; the text encoder only where rules train it: otherwise its states can be kept (`data.cache:
    disk`), made once by the exact one. Layers with a LoRA are quantised too. Convolutions, norms and embeddings stay:
    bitsandbytes has no such layers. `kind`: `none` gives an empty list. Raises TargetError where a rule trains such a
    layer's own weight.
    """
    if kind == "none":
        return Quantised([], kind)
    trained = {target.module.component for target in plan.targets} | {"unet"}
    modules = [
        module
        for module in tree
        if module.kind == "linear" and math.prod(module.shape) >= SMALLEST and module.component in trained
    ]
    names = {module.name for module in modules}
    wrong = [target.module.name for target in plan.targets if target.method == "diff" and target.module.name in names]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise TargetError(
            f"`method: diff` trains the weights of {', '.join(wrong[:_SHOWN])}{more}, which `model.quantize: {kind}` "
            f"holds in {'4' if kind == 'nf4' else '8'} bits. Let the rule pick norms and convolutions only, use "
            f"`method: lora` there, or set `model.quantize: none`."
        )
    return Quantised(modules, kind)


def quantised_bytes(shape: Sequence[int], kind: str) -> int:
    """What a linear weight [out, in] takes in memory: values, scales and tables; exact for bitsandbytes 0.50."""
    elements = math.prod(shape)
    if kind == "int8":  # a byte each, and an fp32 scale a row
        return elements + shape[0] * 4
    blocks = math.ceil(elements / _NF4_BLOCK)
    return math.ceil(elements / 2) + blocks + math.ceil(blocks / _NF4_GROUP) * 4 + _NF4_TABLES
