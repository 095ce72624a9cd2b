"""Whether the CPU computes in bf16."""

from __future__ import annotations

import torch

from lora_kit.arithmetic.bf16 import computes_bf16


def test_onednn_is_asked() -> None:
    """The same question that torch's own compiler asks; the name is torch's and may change."""
    wanted = not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert computes_bf16() is bool(wanted)
