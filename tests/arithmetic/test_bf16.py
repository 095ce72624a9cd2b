"""Whether the CPU computes in bf16."""

from __future__ import annotations

import platform

import pytest
import torch

from lora_kit.arithmetic.bf16 import computes_bf16

HAS: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # as cpuinfo tells it, not oneDNN


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available() or "avx512_bw" not in HAS,
    reason="nobody else tells",
)
def test_an_x86_processor_computes_it_by_avx512() -> None:
    """Or by AVX-NE-CONVERT, which newer ones have without AVX-512."""
    if not HAS.get("avx_ne_convert"):
        assert computes_bf16() is HAS["avx512_bw"]
