"""What a kernel of the CPU takes and frees within one operation, beside the tensors it is given and makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def cpu_scratch(func: Any, args: Sequence[Any], made: Any) -> int:
    """Bytes, by rules that were measured (resident memory of single operations in fp32 and bf16, torch 2.13 with
    oneDNN): a convolution's weight is laid out anew for the time of the product, forward and back; unless
    they lie in channels-last memory, so are input and output (the most that was seen: sometimes one of them is not).
    Linear layers, norms and attention take next to nothing."""
    if func not in _CONVOLUTIONS:
        return 0
    is_back = func is _CONVOLUTIONS[1]
    x: Tensor = args[1] if is_back else args[0]
    weight: Tensor = args[2] if is_back else args[1]
    scratch = _size(weight)
    if not x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous():
        outputs = made if isinstance(made, tuple) else (made,)
        scratch += _size(x) + sum(_size(one) for one in outputs[:1] if isinstance(one, Tensor))
    return scratch


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
