"""A base that is cast or laid out anew while it is loaded is never held twice, and its numbers are the file's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kit.models.mapped import cast, channels_last, rewrite

LAYERS, SIDE = 24, 1448  # 24 x 8.4 MB in fp32

SCRIPT = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from torch import nn
from lora_kit.models.mapped import cast
from lora_kit.training.peak_memory import peak_memory, reset_peak, resident_memory
cpu = torch.device("cpu")
with torch.device("meta"):
    network = nn.Sequential(*[nn.Linear({side}, {side}, bias=False) for _ in range({layers})])
before = resident_memory()
reset_peak(cpu)
network.load_state_dict(load_file(sys.argv[1]), assign=True)
network.to(torch.bfloat16) if sys.argv[2] == "plain" else cast(network, torch.bfloat16)
print(peak_memory(cpu) - before)
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "weights.safetensors"
    save_file({f"{index}.weight": torch.full((SIDE, SIDE), float(index)) for index in range(LAYERS)}, path)
    return path


def _added(path: Path, way: str) -> int:
    """Bytes that loading and casting to bf16 adds at most, in a process of its own."""
    script = SCRIPT.format(side=SIDE, layers=LAYERS)
    done = subprocess.run([sys.executable, "-c", script, str(path), way], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells and takes back pages")
def test_a_cast_base_is_not_held_beside_its_file(large_file: Path) -> None:
    half, one = LAYERS * SIDE * SIDE * 2, SIDE * SIDE * 4
    # Every weight in bf16, one of them in fp32 beside it; pages at the weights' ends, and what Python itself takes.
    assert _added(large_file, "cast") < half + one + 8 * 2**20
    assert _added(large_file, "plain") > 2 * half  # what it would be


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_numbers_are_those_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 50, 3), nn.Linear(401, 77), nn.LayerNorm(33))
    wanted = {name: weight.clone() for name, weight in made.state_dict().items()}
    save_file(wanted, tmp_path / "weights.safetensors")
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv2d(3, 50, 3), nn.Linear(401, 77), nn.LayerNorm(33))
    network.load_state_dict(load_file(tmp_path / "weights.safetensors"), assign=True)
    objects = list(network.parameters())
    cast(network, dtype)
    channels_last(network)
    assert all(one is other for one, other in zip(network.parameters(), objects, strict=True))
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, wanted[name].to(dtype))


def test_neighbours_in_the_file_keep_what_was_written_into_them(tmp_path: Path) -> None:
    sizes = {"a": 5000, "b": 3, "c": 9001}  # fp32: the ends of one share a page with the next
    save_file({name: torch.full((size,), 1.0) for name, size in sizes.items()}, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    holders = {name: nn.ParameterList([nn.Parameter(value)]) for name, value in loaded.items()}
    with torch.no_grad():
        holders["b"][0].fill_(2.0)
    for name in ("a", "c"):
        rewrite(holders[name], lambda weight: weight + 1)
    assert all(bool((holder[0] == 2).all()) for holder in holders.values())


def test_memory_of_no_file_is_left_alone() -> None:
    network = nn.Linear(2000, 2000)
    old = network.weight.data
    before = old.clone()
    cast(network, torch.bfloat16)
    assert torch.equal(old, before)
