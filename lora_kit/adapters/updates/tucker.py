"""Tucker ("CP") cores of convolutions."""

from __future__ import annotations

import torch
from torch import Tensor


def unfolded(core: Tensor, inner: Tensor) -> Tensor:
    """The core [i, j, kh, kw] times `inner` [j, in] along j, as a matrix [i, in·kh·kw].

    With an outer factor [out, i] before it, this is the weight's low-rank form.
    """
    return torch.einsum("ij...,jq->iq...", core, inner).flatten(1)
