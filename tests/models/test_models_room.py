"""The room's front door."""

from __future__ import annotations

import subprocess
import sys

import lora_kit.models


def test_every_public_name_is_there():
    assert all(hasattr(lora_kit.models, name) for name in lora_kit.models.__all__)


def test_describing_a_base_imports_neither_torch_nor_diffusers():
    # Their import takes longer than all of `lora-kit plan` may.
    code = (
        "import sys, lora_kit.models.outline; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
