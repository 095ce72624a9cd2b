from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from lora_kit.adapters.formats.container import open_safetensors, read_safetensors, serialise, write_safetensors
from lora_kit.adapters.formats.container_header import DTYPES, MAX_HEADER, MAX_TENSORS
from lora_kit.errors import AdapterFileError

ONE: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def with_header(path: Path, header: object, data: bytes = b"\0" * 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(AdapterFileError) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {name: (torch.randn(3, 5) * 50).to(dtype) for name, dtype in DTYPES.items()}
    tensors["scalar"] = torch.tensor(2.5)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"k": "ü"})
    got = read_safetensors(path)
    assert got.metadata == {"k": "ü"}
    assert got.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert got.tensors[name].shape == tensor.shape
        assert torch.equal(got.tensors[name].double().nan_to_num(), tensor.double().nan_to_num())


def test_the_written_bytes_are_the_serialised_ones(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.float16), "b": torch.ones(2, 2)}
    write_safetensors(tmp_path / "a", tensors, {"k": "v"})
    assert (tmp_path / "a").read_bytes() == serialise(tensors, {"k": "v"})
    assert read_safetensors(tmp_path / "a").tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"shape": [25 << 30]}, "takes 107374182400 bytes, its data_offsets say 24"),
        ({"shape": [1 << 62, 1 << 62]}, "takes more than 2⁶³ bytes"),
        ({"shape": [25 << 30], "data_offsets": [0, 100 << 30]}, "the file is cut off"),
        ({"shape": [2, 2]}, "shape [2, 2] of F32 takes 16 bytes, its data_offsets say 24"),
        ({"dtype": "F16"}, "of F16 takes 12 bytes"),
        ({"data_offsets": [-24, 0]}, "whole numbers from 0 on"),
        ({"data_offsets": [24, 0]}, "in order"),
        ({"data_offsets": [0, 24.0]}, "whole numbers"),
        ({"data_offsets": [False, 24]}, "whole numbers"),
        ({"data_offsets": [0, 24, 24]}, "two whole numbers"),
        ({"data_offsets": [8, 32]}, "ends at byte 32 of the data, which has 24: the file is cut off"),
        ({"shape": [-2, -3]}, "whole numbers from 0 on"),
        ({"shape": [6, *[1] * 8]}, "at most 8"),
        ({"shape": [0, 1 << 60], "data_offsets": [0, 0]}, "has no elements"),
        ({"shape": "23"}, "its shape must be a list"),
        ({"shape": [[2], 3]}, "nested deeper"),
        ({"dtype": "F8_E8M0"}, "dtype F8_E8M0, which lora_kit does not read; allowed: F64"),
        ({"dtype": "FLOAT"}, "unknown dtype 'FLOAT'"),
        ({"dtype": None}, "unknown dtype"),
        ({"more": 1}, "must have dtype, shape and data_offsets, and nothing else"),
    ],
)
def test_an_entry_that_contradicts_the_file_is_told(entry: dict[str, Any], what: str, tmp_path: Path) -> None:
    assert what in refusal(with_header(tmp_path / "a", {"x": ONE | entry}))


@pytest.mark.parametrize(
    ("second", "data", "what"),
    [
        ({"data_offsets": [20, 44]}, 44, "overlaps the one before it (begins at byte 20"),
        ({"data_offsets": [0, 24]}, 24, "overlaps the one before it"),
        ({"data_offsets": [28, 52]}, 52, "leaves a gap before it"),
        ({"data_offsets": [24, 48]}, 50, "2 bytes at its end belong to no tensor"),
    ],
)
def test_the_data_has_neither_gap_nor_overlap(second: dict[str, Any], data: int, what: str, tmp_path: Path) -> None:
    assert what in refusal(with_header(tmp_path / "a", {"x": ONE, "y": ONE | second}, b"\0" * data))


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b"[]", "does not begin with {"),
        (b"{", "is not JSON"),
        (b'{"x": NaN}', "holds NaN"),
        (b'{"x": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"x": 1e999}', "must have dtype"),
        (b'{"x": {"dtype": "F32", "shape": [], "data_offsets": [0, ' + b"9" * 30 + b"]}}", "whole numbers from 0 on"),
        (b'{"\xff": 1}', "is not UTF-8"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"a\\u001b[2J": {}}', "control characters"),
        (b'{"": {}}', "are empty"),
        (b"{" + b'"x":[' * 100_000, "nested deeper"),
        (b'{"x":' + b"[" * 5_000_000, "more than 65536 tensors"),
        (b'{"x":[' + b"0," * 7_000_000 + b"0]}", "more than 65536 tensors"),
        (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
        (b'{"a": {"shape": 1, "shape": 1}}', "has the key 'shape' twice"),
        ({"__metadata__": {"a": 1}}, "values that are not strings: 'a'"),
        ({"__metadata__": ["a"]}, "is not an object of strings"),
        ({"__metadata__": {"a": {"b": "c"}}}, "values that are not strings: 'a'"),
        ({"__metadata__": None}, "is not an object of strings"),
        ({str(index): 1 for index in range(MAX_TENSORS + 1)}, f"lists {MAX_TENSORS + 1} tensors"),
    ],
)
def test_a_header_that_is_none_is_told(header: object, what: str, tmp_path: Path) -> None:
    assert what in refusal(with_header(tmp_path / "a", header))


@pytest.mark.parametrize(
    ("length", "what"),
    [
        (1 << 63, "its header alone should take"),
        (2000, "its header alone should take 2000"),
        (MAX_HEADER + 1, f"allowed: {MAX_HEADER}"),
    ],
)
def test_the_headers_length_is_bounded_by_the_file_and_by_reason(length: int, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{}")
        file.truncate(1000 if length < MAX_HEADER else 3 * MAX_HEADER)  # sparse
    assert what in refusal(path)


def test_what_is_no_regular_file_is_told_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe or a device" in refusal(tmp_path / "pipe")
    assert "a pipe or a device" in refusal(Path("/dev/zero"))
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be opened" in refusal(tmp_path / "loop")
    (tmp_path / "empty").touch()
    assert "cut off or damaged: it has 0 bytes" in refusal(tmp_path / "empty")


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "blob")
    assert torch.equal(read_safetensors(tmp_path / "link.safetensors").tensors["x"], torch.ones(2))


def test_a_file_cut_off_while_it_is_open_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file({"x": torch.ones(100_000)}, path)
    with open_safetensors(path) as file:
        os.truncate(path, 200_000)
        with pytest.raises(AdapterFileError, match="changed while it was being read"):
            file.tensors()


def test_a_file_replaced_while_it_is_open_is_read_as_it_was(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    save_file({"x": torch.ones(1000)}, path)
    save_file({"x": torch.zeros(2000)}, other)
    with open_safetensors(path) as file:
        other.replace(path)
        assert torch.equal(file.tensors()["x"], torch.ones(1000))


def test_the_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(save({"x": torch.ones(10)}))
    tensors = read_safetensors(path).tensors
    with path.open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(b"\0" * 40)
    assert torch.equal(tensors["x"], torch.ones(10))


def test_long_names_do_not_flood_the_message(tmp_path: Path) -> None:
    said = refusal(with_header(tmp_path / "a", {"n" * 1_000_000: ONE | {"shape": [1]}}))
    assert len(re.sub(re.escape(str(tmp_path)), "", said)) < 300


@pytest.mark.parametrize("length", [640, 1152, 640 + 65536])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    tensors = {"a": torch.ones(2)}
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors, {"fill": ""})
    bare = int.from_bytes(path.read_bytes()[:8], "little")
    write_safetensors(path, tensors, {"fill": "x" * (length - bare)})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    with open_safetensors(path) as file:
        assert torch.equal(file.tensors()["a"], tensors["a"])
