"""`python -m lora_kit` is `lora-kit`: what begins a process of its own, where the command line may be used in any."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from lora_kit.cli.main import main

_LARGE = frozenset({"train", "cache", "generate", "grid", "--probe"})
"""Commands, and an option of `plan`, that compute with whole networks."""


def console(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line as this process's own program, and exit as `main` does.

    arguments: what follows the program's name. Default: this process's own.
    """
    if _LARGE.intersection(sys.argv[1:] if arguments is None else arguments):
        from lora_kit.allocator import restart_with_few_held_back  # here: `--help` does without

        restart_with_few_held_back()
    main(arguments)


if __name__ == "__main__":
    console()
