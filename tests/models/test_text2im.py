"""LDM text-to-image: loading, captions' states, diffusers' own pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LDMTextToImagePipeline, VQModel
from safetensors.torch import save_file
from text2im_samples import small_bert_tokenizer, small_text2im

from lora_kit.errors import ModelError
from lora_kit.inference import SamplingSettings, default_settings, draw
from lora_kit.models import ModelBundle, base_hash, load_bundle, outline, pipeline, skeleton
from lora_kit.models.fingerprints import text_encoder_fingerprint, tokenizer_fingerprint, vae_fingerprint
from lora_kit.models.outline import read_outline
from lora_kit.models.text_models import checkpoint_activations
from lora_kit.recipe import ModelSection
from lora_kit.targeting import module_tree

CAPTIONS = ["red apple", "", "A Blue boat"]
LONG = " ".join(["red", "apple", "blue", "boat", "black"] * 20)  # 100 words, each one token


@pytest.fixture(scope="module")
def vq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-text2im-vq"
    small_text2im("vq").save_pretrained(folder)
    return folder


@pytest.fixture
def bundle(tiny_text2im_folder: Path) -> ModelBundle:
    return load_bundle(ModelSection(base=str(tiny_text2im_folder)))


def _theirs(folder: Path) -> Any:
    pipe = LDMTextToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tensor(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("red apple", num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="pt").images


def test_the_family_and_both_first_stages_come_from_the_folder(tiny_text2im_folder: Path, vq_folder: Path) -> None:
    for folder, first_stage in ((tiny_text2im_folder, AutoencoderKL), (vq_folder, VQModel)):
        for load in (load_bundle, skeleton):
            found = load(ModelSection(base=str(folder)))
            assert (found.family.name, found.prediction_type, type(found.vae)) == (
                "ldm_text2im",
                "epsilon",
                first_stage,
            )


def test_captions_states_are_those_that_the_pipeline_makes(bundle: ModelBundle, tiny_text2im_folder: Path) -> None:
    pipe = _theirs(tiny_text2im_folder)
    tokens = pipe.tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        wanted = pipe.bert(tokens.input_ids)[0]
    assert torch.equal(bundle.family.condition(bundle, CAPTIONS), wanted)


def test_a_tokenizers_own_limit_is_passed_by_as_the_pipeline_does(bundle: ModelBundle) -> None:
    before = bundle.family.condition(bundle, CAPTIONS)
    bundle.tokenizer.model_max_length = 5
    assert torch.equal(bundle.family.condition(bundle, CAPTIONS), before)


def test_long_captions_are_cut_and_counted_or_encoded_in_chunks(bundle: ModelBundle) -> None:
    assert bundle.family.truncated(bundle, [" ".join(LONG.split()[:75]), LONG, ""]) == 1
    words = LONG.split()
    (states,) = bundle.family.caption_states(bundle, [LONG], "chunks")
    alone = [bundle.family.condition(bundle, [" ".join(part)])[0] for part in (words[:75], words[75:])]
    # Another batch size: a few units in the last place of values near 1.
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first_stage", ["kl", "vq"])
def test_pictures_equal_those_of_diffusers_pipeline(
    first_stage: str, tiny_text2im_folder: Path, vq_folder: Path
) -> None:
    folder = tiny_text2im_folder if first_stage == "kl" else vq_folder
    found = load_bundle(ModelSection(base=str(folder)))
    theirs = _theirs(folder)
    assert torch.equal(_tensor(pipeline(found)), _tensor(theirs))
    settings = SamplingSettings(steps=3, guidance=3.0, width=64, height=64)
    (ours,) = draw(found, ["red apple"], [0], settings=settings)
    wanted = (_tensor(theirs)[0].permute(1, 2, 0).numpy() * 255).round()
    # The same operations in fp32; a value on the edge between two bytes may fall either way. A VQ cell on the edge
    # between two codes could too, which in these 64 cells none is.
    assert np.abs(np.asarray(ours, dtype=np.int16) - wanted).max() <= 1


def test_pictures_have_the_bases_size_by_default(bundle: ModelBundle) -> None:
    assert (default_settings(bundle).width, default_settings(bundle).height) == (64, 64)


def test_an_fp32_vq_model_decodes_what_a_bf16_network_made(vq_folder: Path) -> None:
    found = load_bundle(ModelSection(base=str(vq_folder)), dtype=torch.bfloat16)
    images = _tensor(pipeline(found))
    assert images.isfinite().all()
    assert images.dtype == torch.float32


def test_training_the_text_encoder_drops_nothing_out(bundle: ModelBundle) -> None:
    before = bundle.family.condition(bundle, CAPTIONS)
    bundle.text_encoder.train()
    assert torch.equal(bundle.family.condition(bundle, CAPTIONS), before)
    assert bundle.text_encoder.config.dropout == 0.1  # what is saved again is what was read


def test_recomputed_activations_give_the_same_gradients(bundle: ModelBundle) -> None:
    weight = bundle.text_encoder.get_parameter("model.layers.0.fc1.weight").requires_grad_()
    gradients = []
    for recompute in (False, True):
        if recompute:
            checkpoint_activations(bundle.text_encoder)
        (gradient,) = torch.autograd.grad(bundle.family.condition(bundle, CAPTIONS).square().sum(), [weight])
        gradients.append(gradient)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_the_head_over_words_is_no_target(bundle: ModelBundle) -> None:
    names = {module.name for module in module_tree(bundle.components)}
    assert "text_encoder.model.layers.1.fc2" in names
    assert not any("to_logits" in name for name in names)


@pytest.mark.parametrize("weights", ["pretrained", "fresh"])
def test_the_hash_is_the_weights(weights: Any, tiny_text2im_folder: Path) -> None:
    section = ModelSection(base=str(tiny_text2im_folder), weights=weights)
    hashes = [base_hash(load_bundle(section, seed=seed)) for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1]
    assert (hashes[0] == hashes[2]) == (weights == "pretrained")


def test_fingerprints_tell_first_stages_text_encoders_and_vocabularies_apart(
    bundle: ModelBundle, vq_folder: Path, tmp_path: Path
) -> None:
    other = load_bundle(ModelSection(base=str(vq_folder)))
    assert vae_fingerprint(bundle) != vae_fingerprint(other)
    # Both have LDMBert's weights from one seed; the first stages were drawn before them.
    assert tokenizer_fingerprint(bundle) == tokenizer_fingerprint(other)
    assert text_encoder_fingerprint(bundle) != text_encoder_fingerprint(other)
    before = vae_fingerprint(other)
    with torch.no_grad():
        for name in ("decoder.conv_out.bias", "quantize.embedding.weight"):
            other.vae.get_parameter(name).add_(1)
    assert vae_fingerprint(other) == before  # neither has a part in a latent


def test_the_outline_is_read_from_configs_alone(
    tiny_text2im_folder: Path, bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outline, "_built", lambda section: pytest.fail(f"{section.base} was not described"))
    found = read_outline(ModelSection(base=str(tiny_text2im_folder)))
    networks = {**bundle.components, "vae": bundle.vae}
    assert found.tree == module_tree(bundle.components)
    assert found.parameters == {name: sum(p.numel() for p in one.parameters()) for name, one in networks.items()}
    assert (found.family, found.prediction_type) == ("ldm_text2im", "epsilon")


def test_the_outline_of_a_vq_base_is_the_skeletons(vq_folder: Path) -> None:
    found = read_outline(ModelSection(base=str(vq_folder)))
    networks = skeleton(ModelSection(base=str(vq_folder)))
    assert found.tree == module_tree(networks.components)
    assert found.parameters["vae"] == sum(weight.numel() for weight in networks.vae.parameters())


def test_a_published_tokenizers_vocabulary_is_read_as_the_pipeline_reads_it(
    tiny_text2im_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_text2im_folder, tmp_path / "base"))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    vocabulary = small_bert_tokenizer().get_vocab()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    found = load_bundle(ModelSection(base=str(folder)))
    theirs = _theirs(folder).tokenizer
    assert found.tokenizer(CAPTIONS).input_ids == theirs(CAPTIONS).input_ids
    assert found.tokenizer.get_vocab() == vocabulary


def test_its_single_file_is_named_and_the_folder_asked_for(tmp_path: Path) -> None:
    names = ("model.diffusion_model.out.2.bias", "cond_stage_model.transformer.token_emb.emb.weight")
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "ldm.safetensors")
    with pytest.raises(ModelError, match="is an LDM text-to-image checkpoint; give its diffusers folder instead"):
        load_bundle(ModelSection(base=str(tmp_path / "ldm.safetensors")))


def _edit(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _empty_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "bert"), "has no folder bert"),
        (lambda folder: shutil.rmtree(folder / "vqvae"), "has no folder vqvae"),
        (_edit("model_index.json", bert=None), "names no bert"),
        (_edit("model_index.json", bert=["transformers", "CLIPTextModel"]), "whose bert is a CLIPTextModel"),
        (_edit("model_index.json", vqvae=["diffusers", "AutoencoderTiny"]), "vqvae is a AutoencoderTiny"),
        (_edit("model_index.json", tokenizer=["transformers", "CLIPTokenizer"]), "tokenizer is a CLIPTokenizer"),
        (_edit("bert/config.json", encoder_ffn_dim=48), "its text_encoder cannot be read"),
        (_edit("unet/config.json", cross_attention_dim=64), "width 64, but the text encoder gives 48"),
        (_edit("unet/config.json", in_channels=9), "takes 9 channels and gives 4"),
        (_edit("bert/config.json", vocab_size=10), "its text_encoder cannot be read"),
        (_empty_tokenizer, r"holds neither tokenizer\.json nor vocab\.txt"),
    ],
)
def test_a_damaged_or_foreign_folder_is_one_clear_error(
    change: Callable[[Path], None], message: str, tiny_text2im_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_text2im_folder, tmp_path / "base"))
    change(folder)
    with pytest.raises(ModelError, match=message):
        load_bundle(ModelSection(base=str(folder)))
