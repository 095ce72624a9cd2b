"""The training loop.

Names are imported when they are first used (PEP 562): what reads a process's memory or reckons a step needs little of
what a run imports, which takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.first_use import imported_on_first_use

if TYPE_CHECKING:
    from lora_kit.training.run import Outcome, train

__all__ = ["Outcome", "train"]

_HOMES = {"Outcome": "run", "train": "run"}

__getattr__ = imported_on_first_use(__name__, _HOMES)
