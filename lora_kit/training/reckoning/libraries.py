"""What the interpreter and a run's libraries take, before anything of the recipe is loaded."""

from __future__ import annotations

import importlib

from lora_kit.training.peak_memory import resident_memory


def libraries_bytes() -> int:
    """Resident bytes of this process once it has imported what a run imports; 0 where the system does not tell.

    A measurement, as no config tells it: it goes with the versions, and comes to a run's own to some 5 %.
    """
    importlib.import_module("lora_kit.training.run")
    return resident_memory() or 0
