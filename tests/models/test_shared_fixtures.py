from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline


@pytest.mark.parametrize("fixture", ["tiny_sd1_folder", "tiny_sd2_folder"])
def test_the_small_bases_load_in_diffusers_own_pipeline(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe("red apple", num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_a_known_word_is_one_token_and_captions_are_padded_to_77(tiny_sd1_folder: Path) -> None:
    tokenizer = StableDiffusionPipeline.from_pretrained(tiny_sd1_folder, safety_checker=None).tokenizer
    ids = tokenizer(["red apple"], padding="max_length", truncation=True).input_ids[0]
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id
    assert ids[3:] == [tokenizer.eos_token_id] * 74
    assert tokenizer.convert_ids_to_tokens(ids[1:3]) == ["red</w>", "apple</w>"]
