"""Files of every layout, damaged in thousands of ways: each is read, or refused with an AdapterFileError. Nothing else.

Seeded, so that a failure can be run again: the message names the sample and the seed.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import bundle_of, lycoris_state, random_state
from torch import Tensor, nn

from lora_kit.adapters import read_adapter, write_adapter
from lora_kit.adapters.formats.cloneofsimo import positions
from lora_kit.adapters.formats.container import read_safetensors, serialise
from lora_kit.errors import AdapterFileError

SAMPLES = ("kohya", "lycoris", "diffusers", "processors", "peft", "cloneofsimo")
VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2**31, 2**62, 2**63, 2**64, 10**40, 1.5, 1e308, "", "F32", "F16", "F8_E4M3", "BOOL"),
    *([], {}, [0], [0, 0], [2**62, 4], ["a"], {"a": 1}, "\ud800", "\x00", "é" * 9, [[[[]]]], "<embed>", "unet", 4),
)
TEXTS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"-", b"9" * 5000, b"\xff", b"\\ud800", b"\\u0000", b"e9"),
    *(b"__metadata__", b"null", b"[" * 2000, b'"a":1,', b" "),
)


def samples(base: Path, folder: Path) -> dict[str, Path]:
    """A small file of each layout; PEFT's is a folder."""
    components = bundle_of(base).components

    def few(module: Any) -> bool:
        return module.name.startswith(("unet.mid_block.resnets.0", "text_encoder.encoder.layers.0", "unet.conv_in"))

    state = random_state(components, wanted=few)._replace(metadata={"ss_seed": "1", "ss_tag_frequency": "{}"})
    for layout in ("kohya", "diffusers", "peft"):
        write_adapter(folder / layout, state, layout, torch.float16)
    write_adapter(folder / "lycoris", lycoris_state(components), "kohya")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    parts = {f"{name}.down.weight": torch.ones(2, 64), f"{name}.up.weight": torch.ones(64, 2)}
    (folder / "processors").write_bytes(serialise(parts, {}))
    (folder / "cloneofsimo").write_bytes(_positional(components))
    return {name: folder / name for name in SAMPLES}


def _positional(components: Mapping[str, nn.Module]) -> bytes:
    names = [f"unet.{name}" for name, _ in components["unet"].named_modules()]
    tensors = {"<s1>": torch.ones(32)}
    for index, name in enumerate(positions(names, "unet", ["GEGLU"])):
        out, inside = components["unet"].get_submodule(name.removeprefix("unet.")).weight.shape
        tensors |= {f"unet:{index}:down": torch.ones(1, inside), f"unet:{index}:up": torch.ones(out, 1)}
    return serialise(tensors, {"unet": '["GEGLU"]', "<s1>": "<embed>"})


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    """Of the header mostly: it decides what is done with the rest."""
    changed = bytearray(data)
    end = len(data) if rng.random() < 0.2 else 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(end)] = rng.randrange(256)
    return bytes(changed)


def cut_or_grow(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return rng.choice((data[:at], data[at:], data + data[:at], data[:at] + data[at + 1 :], data + b"\0"))


def new_length(data: bytes, rng: random.Random) -> bytes:
    old = int.from_bytes(data[:8], "little")
    length = rng.choice(
        (0, 1, old - 1, old + 1, old + 8, len(data), 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(old))
    )
    return length.to_bytes(8, "little") + data[8:]


def text_inserted(data: bytes, rng: random.Random) -> bytes:
    """Into the header, whose length is put right."""
    header, rest = _parted(data)
    at = rng.randrange(len(header))
    gone = rng.choice((0, 0, 1, 5))
    return _joined(header[:at] + rng.choice(TEXTS) + header[at + gone :], rest)


def value_changed(data: bytes, rng: random.Random) -> bytes:
    """One value, name or entry of the header's JSON."""
    header, rest = _parted(data)
    document: dict[str, Any] = json.loads(header)
    key = rng.choice(list(document))
    kind = rng.randrange(5)
    if kind == 0:
        document[str(rng.choice(VALUES))] = document.pop(key)
    elif kind == 1:
        document[key] = rng.choice(VALUES)
    elif kind == 2:
        del document[key]
    elif isinstance(document[key], dict) and document[key]:
        field = rng.choice(list(document[key]))
        value = document[key][field]
        number = isinstance(value, list) and value and kind == 3
        document[key][field] = _nudged(value, rng) if number else rng.choice(VALUES)
    return _joined(json.dumps(document).encode(), rest)


def key_doubled(data: bytes, rng: random.Random) -> bytes:
    header, rest = _parted(data)
    found = list(re.finditer(rb'"[^"]+":\{[^{}]*\},?', header))
    one = rng.choice(found)
    return _joined(header[: one.start()] + one[0].rstrip(b",") + b"," + header[one.start() :], rest)


def tensor_changed(data: bytes, rng: random.Random) -> bytes:
    """A sound file that says something else: what the container lets through."""
    tensors, metadata = _contents(data)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(tensors))
        tensor = tensors[key]
        change: Callable[[], Tensor] = rng.choice(
            (
                lambda tensor=tensor: tensor.T.contiguous() if tensor.ndim == 2 else tensor.reshape(-1),
                lambda tensor=tensor: tensor.unsqueeze(rng.randrange(tensor.ndim + 1)),
                lambda tensor=tensor: tensor.to(rng.choice((torch.int8, torch.bool, torch.float64, torch.bfloat16))),
                lambda tensor=tensor: tensor * rng.choice((float("nan"), float("inf"), 0.0, 1e30)),
                lambda tensor=tensor: tensor.reshape(-1)[:1].clone(),
                lambda tensor=tensor: torch.cat([tensor.reshape(1, -1)] * 2),
                lambda tensor=tensor: torch.tensor(rng.choice((0.0, -1.0, 1e300, float("nan")))),
            )
        )
        tensors[key] = change()
    return serialise(tensors, metadata)


def keys_changed(data: bytes, rng: random.Random) -> bytes:
    tensors, metadata = _contents(data)
    key, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    kind = rng.randrange(6)
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        tensors[key], tensors[other] = tensors[other], tensors[key]
    elif kind == 2:
        tensors[key.rpartition(".")[0] + "." + other.rpartition(".")[2]] = tensors.pop(key)
    elif kind == 3:
        tensors[key.replace(rng.choice("abcdeu01._"), rng.choice("xyz09._"), 1)] = tensors.pop(key)
    elif kind == 4:
        tensors[rng.choice(("x", "unet:9999:up", "lora_unet_.alpha", "base_model.model..lora_A.weight"))] = tensors[key]
    elif metadata:
        name = rng.choice(list(metadata))
        text = metadata[name]
        at = rng.randrange(len(text) + 1)
        metadata[name] = (
            text[:at] + rng.choice(("", "{", "[" * 9, '"', "1e999", ".*.*.*", "(a+)+", "-1")) + text[at + 1 :]
        )
    return serialise(tensors, metadata)


MUTATIONS = (
    *(flip_bytes, cut_or_grow, new_length, text_inserted, value_changed, value_changed, key_doubled),
    *(tensor_changed, tensor_changed, keys_changed, keys_changed),
)


def _contents(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors.torch import load

    header, _ = _parted(data)
    return load(data), dict(json.loads(header).get("__metadata__", {}))


def _parted(data: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def _joined(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def _nudged(numbers: list[int], rng: random.Random) -> list[int]:
    changed = list(numbers)
    changed[rng.randrange(len(changed))] += rng.choice((-1, 1, 2, -(10**6), 2**40))
    return changed


def mutate_peft(original: Path, target: Path, rng: random.Random) -> Path:
    """One of the folder's four files."""
    target.mkdir(exist_ok=True)
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    chosen = rng.choice(files)
    for file in files:
        data = (original / file).read_bytes()
        if file == chosen and file.suffix == ".json":
            at = rng.randrange(len(data))
            data = data[:at] + rng.choice((*TEXTS, b"")) + data[at + rng.choice((0, 1, 9)) :]
        elif file == chosen:
            data = rng.choice(MUTATIONS)(data, rng)
        (target / file).parent.mkdir(exist_ok=True)
        (target / file).write_bytes(data)
    return target


def run_mutations(count: int, base: Path, folder: Path) -> Counter[str]:
    components = bundle_of(base).components
    originals = samples(base, folder)
    data = {name: path.read_bytes() for name, path in originals.items() if path.is_file()}
    for name, path in originals.items():
        assert read_adapter(path, components).updates, f"the {name} sample itself is not read"
    outcome: Counter[str] = Counter()
    for seed in range(count):
        rng = random.Random(seed)
        name = SAMPLES[seed % len(SAMPLES)]
        target = folder / f"mutated-{name}"
        if name == "peft":
            mutate_peft(originals[name], target, rng)
        else:
            target.write_bytes(rng.choice(MUTATIONS)(data[name], rng))
        try:
            read_adapter(target, components)
            outcome["read"] += 1
        except AdapterFileError as error:
            assert str(folder) in str(error), f"{name}, seed {seed}: the message does not name the file: {error}"
            outcome["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {type(error).__name__}: {error}") from error
    return outcome


def check(count: int, base: Path, folder: Path) -> None:
    outcome = run_mutations(count, base, folder)
    print(f"{count} mutated files: {outcome['read']} read, {outcome['refused']} refused")
    assert outcome["read"] + outcome["refused"] == count
    # Neither is trivial: some mutations leave a sound adapter, most do not.
    assert outcome["read"] > count // 50
    assert outcome["refused"] > count // 2


def test_three_thousand_damaged_files_are_read_or_refused(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    check(3_000, tiny_sd1_folder, tmp_path)


@pytest.mark.slow
def test_fifty_thousand_damaged_files_are_read_or_refused(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    check(50_000, tiny_sd1_folder, tmp_path)


def test_a_file_of_twenty_thousand_foreign_modules_is_refused(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    tensors = {f"lora_unet_{index}.lora_down.weight": torch.ones(1) for index in range(20_000)}
    (tmp_path / "a").write_bytes(serialise(tensors, {}))
    with pytest.raises(AdapterFileError, match=r"(?s)20000 problems.*and 19960 more"):
        read_adapter(tmp_path / "a", bundle_of(tiny_sd1_folder).components)
    assert len(read_safetensors(tmp_path / "a").tensors) == 20_000
