"""The suffixes of kohya's layout and of LyCORIS, which shares its module names.

Sources: sd-scripts' `networks/lora.py`; `weight_list` of each of LyCORIS 4.1.3's `modules/*.py`; `diff_b` beside a
LoRA is what ComfyUI's LoraSave writes.
"""

from __future__ import annotations

SUFFIXES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "dora_scale": "magnitude",
    "alpha": "alpha",
    "a1.weight": "a1",
    "a2.weight": "a2",
    "b1.weight": "b1",
    "b2.weight": "b2",
    "bm.weight": "bm",
} | {
    # These have the same name in the neutral form.
    name: name
    for name in (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        *("diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "rescale", "weight", "on_input"),
    )
}
"""A key's end, after the module's name and a dot → the neutral part's name."""

SUFFIX_OF = {part: suffix for suffix, part in SUFFIXES.items()}
"""Neutral part name → suffix."""
