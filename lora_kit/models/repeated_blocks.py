"""The blocks that a UNet repeats, and how many of them differ: what `torch.compile` compiles. Imports no torch.

Found by the names that diffusers gives them, in either of its UNets (`UNet2DConditionModel`, `UNet2DModel`): a block is
`….resnets.N`, `….transformer_blocks.N`, or `….attentions.N` where no transformer blocks are in it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lora_kit.targeting import ModuleInfo, Target, TargetPlan

_BLOCK = re.compile(
    r"(?P<name>unet\.(?P<part>down_blocks|mid_block|up_blocks)(?:\.(?P<index>\d+))?\."
    r"(?:attentions\.\d+\.)?(?P<kind>resnets|transformer_blocks|attentions)\.\d+)\.(?P<inner>.+)"
)
_CALLED = {"resnets": "resnet", "transformer_blocks": "transformer block", "attentions": "attention block"}


class Block(NamedTuple):
    """One block of a UNet."""

    name: str
    """`unet.down_blocks.0.resnets.1`."""
    kind: str
    """`resnet`, `transformer block` or `attention block`."""
    level: int
    """How often the picture was halved before it: 0 for the outermost."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """The modules in it by their names within it, with their weights' shapes."""


class CompilePlan(NamedTuple):
    """What a run compiles."""

    blocks: dict[str, int]
    """Kind → how many there are."""
    different: int
    """Blocks that differ in weights, size or adapters; others share one piece of code."""
    shapes: int
    """Of micro-batches, in the run: each has code of its own."""

    @property
    def pieces(self) -> int:
        """Pieces of compiled code in all."""
        return self.different * self.shapes

    @property
    def limit(self) -> int:
        """The most that torch may compile of one class: a block whose input wants no gradient yet is another piece."""
        return 2 * self.pieces

    def line(self) -> str:
        """For a reader."""
        listed = " and ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in self.blocks.items())
        return (
            f"compile: {listed} of the UNet, {self.different} of them different, for {self.shapes} "
            f"shape{'s' if self.shapes > 1 else ''} of micro-batches: about {self.pieces} pieces of code"
        )


def compile_plan(tree: Iterable[ModuleInfo], plan: TargetPlan, shapes: int) -> CompilePlan:
    """What is compiled of a base with `plan` trained, for so many shapes of micro-batches."""
    blocks = repeated_blocks(tree)
    targets = {target.module.name: target for target in plan.targets}
    forms = {(block.kind, block.level, block.shapes, tuple(_adapters(block, targets))) for block in blocks}
    return CompilePlan(dict(Counter(block.kind for block in blocks)), len(forms), shapes)


def repeated_blocks(tree: Iterable[ModuleInfo]) -> list[Block]:
    """Every repeated block of the UNet, in the tree's order. tree: of a network without adapters."""
    found: dict[str, list[ModuleInfo]] = {}
    for module in tree:
        match = _BLOCK.fullmatch(module.name)
        if match is not None:
            found.setdefault(match["name"], []).append(module)
    last = max((_index(name) for name in found if ".down_blocks." in name), default=0)
    outer = {name.partition(".transformer_blocks.")[0] for name in found if ".transformer_blocks." in name}
    return [_block(name, modules, last) for name, modules in found.items() if name not in outer]


def _adapters(block: Block, targets: Mapping[str, Target]) -> Iterator[Target]:
    """What decides the block's code of the adapters in it."""
    for inner, _ in block.shapes:
        target = targets.get(f"{block.name}.{inner}")
        if target is not None:
            module = target.module._replace(name=inner)
            yield target._replace(module=module, rule=0, lr_scale=1.0, max_norm=None)


def _block(name: str, modules: Sequence[ModuleInfo], last: int) -> Block:
    match = _BLOCK.fullmatch(modules[0].name)
    assert match is not None
    levels: Mapping[str, int] = {"down_blocks": _index(name), "mid_block": last, "up_blocks": last - _index(name)}
    shapes = tuple((module.name.removeprefix(f"{name}."), module.shape) for module in modules)
    return Block(name, _CALLED[match["kind"]], levels[match["part"]], shapes)


def _index(name: str) -> int:
    match = _BLOCK.fullmatch(f"{name}.x")
    return int(match["index"] or 0) if match is not None else 0
