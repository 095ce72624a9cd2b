from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import bundle_of
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_kit.adapters import LoraUpdate, eject, load_adapter, read_adapter, set_scale
from lora_kit.adapters.formats.cloneofsimo import positions
from lora_kit.errors import AdapterFileError
from lora_kit.inference import SamplingSettings, draw
from lora_kit.models import ModelBundle
from lora_kit.models.known_trees import known_tree

UNET = ["CrossAttention", "Attention", "GEGLU"]
TEXT = ["CLIPAttention"]


@pytest.fixture(scope="module")
def bundle(tiny_sd1_folder: Path) -> ModelBundle:
    return bundle_of(tiny_sd1_folder)


def searched(network: nn.Module, classes: list[str]) -> list[str]:
    """cloneofsimo's search, on the module order of its day: in every module of a class, each layer."""
    for module in network.modules():
        if module.__class__.__name__ == "BasicTransformerBlock":
            order = ["attn1", "ff", "attn2"]
            rest = [name for name in module._modules if name not in order]
            module._modules = {name: module._modules[name] for name in [*order, *rest]}
    if "mid_block" in network._modules:  # it was made last
        network._modules["mid_block"] = network._modules.pop("mid_block")
    return [
        f"{ancestor_name}.{name}"
        for ancestor_name, ancestor in network.named_modules()
        if ancestor.__class__.__name__ in classes
        for name, module in ancestor.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]


@pytest.mark.parametrize("classes", [UNET, ["ResnetBlock2D", *UNET], ["GEGLU"]])
def test_positions_are_those_that_the_search_finds_on_the_modules_of_that_day(
    classes: list[str], tiny_sd2_folder: Path
) -> None:
    bundle = bundle_of(tiny_sd2_folder)
    names = [f"unet.{name}" for name, _ in bundle.unet.named_modules()]
    assert positions(names, "unet", classes) == [f"unet.{name}" for name in searched(bundle.unet, classes)]


def test_positions_in_the_text_encoder(tiny_sd2_folder: Path) -> None:
    bundle = bundle_of(tiny_sd2_folder)
    names = [f"text_encoder.{name}" for name, _ in bundle.text_encoder.named_modules()]
    expected = [f"text_encoder.{name}" for name in searched(bundle.text_encoder, TEXT)]
    assert positions(names, "text_encoder", TEXT) == expected
    assert [name.rpartition(".")[2] for name in expected[:4]] == ["k_proj", "v_proj", "q_proj", "out_proj"]


def test_positions_in_stable_diffusion_1() -> None:
    found = positions([module.name for module in known_tree("sd1")], "unet", UNET)
    assert len(found) == 144
    assert {name.split(".")[1] for name in found[:54]} == {"down_blocks"}
    assert {name.split(".")[1] for name in found[54:135]} == {"up_blocks"}
    assert {name.split(".")[1] for name in found[135:]} == {"mid_block"}
    assert [name.partition("transformer_blocks.0.")[2] for name in found[:9]] == [
        *(f"attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        *(f"attn2.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    ]


def saved(bundle: ModelBundle, path: Path, tokens: Mapping[str, Tensor] | None = None) -> dict[str, LoraUpdate]:
    """A file as cloneofsimo's save_safeloras_with_embeds lays it out; what it should be read as."""
    generator = torch.Generator().manual_seed(0)
    networks: dict[str, tuple[Any, list[str]]] = {
        "unet": (bundle.unet, UNET),
        "text_encoder": (bundle.text_encoder, TEXT),
    }
    tensors = dict(tokens or {})
    metadata = dict.fromkeys(tensors, "<embed>")
    expected: dict[str, LoraUpdate] = {}
    for component, (network, classes) in networks.items():
        metadata[component] = json.dumps(classes)
        for index, name in enumerate(searched(network, classes)):
            out, inside = network.get_submodule(name).weight.shape[:2]
            update = LoraUpdate(
                torch.randn(4, inside, generator=generator), torch.randn(out, 4, generator=generator), 4.0
            )
            tensors[f"{component}:{index}:down"], tensors[f"{component}:{index}:up"] = update.down, update.up
            metadata[f"{component}:{index}:rank"] = "4"
            expected[f"{component}.{name}"] = update
    save_file(tensors, path, metadata)
    return expected


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_is_read_onto_the_layers_it_was_trained_on(
    version: int, tiny_sd1_folder: Path, tiny_sd2_folder: Path, tmp_path: Path
) -> None:
    base = tiny_sd1_folder if version == 1 else tiny_sd2_folder
    tokens = {"<s1>": torch.randn(32), "<s2>": torch.randn(32)}
    expected = saved(bundle_of(base), tmp_path / "a.safetensors", tokens)
    got = read_adapter(tmp_path / "a.safetensors", bundle_of(base).components)
    assert got.updates.keys() == expected.keys()
    for name, update in expected.items():
        assert torch.equal(got.updates[name].parts()["down"], update.down)
        assert torch.equal(got.updates[name].parts()["up"], update.up)
        assert got.updates[name].alpha == 4.0
    assert got.embeddings.keys() == tokens.keys()
    assert all(torch.equal(got.embeddings[token], vectors) for token, vectors in tokens.items())


def change(path: Path, out: Path, tensors: Mapping[str, Tensor | None], metadata: Mapping[str, str | None]) -> Path:
    from lora_kit.adapters.formats.container import read_safetensors

    contents = read_safetensors(path)
    new = {key: value for key, value in (contents.tensors | tensors).items() if value is not None}
    save_file(new, out, {key: value for key, value in (contents.metadata | metadata).items() if value is not None})
    return out


@pytest.mark.parametrize(
    ("tensors", "metadata", "what"),
    [
        ({}, {"unet": None}, "does not say which classes of the unet"),
        ({}, {"unet": "{}"}, "is not a JSON list"),
        ({}, {"unet": "[]"}, r"known: CrossAttention"),
        ({}, {"unet": '["Transformer2DModel"]'}, r"\['Transformer2DModel'\]; known: CrossAttention"),
        ({}, {"unet": '["CrossAttention"]'}, "the model has 32 in CrossAttention"),
        ({"unet:35:up": None, "unet:35:down": None}, {}, "has 35 layers for the unet, but the model has 36"),
        ({"unet:7:up": None, "unet:7:down": None}, {}, "unet:7 is missing"),
        ({"unet:3:up": None}, {}, "unet:3: the up half is missing"),
        ({"unet:3:mid": torch.ones(2)}, {}, "unet:3:mid: unknown key"),
        ({"unet:03:up": torch.ones(2)}, {}, "unet:03:up: unknown key"),
        ({"<s3>": torch.ones(2)}, {}, "<s3>: unknown key"),
    ],
)
def test_what_does_not_fit_is_told(
    tensors: Any, metadata: Any, what: str, bundle: ModelBundle, tiny_sd1_folder: Path, tmp_path: Path
) -> None:
    saved(bundle_of(tiny_sd1_folder), tmp_path / "a")
    with pytest.raises(AdapterFileError, match=what):
        read_adapter(change(tmp_path / "a", tmp_path / "b", tensors, metadata), bundle.components)


def test_a_file_with_learned_tokens_is_drawn_with(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    """From the file to the picture: layers and tokens act, and both are gone again once it is ejected."""
    bundle = bundle_of(tiny_sd1_folder)
    settings = SamplingSettings(steps=2, guidance=3.0, width=16, height=16)

    def picture() -> bytes:
        (drawn,) = draw(bundle, ["a <s1> apple"], [0], settings=settings)
        return drawn.tobytes()

    saved(
        bundle_of(tiny_sd1_folder),
        tmp_path / "a.safetensors",
        {"<s1>": 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))},
    )
    base = picture()
    load_adapter(bundle, tmp_path / "a.safetensors", "style")
    whole = picture()
    set_scale(bundle, {"style": 0})
    token_alone = picture()
    eject(bundle, "style")
    assert len({base, whole, token_alone}) == 3
    assert picture() == base
