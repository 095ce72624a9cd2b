"""Embedding files, and tokens inside adapter files, of every tool that users have them from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from adapter_samples import bundle_of, random_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_kit.adapters import AdapterState, eject, load_adapter, read_adapter, write_adapter
from lora_kit.adapters.token_files import Embedding, read_embedding, write_embedding
from lora_kit.errors import AdapterFileError
from lora_kit.models import ModelBundle

WIDTH = 32


def vectors(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def bundle(tiny_sd1_folder: Path) -> ModelBundle:
    return bundle_of(tiny_sd1_folder)


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    write_embedding(tmp_path / "toy.safetensors", Embedding("<toy>", vectors(3)), {"lora_kit.step": "4"})
    token, read = read_embedding(tmp_path / "toy.safetensors")
    assert token == "<toy>" and torch.equal(read, vectors(3))


@pytest.mark.parametrize(
    ("name", "held", "token"),
    [
        ("a1111.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(2)}, "name": "toy"}, "toy"),
        ("nameless.pt", {"string_to_param": {"*": vectors(2)}, "name": None}, "nameless"),
        ("learned_embeds.bin", {"<toy>": vectors(2)[0]}, "<toy>"),
        ("kohya.safetensors", {"emb_params": vectors(2)}, "kohya"),
    ],
)
def test_files_of_other_tools_are_read(tmp_path: Path, name: str, held: dict[str, object], token: str) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({key: value for key, value in held.items() if isinstance(value, Tensor)}, path)
    else:
        torch.save(held, path)
    found = read_embedding(path)
    assert found.token == token
    assert torch.equal(found.vectors, vectors(2)[: len(found.vectors)])
    assert read_embedding(path, "<own>").token == "<own>"


class Evil:
    """What a pickle may hold."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch was-run",)


def test_what_is_no_embedding_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"string_to_param": {"*": vectors(1)}, "name": Evil()}, tmp_path / "evil.pt")
    save_file({"clip_l": vectors(1), "clip_g": vectors(2)}, tmp_path / "xl.safetensors")
    save_file({"<toy>": torch.full((1, WIDTH), torch.inf)}, tmp_path / "inf.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    for name, said in {
        "evil.pt": "cannot be read as an embedding",
        "xl.safetensors": "it holds clip_g, clip_l|it holds clip_l, clip_g",
        "inf.safetensors": "NaN or infinite",
        "cut.safetensors": "cannot be read as an embedding",
        "gone.pt": "there is no such file",
    }.items():
        with pytest.raises(AdapterFileError, match=said):
            read_embedding(tmp_path / name)
    assert not (tmp_path / "was-run").exists()


def test_a_token_of_several_vectors_comes_and_goes(bundle: ModelBundle) -> None:
    tokenizer, before = bundle.tokenizer, bundle.text_encoder.get_input_embeddings()
    load_adapter(bundle, AdapterState({}, {}, {"<toy>": vectors(3)}), "toy")
    with torch.no_grad():
        short = bundle.family.condition(bundle, ["red <toy> apple"])
        spelt = bundle.family.condition(bundle, ["red <toy> <toy>_1 <toy>_2 apple"])
        chunked = bundle.family.condition(bundle, ["red <toy> apple"], "chunks")
    assert torch.equal(short, spelt) and torch.equal(short, chunked)
    assert bundle.tokenizer is not None
    ids = bundle.tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1", "<toy>_2"])
    assert torch.equal(bundle.text_encoder.get_input_embeddings()(torch.tensor(ids)), vectors(3))
    eject(bundle, "toy")
    assert bundle.tokenizer is tokenizer and bundle.text_encoder.get_input_embeddings() is before


@pytest.mark.parametrize("key", ["bundle_emb.<toy>.string_to_param.*", "bundle_emb.<toy>.clip_l"])
def test_tokens_in_an_adapter_file_are_read(bundle: ModelBundle, tmp_path: Path, key: str) -> None:
    state = random_state(bundle.components)
    write_adapter(tmp_path / "plain.safetensors", state, "kohya")
    save_file(load_file(tmp_path / "plain.safetensors") | {key: vectors(2)}, tmp_path / "with.safetensors")
    read = read_adapter(tmp_path / "with.safetensors", bundle.components)
    assert read.updates.keys() == state.updates.keys()
    assert torch.equal(read.embeddings["<toy>"], vectors(2))


def test_kohyas_layout_holds_tokens_and_the_others_say_they_do_not(bundle: ModelBundle, tmp_path: Path) -> None:
    state = random_state(bundle.components)._replace(embeddings={"<toy>": vectors(2)})
    write_adapter(tmp_path / "k.safetensors", state, "kohya")
    read = read_adapter(tmp_path / "k.safetensors", bundle.components)
    assert torch.equal(read.embeddings["<toy>"], vectors(2))
    for layout in ("diffusers", "peft"):
        with pytest.raises(AdapterFileError, match="cannot hold learned tokens: <toy>"):
            write_adapter(tmp_path / layout, state, layout)
    dotted = state._replace(embeddings={"a.b": vectors(1)})
    with pytest.raises(AdapterFileError, match="a dot"):
        write_adapter(tmp_path / "d.safetensors", dotted, "kohya")


@pytest.mark.parametrize(
    "extra",
    [
        {"bundle_emb.<toy>.t5": vectors(2)},
        {"bundle_emb.<toy>.clip_l": vectors(2), "bundle_emb.<toy>.string_to_param.*": vectors(2)},
    ],
)
def test_tokens_of_another_model_or_twice_are_refused(
    bundle: ModelBundle, tmp_path: Path, extra: dict[str, Tensor]
) -> None:
    write_adapter(tmp_path / "plain.safetensors", random_state(bundle.components), "kohya")
    save_file(load_file(tmp_path / "plain.safetensors") | extra, tmp_path / "with.safetensors")
    with pytest.raises(AdapterFileError, match="tokens of another model, or twice"):
        read_adapter(tmp_path / "with.safetensors", bundle.components)
