"""Train, with overrides that one process alone gets: `python one_rank.py RANK OVERRIDE RECIPE [OVERRIDE …]`."""

from __future__ import annotations

import os
import sys

from lora_kit.cli.main import main

if __name__ == "__main__":
    rank, override, *rest = sys.argv[1:]
    main(["train", *rest, *([override] if os.environ.get("RANK") == rank else [])])
