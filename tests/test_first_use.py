"""The front doors of the rooms whose names are imported when they are first used."""

from __future__ import annotations

from importlib import import_module

import pytest

ROOMS = ["adapters", "data", "models", "targeting", "training"]


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_there(room: str):
    package = import_module(f"lora_kit.{room}")
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


@pytest.mark.parametrize("room", ROOMS)
def test_another_name_is_refused_as_a_module_does(room: str):
    package = import_module(f"lora_kit.{room}")
    with pytest.raises(AttributeError, match=f"module 'lora_kit.{room}' has no attribute 'open_record'"):
        package.open_record  # noqa: B018
