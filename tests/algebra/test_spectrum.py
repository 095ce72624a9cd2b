"""What `inspect` says of a module, against dense float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from low_rank_samples import SHAPES, dense, sample_state

from lora_kit.algebra import spectrum
from lora_kit.algebra.spectrum import block_norms, block_of


@pytest.mark.parametrize("name", list(SHAPES))
def test_norm_values_and_ranks_are_those_of_the_dense_matrix(name: str) -> None:
    update = sample_state(3, rank=5).updates[name]
    values = torch.linalg.svdvals(dense(update))
    found = spectrum(name, update)
    assert (found.method, found.rank, found.alpha, found.dtype) == ("lora", update.rank, update.alpha, "float32")
    assert found.norm == pytest.approx(float(dense(update).norm()), rel=1e-12)
    assert found.singular_values == pytest.approx(values[: update.rank].tolist(), rel=1e-10)
    energy = values.square().cumsum(0) / values.square().sum()
    assert found.rank_95 == int((energy < 0.95).sum()) + 1
    assert found.rank_99 == int((energy < 0.99).sum()) + 1
    share = values[: update.rank] / values[: update.rank].sum()
    assert found.effective_rank == pytest.approx(math.exp(float(-(share * share.log()).sum())), rel=1e-10)
    assert found.parameters == sum(part.numel() for part in update.parts().values())


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("unet.down_blocks.1.attentions.0.proj_in", "unet down 1"),
        ("lora_unet_up_blocks_3_resnets_2_conv1", "unet up 3"),
        ("unet.mid_block.resnets.0.conv1", "unet mid"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet mid"),
        ("unet.conv_in", "unet"),
        ("text_encoder.encoder.layers.11.mlp.fc1", "text encoder 11"),
        ("text_encoder.text_model.encoder.layers.2.mlp.fc1", "text encoder 2"),
        ("lora_te_text_model_encoder_layers_7_self_attn_q_proj", "text encoder 7"),
        ("text_encoder.final_layer_norm", "text encoder"),
    ],
)
def test_blocks_of_dotted_and_flattened_names(module: str, block: str) -> None:
    assert block_of(module) == block


def test_block_norms_add_up_in_squares() -> None:
    rows = [spectrum(name, update) for name, update in sample_state(4).updates.items()]
    blocks = block_norms(rows)
    assert [one.block for one in blocks] == ["text encoder 0", "unet mid"]
    assert [one.modules for one in blocks] == [1, 3]
    total = math.fsum((one.norm or 0.0) ** 2 for one in rows)
    assert math.fsum(one.norm**2 for one in blocks) == pytest.approx(total)
    assert math.fsum(one.share for one in blocks) == pytest.approx(1.0)
    assert blocks[0].share == pytest.approx((rows[-1].norm or 0.0) ** 2 / total)
