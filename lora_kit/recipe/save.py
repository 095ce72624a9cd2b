"""The `save:` section: what is written, and when."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from lora_kit.recipe.base import NonNegative, Positive, Precision, Section
from lora_kit.recipe.methods import IN_PEFT_LAYERS

Layout = Literal["kohya", "diffusers", "peft"]


class SaveSection(Section):
    """What is written, and when."""

    every: NonNegative = 500
    """Optimizer steps between checkpoints. 0: only at the end and on a signal."""
    keep: Positive = 2
    """Checkpoints kept beside the best one; older ones of this run are removed."""
    best: bool = True
    """With `validation.held_out`: keep the checkpoint of the lowest held-out loss too, as `checkpoints/best`."""
    result: Literal["last", "best", "both"] = "both"
    """Whose weights the result holds: the last step's, or those of the lowest held-out loss (`validation.held_out`).
    `both`: the last step's, and where another step was better its beside them, as adapter.best.safetensors (a full
    fine-tune: model_best).
    A finished run gives them, too, with train.resume=latest."""
    format: Layout | None = None
    """Layout of the result. `kohya`: sd-scripts' names with LyCORIS's for other methods, adapter.safetensors.
    `diffusers`: what its `load_lora_weights` writes, the same file. `peft`: a folder, adapter/. The last two hold
    `lora`, `rslora` and `dora` alone. Default: `kohya`, but `diffusers` for the original latent-diffusion models, for
    which kohya's has no names."""
    bundle_tokens: bool = False
    """Put the vectors of `tokens` into adapter.safetensors, too (`bundle_emb.…`), where A1111's web UI, Forge and
    ComfyUI find them. diffusers refuses such a file. Default: each token has only a file of its own, in embeddings/."""
    dtype: Precision = "fp32"
    """Precision of adapter.safetensors. fp16 halves the file."""
    captions: bool = True
    """Put caption statistics (`ss_tag_frequency`) and folder names into the header."""


def layout_problem(layout: Layout, methods: Collection[str], has_kohya: bool = True) -> str | None:
    """Why a layout cannot hold what the rules' methods train; None if it can. has_kohya: whether that is a way out."""
    if layout == "kohya" or set(methods) == {"full"}:
        return None
    others = sorted(set(methods) - set(IN_PEFT_LAYERS) - {"full"})
    if others:
        said = f"the {layout} layout holds LoRA, rsLoRA and DoRA, and the rules say {', '.join(others)}; "
        return said + ("use `kohya`, which holds every method." if has_kohya else "use one of those methods.")
    if "dora" in methods and len(set(methods)) > 1:
        said = f"the {layout} layout has one switch for DoRA, and the rules say {', '.join(sorted(methods))}; "
        return said + ("use `kohya`, or one method." if has_kohya else "use one method.")
    return None
