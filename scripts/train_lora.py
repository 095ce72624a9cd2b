"""What `accelerate launch` runs: train as a recipe says.

    accelerate launch scripts/train_lora.py recipes/quickstart.yaml [key.path=value ...]

The same as `lora-kit train`, which starts one process and needs no launcher.
"""

from __future__ import annotations

import sys

from lora_kit.__main__ import console

if __name__ == "__main__":
    console(["train", *sys.argv[1:]])
