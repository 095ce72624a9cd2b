from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from lora_kit.errors import ModelError
from lora_kit.models.first_stage import decode, encode, first_stage_class, latent_channels

SMALL: dict[str, Any] = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
}


@pytest.fixture
def vq() -> VQModel:
    torch.manual_seed(0)
    network = VQModel(**SMALL, latent_channels=3, num_vq_embeddings=16, vq_embed_dim=2, scaling_factor=0.5)
    # Fresh code vectors lie all but on one another.
    torch.nn.init.normal_(network.quantize.embedding.weight)
    return network.eval().requires_grad_(False)


@pytest.fixture
def kl() -> AutoencoderKL:
    torch.manual_seed(0)
    network = AutoencoderKL(**SMALL, latent_channels=4, scaling_factor=0.5, shift_factor=0.25)
    return network.eval().requires_grad_(False)


def _pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_vq_models_latents_are_those_before_quantisation_and_certain(vq: VQModel) -> None:
    mean, std = encode(vq, _pixels())
    assert torch.equal(mean, vq.quant_conv(vq.encoder(_pixels())))
    assert torch.equal(std, torch.zeros(2, 2, 4, 4))
    codes = vq.quantize.embedding.weight
    assert not (mean.movedim(1, -1)[..., None, :] == codes).all(-1).any()


def test_a_vq_model_decodes_the_nearest_code_of_each_cell(vq: VQModel) -> None:
    mean, _ = encode(vq, _pixels())
    latents = mean * 0.5  # as the diffusion sees them
    cells, codes = mean.double().movedim(1, -1), vq.quantize.embedding.weight.double()
    nearest = (cells[..., None, :] - codes).square().sum(-1).argmin(-1)
    quantised = codes[nearest].movedim(-1, 1).float()
    wanted = vq.decoder(vq.post_quant_conv(quantised))
    # diffusers adds (code - z) to z: the code to a unit in the last place, carried through some ten layers
    torch.testing.assert_close(decode(vq, latents), wanted, rtol=1e-4, atol=1e-5)


def test_a_kl_models_latents_are_scaled_back_and_shifted(kl: AutoencoderKL) -> None:
    mean, std = encode(kl, _pixels())
    assert (std > 0).all()
    network: Any = kl
    wanted = network.decode(mean).sample
    torch.testing.assert_close(decode(kl, (mean - 0.25) * 0.5), wanted, rtol=1e-4, atol=1e-5)


def test_the_latents_channels_are_the_code_vectors(vq: VQModel, kl: AutoencoderKL) -> None:
    assert (latent_channels(vq), latent_channels(kl)) == (2, 4)
    assert encode(vq, _pixels())[0].shape[1] == 2


def test_a_first_stage_is_built_as_its_config_says(vq: VQModel) -> None:
    assert first_stage_class({**vq.config, "_class_name": "VQModel"}, "base") is VQModel
    assert first_stage_class({}, "a single file") is AutoencoderKL
    with pytest.raises(ModelError, match="its first stage is a AutoencoderTiny; supported are AutoencoderKL and VQ"):
        first_stage_class({"_class_name": "AutoencoderTiny"}, "base")
