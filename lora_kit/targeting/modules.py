"""One module of a network, as rules and adapter files see it. By itself, so that reading a file needs no recipe."""

from __future__ import annotations

from typing import NamedTuple


class ModuleInfo(NamedTuple):
    """One module that a rule can pick."""

    name: str
    """Dotted name that starts with the component: `unet.down_blocks.0.…`."""
    kind: str
    """`linear`, `conv`, or `other` (norms: only `method: full` and `diff` take them; embeddings: only `full`)."""
    shape: tuple[int, ...]
    """The weight's shape: linear [out, in], conv [out, in, kh, kw]."""
    parameters: int
    """Count of the module's own parameters (weight and bias)."""

    @property
    def component(self) -> str:
        """The name's first part: `unet`, `text_encoder`."""
        return self.name.split(".", 1)[0]
