"""A change of any one thing that an entry depends on gives another key; the same things said another way do not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from lora_kit.data.buckets import Size
from lora_kit.data.cache import View, latent_key, render, text_key, view_of
from lora_kit.data.crops import cut_picture, pixels_of
from lora_kit.data.pictures import Picture
from lora_kit.models import ModelBundle, load_bundle
from lora_kit.models.fingerprints import (
    text_encoder_fingerprint,
    tokenizer_fingerprint,
    vae_fingerprint,
    weights_hash,
)
from lora_kit.recipe import ModelSection

PICTURE = bytes(range(32))
VIEW = View(64, 48, (1.5, 0.0, 101.5, 75.0))
LATENT: dict[str, Any] = {"picture": PICTURE, "view": VIEW, "vae": "v", "stored": "fp32"}
TEXT: dict[str, Any] = {"caption": "a cat", "encoder": "e", "tokenizer": "t", "options": {"long": "cut", "skip": 1}}


@pytest.mark.parametrize(
    "change",
    [
        {"picture": bytes(32)},
        {"view": VIEW._replace(width=56)},
        {"view": VIEW._replace(height=56)},
        {"view": VIEW._replace(width=48, height=64)},
        {"view": VIEW._replace(box=(1.5, 0.0, 101.5, 75.25))},
        {"view": VIEW._replace(flip=True)},
        {"view": VIEW._replace(resample="bicubic")},
        {"view": VIEW._replace(background="#000000")},
        {"view": VIEW._replace(mask=8)},
        {"vae": "w"},
        {"stored": "fp16"},
    ],
)
def test_whatever_a_latent_depends_on_changes_its_key(change: dict[str, Any]) -> None:
    assert latent_key(**{**LATENT, **change}) != latent_key(**LATENT)


@pytest.mark.parametrize(
    "change",
    [
        {"caption": "a cat "},
        {"encoder": "f"},
        {"tokenizer": "u"},
        {"options": {"long": "chunks", "skip": 1}},
        {"options": {"long": "cut", "skip": 2}},
        {"options": {"long": "cut"}},
    ],
)
def test_whatever_text_states_depend_on_changes_their_key(change: dict[str, Any]) -> None:
    assert text_key(**{**TEXT, **change}) != text_key(**TEXT)


def test_the_same_said_another_way_has_the_same_key() -> None:
    whole = View(64, 64, (0, 0, 64, 64))
    same = View(64, 64, (-0.0, 0.0, 64.0, 64.0))
    assert latent_key(**{**LATENT, "view": whole}) == latent_key(**{**LATENT, "view": same})
    assert text_key(**{**TEXT, "options": {"skip": 1, "long": "cut"}}) == text_key(**TEXT)


# Few letters, those of the encoding's own marks among them: what could be cut in two ways is found soon.
parts = st.lists(st.text("a1:,", max_size=4), min_size=3, max_size=3)


@given(parts, parts)
@settings(deadline=None)
def test_parts_do_not_run_together(first: list[str], second: list[str]) -> None:
    keys = [text_key(*parts, {}) for parts in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)


def test_keys_are_pinned() -> None:
    # A change of these empties every cache there is: raise FORMAT instead where that is meant.
    assert latent_key(**LATENT).hex()[:16] == "7939859d95b3938f"
    assert text_key(**TEXT).hex()[:16] == "8985c5f72c89f59e"


@pytest.mark.parametrize("size", [(64, 64), (64, 48)])
@pytest.mark.parametrize("picture", [(64, 64), (64, 91), (93, 48), (64, 48), (200, 120), (33, 40), (101, 77)])
def test_a_view_is_the_training_picture_bit_for_bit(picture: Size, size: Size) -> None:
    values = np.random.default_rng(0).integers(0, 256, (picture[1], picture[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    wanted = pixels_of(cut_picture(image, size))
    view = view_of(picture, size)
    held = Picture(image, animated=False)
    assert torch.equal(render(held, view).pixels, wanted)
    assert torch.equal(render(held, view._replace(flip=True)).pixels, wanted.flip(-1))


@pytest.fixture(scope="module")
def bundle(tiny_sd1_folder: Path) -> ModelBundle:
    return load_bundle(ModelSection(base=str(tiny_sd1_folder)))


def changed(network: Any, name: str) -> Any:
    """A copy whose tensor `name` differs in one value."""
    other = copy.deepcopy(network)
    tensor = other.state_dict()[name]
    tensor.view(-1)[0] += 0.5
    return other


def with_network(bundle: ModelBundle, **networks: Any) -> ModelBundle:
    other = copy.copy(bundle)
    for name, network in networks.items():
        setattr(other, name, network)
    return other


def test_weights_hash_knows_values_names_shapes_and_dtypes() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 6)
    hashes = {weights_hash({"a": linear}), weights_hash({"b": linear}), weights_hash({"a": changed(linear, "bias")})}
    hashes.add(weights_hash({"a": copy.deepcopy(linear).bfloat16()}))
    reshaped = nn.Linear(6, 4)
    reshaped.weight.data, reshaped.bias.data = linear.weight.data.reshape(4, 6), linear.bias.data
    hashes.add(weights_hash({"a": reshaped}))
    assert len(hashes) == 5


def test_weights_hash_does_not_depend_on_memory_format() -> None:
    network = nn.Conv2d(3, 5, 3)
    other = copy.deepcopy(network).to(memory_format=torch.channels_last)  # pyright: ignore
    assert other.weight.stride() != network.weight.stride()
    assert weights_hash({"": other}) == weights_hash({"": network})


def test_a_vae_is_known_by_its_encoder(bundle: ModelBundle) -> None:
    whole = vae_fingerprint(bundle)
    names = list(bundle.vae.state_dict())
    for start, is_same in (("encoder.", False), ("quant_conv.", False), ("decoder.", True), ("post_quant_conv.", True)):
        name = next(name for name in names if name.startswith(start))
        other = with_network(bundle, vae=changed(bundle.vae, name))
        assert (vae_fingerprint(other) == whole) == is_same, name
    half: Any = copy.deepcopy(bundle.vae)
    assert vae_fingerprint(with_network(bundle, vae=half.bfloat16())) != whole


def test_a_text_encoder_is_known_by_weights_and_activation(bundle: ModelBundle) -> None:
    whole = text_encoder_fingerprint(bundle)
    name = next(iter(bundle.text_encoder.state_dict()))
    assert text_encoder_fingerprint(with_network(bundle, text_encoder=changed(bundle.text_encoder, name))) != whole
    other: Any = copy.deepcopy(bundle.text_encoder)
    other.config.hidden_act = "gelu"
    assert text_encoder_fingerprint(with_network(bundle, text_encoder=other)) != whole


def test_fingerprints_do_not_depend_on_where_and_when_the_base_was_loaded(
    bundle: ModelBundle, tiny_sd1_folder: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "another"
    copied.symlink_to(tiny_sd1_folder)
    other = load_bundle(ModelSection(base=str(copied)))
    other.family.condition(other, ["red apple"])  # sets the tokenizer's padding and truncation
    for fingerprint in (vae_fingerprint, text_encoder_fingerprint, tokenizer_fingerprint):
        assert fingerprint(other) == fingerprint(bundle)


def test_a_tokenizer_is_known_by_vocabulary_and_padding(bundle: ModelBundle) -> None:
    whole = tokenizer_fingerprint(bundle)
    more: Any = copy.deepcopy(bundle.tokenizer)
    more.add_tokens(["zwx"])
    assert tokenizer_fingerprint(with_network(bundle, tokenizer=more)) != whole
    padded: Any = copy.deepcopy(bundle.tokenizer)
    padded.pad_token = "!"
    assert tokenizer_fingerprint(with_network(bundle, tokenizer=padded)) != whole
