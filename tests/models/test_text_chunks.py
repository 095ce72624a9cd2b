"""Captions longer than the text encoder reads, encoded in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lora_kit.models import ModelBundle
from lora_kit.recipe.captions import LongText
from lora_kit.training.conditions import Conditions

WORDS = ("red", "apple", "blue", "boat", "black", "cat", "yellow", "sun", "white", "fish", "brown")  # each one token
SHORT, EXACT = "red apple", " ".join(WORDS[index % 11] for index in range(75))
LONG = " ".join(WORDS[index * 7 % 11] for index in range(160))  # 75 + 75 + 10 tokens
LENGTHS: tuple[LongText, ...] = ("cut", "chunks")


def assert_equal_to_rounding(first: Tensor, second: Tensor) -> None:
    """Fp32 sums over batches of another size, in some sixty layers in a row: each may round the last place of the
    largest values otherwise, which smaller ones are sums of."""
    units = 64 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(first, second, rtol=units, atol=units * float(second.abs().max()))


def by_hand(folder: Path, caption: str) -> Tensor:
    """Each 75 words through transformers' own tokenizer and text model, as a caption; one after another."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    words = caption.split()
    parts = [" ".join(words[start : start + 75]) for start in range(0, max(1, len(words)), 75)]
    states: list[Tensor] = []
    for part in parts:
        tokens = tokenizer(part, padding="max_length", max_length=77, return_tensors="pt")
        assert tokens.input_ids.shape == (1, 77)
        with torch.no_grad():
            states.append(encoder(tokens.input_ids).last_hidden_state[0])
    return torch.cat(states)


@pytest.mark.parametrize("caption", ["", SHORT, EXACT, LONG])
def test_states_equal_those_of_each_chunk_by_hand(bundle: ModelBundle, folder: Path, caption: str) -> None:
    (states,) = bundle.family.caption_states(bundle, [caption], "chunks")
    assert_equal_to_rounding(states, by_hand(folder, caption))


def test_captions_that_fit_are_encoded_as_without_chunks(bundle: ModelBundle) -> None:
    captions = [SHORT, "", EXACT]
    cut, chunked = (bundle.family.condition(bundle, captions, long) for long in LENGTHS)
    assert torch.equal(cut, chunked)


def predictions(bundle: ModelBundle, captions: list[str], condition: object) -> Tensor:
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(len(captions), -1, -1, -1)
    with torch.no_grad():
        return bundle.family.predict(bundle, noisy, torch.full((len(captions),), 500), condition)


def test_a_prediction_does_not_depend_on_the_other_captions_of_its_batch(bundle: ModelBundle) -> None:
    captions = [SHORT, LONG, "", EXACT]
    family = bundle.family
    alone = [predictions(bundle, [one], family.condition(bundle, [one], "chunks")) for one in captions]
    together = predictions(bundle, captions, family.condition(bundle, captions, "chunks"))
    assert_equal_to_rounding(together, torch.cat(alone))


def test_the_end_of_a_long_caption_is_heard(bundle: ModelBundle) -> None:
    other = f"{LONG} white fish"
    for long in LENGTHS:
        first, second = (
            predictions(bundle, [one], bundle.family.condition(bundle, [one], long)) for one in (LONG, other)
        )
        assert torch.equal(first, second) == (long == "cut")


def test_kept_states_give_the_same_condition(bundle: ModelBundle) -> None:
    conditions = Conditions(bundle, trained=False, long="chunks")
    captions = [LONG, SHORT, LONG]
    conditions([SHORT])
    first, again = conditions(captions), conditions(captions)
    assert [len(part) for part in first] == [3, 3]
    assert torch.equal(first.mask.sum(1), torch.tensor([231, 77, 231]))
    assert torch.equal(first.states, again.states)
    trained = Conditions(bundle, trained=True, long="chunks")(captions)
    assert_equal_to_rounding(first.states, trained.states.detach())


def test_gradients_reach_the_text_encoder_through_every_chunk(bundle: ModelBundle) -> None:
    encoder: Any = bundle.text_encoder
    embeddings = encoder.get_input_embeddings().weight.requires_grad_()
    bundle.family.condition(bundle, [LONG, SHORT], "chunks").states[0, 154:].sum().backward()
    used = embeddings.grad.abs().sum(1).nonzero().flatten().tolist()
    encode: Any = bundle.tokenizer
    last = encode(" ".join(LONG.split()[150:]), add_special_tokens=False).input_ids
    assert set(used) >= set(last)
