"""The room's front door."""

from __future__ import annotations

import pytest

import lora_kit.data


def test_every_public_name_is_there() -> None:
    assert all(hasattr(lora_kit.data, name) for name in lora_kit.data.__all__)


def test_no_other_is() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'open_record'"):
        lora_kit.data.open_record  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
