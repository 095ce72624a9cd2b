"""Learned tokens that come with an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_samples import bundle_of, random_state
from live_samples import digests, snapshot
from torch import Tensor

from lora_kit.adapters import AdapterState, eject, fuse, load_adapter, set_scale, unfuse
from lora_kit.errors import AdapterFileError, TargetError
from lora_kit.models import ModelBundle, pipeline

WIDTH = 32


def vector(seed: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def state(bundle: ModelBundle, **tokens: Tensor) -> AdapterState:
    embeddings = {f"<{name}>": value for name, value in tokens.items()}
    return AdapterState(random_state(bundle.components).updates, {}, embeddings)


@pytest.fixture
def bundle(tiny_sd1_folder: Path) -> ModelBundle:
    return bundle_of(tiny_sd1_folder)


def encoded(bundle: ModelBundle, prompt: str) -> Tensor:
    with torch.no_grad():
        return bundle.family.condition(bundle, [prompt])


def looked_up(bundle: ModelBundle, token: str) -> Tensor:
    assert bundle.tokenizer is not None
    (index,) = bundle.tokenizer(token, add_special_tokens=False).input_ids
    return bundle.text_encoder.get_input_embeddings()(torch.tensor(index)).detach()


def test_a_prompt_can_say_the_token_until_the_adapter_is_ejected(bundle: ModelBundle) -> None:
    before, bits, tokenizer = snapshot(bundle.components), digests(bundle.components), bundle.tokenizer
    base, unknown = encoded(bundle, "red apple"), encoded(bundle, "a <s1> apple")
    load_adapter(bundle, state(bundle, s1=vector(1), s2=vector(2)[None]), "style")
    set_scale(bundle, {"style": 0})
    assert torch.equal(looked_up(bundle, "<s1>"), vector(1))
    assert torch.equal(looked_up(bundle, "<s2>"), vector(2))
    assert torch.equal(encoded(bundle, "red apple"), base)
    assert not torch.equal(encoded(bundle, "a <s1> apple"), unknown)
    eject(bundle, "style")
    assert bundle.tokenizer is tokenizer
    assert snapshot(bundle.components) == before
    assert digests(bundle.components) == bits
    assert torch.equal(encoded(bundle, "a <s1> apple"), unknown)


def test_several_adapters_tokens_come_and_go_in_any_order(bundle: ModelBundle) -> None:
    tokenizer = bundle.tokenizer
    for seed in (1, 2, 3):
        load_adapter(bundle, state(bundle, **{f"s{seed}": vector(seed)}), f"a{seed}")
    eject(bundle, "a1")
    assert [bool(torch.equal(looked_up(bundle, f"<s{seed}>"), vector(seed))) for seed in (2, 3)] == [True, True]
    fuse(bundle)
    unfuse(bundle)
    eject(bundle, "a3")
    assert torch.equal(looked_up(bundle, "<s2>"), vector(2))
    eject(bundle, "a2")
    assert bundle.tokenizer is tokenizer


def test_a_diffusers_pipeline_draws_with_the_token(bundle: ModelBundle) -> None:
    pipe = pipeline(bundle)
    own = pipe.tokenizer
    options = {"num_inference_steps": 1, "output_type": "np", "guidance_scale": 1.0}

    def draw(prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(prompt, generator=generator, **options).images)

    apple = bundle.text_encoder.get_input_embeddings().weight[looked_up_id(bundle, "apple")].detach().clone()
    load_adapter(pipe, AdapterState({}, {}, {"<s1>": apple}), "style")
    # The token's vector is the word's, so the pictures are the same.
    assert torch.equal(draw("a red <s1>"), draw("a red apple"))
    assert not torch.equal(draw("a red <s1>"), draw("a red boat"))
    eject(pipe, "style")
    assert pipe.tokenizer is own


def looked_up_id(bundle: ModelBundle, word: str) -> int:
    assert bundle.tokenizer is not None
    (index,) = bundle.tokenizer(word, add_special_tokens=False).input_ids
    return index


def test_tokens_that_do_not_fit_are_all_told_and_nothing_is_changed(bundle: ModelBundle) -> None:
    before = snapshot(bundle.components)
    bad = {"<a>": torch.zeros(7), "apple</w>": vector(1), "<b>": torch.full((WIDTH,), torch.nan)}
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(bundle, AdapterState(random_state(bundle.components).updates, {}, bad), "style")
    said = str(caught.value)
    assert "<a>: its vectors are [7]; the text encoder takes [32] or [n, 32]" in said
    assert "apple</w>: the tokenizer has a token of that name already" in said
    assert "<b>: holds NaN" in said
    assert snapshot(bundle.components) == before


def test_networks_alone_have_no_tokenizer(bundle: ModelBundle) -> None:
    with pytest.raises(AdapterFileError, match=r"learned tokens \(<s1>\), which need a tokenizer"):
        load_adapter(bundle.components, state(bundle, s1=vector(1)), "style")
    load_adapter(bundle, state(bundle, s1=vector(1)), "style")
    with pytest.raises(TargetError, match="eject it from the pipeline or bundle"):
        eject(bundle.components, "style")
