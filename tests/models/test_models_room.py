"""The room's front door."""

from __future__ import annotations

import subprocess
import sys


def test_describing_a_base_imports_neither_torch_nor_diffusers():
    # Their import takes longer than all of `lora-kit plan` may.
    code = (
        "import sys, lora_kit.models.outline; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
