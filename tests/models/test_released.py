"""Encoders that are given back and read again: their memory is free meanwhile, and the numbers are the same after."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm_reference import checkpoint_shapes, small
from safetensors.torch import load_file, save_file
from small_tokenizers import small_tokenizer

from lora_kit.errors import ModelError
from lora_kit.models import ModelBundle, load_bundle
from lora_kit.models.recall import Recall
from lora_kit.models.released import bring, is_released, release
from lora_kit.recipe.sections import ModelSection

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def _loaded(section: ModelSection) -> ModelBundle:
    bundle = load_bundle(section, dtype=BF16, seed=3)
    bundle.recall = Recall(section, BF16, torch.float32, 3)
    return bundle


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
@pytest.mark.parametrize(
    ("base", "weights"),
    [("tiny_sd1_folder", "pretrained"), ("tiny_text2im_folder", "pretrained"), ("tiny_sd1_folder", "fresh")],
)
def test_what_is_read_again_is_what_was_there(
    name: str, base: str, weights: Any, request: pytest.FixtureRequest
) -> None:
    bundle = _loaded(ModelSection(base=str(request.getfixturevalue(base)), weights=weights))
    before = {key: value.clone() for key, value in getattr(bundle, name).state_dict().items()}
    weight = weakref.ref(next(getattr(bundle, name).parameters()))
    size = sum(value.numel() * value.element_size() for value in getattr(bundle, name).parameters())
    assert release(bundle, name) == size
    assert is_released(getattr(bundle, name)) and release(bundle, name) == 0
    gc.collect()
    assert weight() is None, "somebody still holds the weights"
    getattr(bundle, name).train()  # as training sets the modes of all networks
    bring(bundle, name, CPU)
    network = getattr(bundle, name)
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert network.training and not any(value.requires_grad for value in network.parameters())


def test_a_single_file_is_read_again_too(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    shapes = checkpoint_shapes(small(1, len(small_tokenizer())))
    save_file({name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}, tmp_path / "sd1.safetensors")
    section = ModelSection(base=str(tmp_path / "sd1.safetensors"), tokenizer=str(tmp_path / "tokenizer"))
    bundle = _loaded(section)
    for name in ("vae", "text_encoder"):
        before = {key: value.clone() for key, value in getattr(bundle, name).state_dict().items()}
        assert release(bundle, name) > 0
        bring(bundle, name, CPU)
        after = getattr(bundle, name).state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_without_the_means_to_read_it_again_nothing_is_given_back(tiny_sd1_folder: Path) -> None:
    bundle = load_bundle(ModelSection(base=str(tiny_sd1_folder)))
    assert release(bundle, "vae") == 0
    assert not is_released(bundle.vae)
    bundle.recall = Recall(ModelSection(base="owner/not-on-this-machine"), BF16, torch.float32, 0)
    assert release(bundle, "vae") == 0


def test_files_that_changed_meanwhile_are_refused(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_sd1_folder, folder)
    bundle = _loaded(ModelSection(base=str(folder)))
    release(bundle, "vae")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="changed or moved since the run began, and the vae is needed again"):
        bring(bundle, "vae", CPU)


def test_released_weights_cannot_be_used_by_mistake(tiny_sd1_folder: Path) -> None:
    bundle = _loaded(ModelSection(base=str(tiny_sd1_folder)))
    release(bundle, "vae")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        bundle.vae.to(CPU)
