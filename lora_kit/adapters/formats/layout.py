"""What a layout on disk must tell: how its keys name a module, and which part of the update each key is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor


class Key(NamedTuple):
    """One tensor's key, taken apart."""

    module: str
    """The module, in the file's own spelling."""
    part: str
    """`alpha`, or the neutral name of a part (`down`, `up` …: see `lora_kit.adapters.updates`)."""


@dataclass(frozen=True, eq=False)
class RawUpdate:
    """The tensors a file holds for one module, before they are checked against a model."""

    parts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """By neutral part name, as they are in the file."""
    alpha: float | None = None
    """None: the file does not say, so alpha = rank."""

    @property
    def down(self) -> Tensor | None:
        """The `down` part."""
        return self.parts.get("down")

    @property
    def up(self) -> Tensor | None:
        """The `up` part."""
        return self.parts.get("up")


class Layout(Protocol):
    """One way of writing an adapter to disk."""

    name: str

    def parse(self, key: str) -> Key | None:
        """The key's module and part, or None if this layout has no such key."""
        ...

    def spellings(self, names: Iterable[str]) -> dict[str, str]:
        """Every spelling this layout reads → the dotted module name (`unet.…`) it stands for."""
        ...

    def alphas(self, updates: Mapping[str, RawUpdate], metadata: Mapping[str, str]) -> dict[str, float]:
        """Alpha by the file's module spelling, where the header (and no tensor) holds it."""
        ...


def with_text_model(name: str) -> str:
    """`text_encoder.encoder…` → `text_encoder.text_model.encoder…`, as files have it; other names as they are.

    The inverse of `targeting.canonical_name`.
    """
    if name.startswith(("text_encoder.encoder.", "text_encoder.embeddings.", "text_encoder.final_layer_norm")):
        return name.replace("text_encoder.", "text_encoder.text_model.", 1)
    return name
