from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_kit.errors import ModelError
from lora_kit.models import ModelBundle, base_hash, load_bundle, pipeline, scheduler_named, skeleton
from lora_kit.models.pipelines import SCHEDULERS
from lora_kit.recipe.sections import ModelSection

CAPTIONS = ["red apple", ""]


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_text_states_equal_diffusers_own(bundle: ModelBundle, folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    wanted, _ = pipe.encode_prompt(CAPTIONS, torch.device("cpu"), 1, False)
    assert torch.equal(bundle.family.condition(bundle, CAPTIONS), wanted)


def test_latents_equal_those_of_the_vae(bundle: ModelBundle) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    mean, std = bundle.family.encode(bundle, pixels)
    with torch.no_grad():
        moments = bundle.vae.quant_conv(bundle.vae.encoder(pixels))
    want_mean, want_log_variance = moments.chunk(2, dim=1)
    wanted = 0.18215 * (want_mean + want_log_variance.exp().sqrt() * noise)
    # exp(x / 2) against sqrt(exp(x)): a few units in the last place of values near 1
    torch.testing.assert_close(bundle.family.target_latents(bundle, mean, std, noise), wanted, rtol=1e-6, atol=1e-6)


def test_a_shift_of_the_latents_is_taken_off_before_scaling(bundle: ModelBundle) -> None:
    bundle.vae.register_to_config(shift_factor=0.5, scaling_factor=2.0)
    one = torch.ones(1, 4, 2, 2)
    assert torch.equal(bundle.family.target_latents(bundle, one, one, one), 3 * one)


def test_the_vae_keeps_its_precision_inside_autocast(bundle: ModelBundle) -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    outside = bundle.family.encode(bundle, pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bundle.family.encode(bundle, pixels)
    assert torch.equal(torch.cat(inside), torch.cat(outside))


def test_predictions_are_fp32_from_a_bf16_base(folder: Path, latents: torch.Tensor) -> None:
    bundle = load_bundle(ModelSection(base=str(folder)), dtype=torch.bfloat16)
    timesteps = torch.tensor([1, 999])
    output = bundle.family.predict(bundle, latents, timesteps, bundle.family.condition(bundle, CAPTIONS))
    assert (output.dtype, output.shape) == (torch.float32, latents.shape)


def test_gradients_reach_the_text_encoder(bundle: ModelBundle, latents: torch.Tensor) -> None:
    weight = bundle.text_encoder.get_submodule("encoder.layers.0.self_attn.q_proj").weight.requires_grad_()
    condition = bundle.family.condition(bundle, CAPTIONS)
    bundle.family.predict(bundle, latents, torch.tensor([1, 999]), condition).square().mean().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_captions_that_are_cut_off_are_counted(bundle: ModelBundle) -> None:
    fits, too_long = " ".join(["apple"] * 75), " ".join(["apple"] * 76)
    assert bundle.family.truncated(bundle, [fits, too_long, "", too_long]) == 2


def test_a_skeleton_cannot_read_captions(folder: Path) -> None:
    bundle = skeleton(ModelSection(base=str(folder)))
    with pytest.raises(ModelError, match="only laid out"):
        bundle.family.condition(bundle, CAPTIONS)


def _picture(pipe: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("red apple", num_inference_steps=3, generator=generator, output_type="pt").images


def test_the_pipeline_draws_what_diffusers_draws(bundle: ModelBundle, folder: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    assert torch.equal(_picture(pipeline(bundle)), _picture(theirs))


def test_the_pipeline_decodes_a_bf16_networks_latents_with_an_fp32_vae(folder: Path) -> None:
    bundle = load_bundle(ModelSection(base=str(folder)), dtype=torch.bfloat16)
    assert _picture(pipeline(bundle)).isfinite().all()
    assert _picture(pipeline(bundle)).dtype == torch.float32


def test_the_pipeline_predicts_what_the_bundle_says(tiny_sd1_folder: Path) -> None:
    bundle = load_bundle(ModelSection(base=str(tiny_sd1_folder), prediction_type="v_prediction"))
    assert pipeline(bundle).scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_keeps_the_bases_schedule(name: str, bundle: ModelBundle) -> None:
    scheduler = scheduler_named(name, bundle.scheduler_config)
    wanted = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    assert torch.equal(scheduler.betas, wanted)
    assert _picture(pipeline(bundle, name)).isfinite().all()


def test_latents_are_never_clipped_where_the_config_is_silent() -> None:
    config = scheduler_named("ddim", {"beta_schedule": "scaled_linear"}).config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)


def test_an_unknown_sampler_is_named_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"'dpm\+'; known are ddim, ddpm, dpm\+\+, .*, unipc\. Did you mean dpm\+\+"):
        scheduler_named("dpm+", {})


def test_the_hash_is_of_names_values_and_precision(bundle: ModelBundle, folder: Path) -> None:
    first = base_hash(bundle)
    assert first == base_hash(load_bundle(ModelSection(base=str(folder))))
    with torch.no_grad():
        bundle.unet.conv_in.bias[0] += 1
    assert base_hash(bundle) != first
    half = load_bundle(ModelSection(base=str(folder)), dtype=torch.bfloat16)
    assert base_hash(half) != first


def test_a_skeleton_has_no_hash(folder: Path) -> None:
    with pytest.raises(ModelError, match="without weights"):
        base_hash(skeleton(ModelSection(base=str(folder))))
