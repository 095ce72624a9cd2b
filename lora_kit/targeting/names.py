"""The text encoder's two spellings: transformers before 5.6 keeps an inner `text_model`, later ones do not."""

from __future__ import annotations

_INNER = "text_model."


def spellings(name: str) -> tuple[str, ...]:
    """The ways a rule may write the module `name`, its own first."""
    component, _, inner = name.partition(".")
    if not component.startswith("text_encoder"):
        return (name,)
    other = inner.removeprefix(_INNER) if inner.startswith(_INNER) else _INNER + inner
    return (name, f"{component}.{other}")


def canonical_name(name: str) -> str:
    """The same for one module whatever the transformers version: without `text_model`."""
    return min(spellings(name), key=len)
