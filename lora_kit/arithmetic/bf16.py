"""Whether this machine's CPU computes in bf16."""

from __future__ import annotations

from functools import cache

import torch


@cache
def computes_bf16() -> bool:
    """Whether torch computes bf16 on this CPU by oneDNN (AVX-512 on x86), not by kernels of its own, which take many
    times as long. Without oneDNN nothing is known, and the answer is yes."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
