"""What the allocator is asked for, told by the kernel's count of fresh pages and never by the clock."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit import __main__ as program
from lora_kit import allocator

PASSES = """
import resource, sys
import torch
from lora_kit.allocator import keep_freed_blocks
assert sys.argv[1] == "as it is" or keep_freed_blocks(*map(int, sys.argv[2:]))
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)  # 64 MiB, twice what glibc may keep by itself
before = faults()
for _ in range(32):
    torch.ones(2**24)
print((faults() - before) * resource.getpagesize())
"""
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no mallopt to ask")


def fresh_bytes(*how: str) -> int:
    """Bytes of fresh pages that 32 tensors of 64 MiB took, one after the other."""
    done = subprocess.run([sys.executable, "-c", PASSES, *how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@GLIBC
def test_a_freed_block_serves_the_next_tensor() -> None:
    """Each of the 32 would take its own 64 MiB of pages from the kernel. Kept, they take a few places in turn: before
    glibc 2.38 an aligned block does not fit where one of just its size was."""
    assert fresh_bytes("as it is") >= 32 * 2**26
    assert fresh_bytes("kept") <= 16 * 2**26  # so that at least half of the blocks took none


@GLIBC
def test_only_blocks_below_a_size_are_kept() -> None:
    """Those of 64 MiB are kept below 128 MiB, and not below 32."""
    assert fresh_bytes("kept", str(2**27)) <= 16 * 2**26
    assert fresh_bytes("kept", str(2**25)) >= 32 * 2**26


@GLIBC
def test_what_is_kept_can_be_given_back() -> None:
    """malloc_trim(3) returns the kept pages: at rest nothing above what was resident before stays but a page or so."""
    script = """
import ctypes, pathlib, torch
from lora_kit.allocator import keep_freed_blocks
keep_freed_blocks()
def resident(): return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
torch.ones(2**24)
kept = resident()
ctypes.CDLL(None).malloc_trim(0)
print(kept - before, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept >= 2**25
    assert left < 2**24


@GLIBC
def test_a_weight_among_them_leaves_no_gap() -> None:
    """What weights are cast or quantised from is freed beside what lasts. With pages of its own it goes back to the
    system at once, while blocks below are kept as before; in a heap it would stay."""
    script = """
import contextlib, pathlib, sys, torch
from lora_kit.allocator import keep_freed_blocks, pages_of_their_own
keep_freed_blocks()
def resident(): return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
before, kept = resident(), []
with pages_of_their_own() if sys.argv[1] == "apart" else contextlib.nullcontext():
    with pages_of_their_own() if sys.argv[1] == "apart" else contextlib.nullcontext():
        pass
    for _ in range(16):
        whole = torch.ones(2**21)
        kept.append(whole.to(torch.uint8))
del whole
weights = sum(one.numel() for one in kept)
gaps = resident() - before - weights
torch.ones(2**24)
print(gaps, resident() - before - weights - gaps)
"""
    left: dict[str, tuple[int, ...]] = {}
    for how in ("together", "apart"):
        done = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True)
        left[how] = tuple(map(int, done.stdout.split()))
    size = 2**23
    assert left["apart"][0] < size / 2 <= left["together"][0]
    assert left["apart"][1] >= 2**25  # a large block outside is kept again


@GLIBC
def test_the_size_asked_for_stands_again_after_weights() -> None:
    """Outside `pages_of_their_own` freed blocks of 1 MiB are kept where all below 2 MiB are, one of 64 MiB is not."""
    script = """
import pathlib, torch
from lora_kit.allocator import keep_freed_blocks, pages_of_their_own
keep_freed_blocks(2**21)
with pages_of_their_own():
    pass
def resident(): return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
torch.ones(2**24)
large = resident() - before
several = [torch.ones(2**18) for _ in range(16)]
del several
print(large, resident() - before - large)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    large, small = map(int, done.stdout.split())
    assert large < 2**22
    assert small >= 2**23


RESTARTED = """
import os, sys
from lora_kit.allocator import restart_with_few_held_back
print("begun", os.getpid(), flush=True)
restart_with_few_held_back()
print([os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], input()])
"""


def restarted(place: Path, **environment: str) -> list[str]:
    """What a process says that restarts itself, given two arguments and a line to read."""
    script = place / "own.py"
    script.write_text(RESTARTED)
    own = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "LORA_KIT_RESTARTED")}
    command = [sys.executable, str(script), "two words", "--flag"]
    done = subprocess.run(
        command, input="typed\n", capture_output=True, text=True, check=True, env={**own, **environment}
    )
    return done.stdout.splitlines()


@GLIBC
def test_a_restarted_process_is_the_same_one_with_its_arguments_and_input(tmp_path: Path) -> None:
    *begun, end = restarted(tmp_path)
    assert len(begun) == 2 and begun[0] == begun[1]  # one process number: whoever waits for it sees nothing
    assert end == "['glibc.malloc.tcache_count=1', 'two words', '--flag', 'typed']"


@GLIBC
def test_what_the_user_told_glibc_stays(tmp_path: Path) -> None:
    *begun, end = restarted(tmp_path, GLIBC_TUNABLES="glibc.malloc.tcache_count=7")
    assert len(begun) == 1 and end.startswith("['glibc.malloc.tcache_count=7',")
    *begun, end = restarted(tmp_path, GLIBC_TUNABLES="glibc.malloc.hugetlb=1")
    assert len(begun) == 2 and end.startswith("['glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=1',")


@GLIBC
def test_a_process_whose_environment_does_not_stay_restarts_once(tmp_path: Path) -> None:
    """As one with more rights than its user's, from which glibc takes its variable: it would restart for ever."""
    assert len(restarted(tmp_path, LORA_KIT_RESTARTED="1")) == 2


@pytest.mark.parametrize("why", ["no room", "another C library"])
def test_where_there_is_no_restarting_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    asked = list[object]()

    def refused(*arguments: object) -> None:
        asked.append(arguments)
        raise OSError("Argument list too long")

    monkeypatch.setattr(os, "execve", refused)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("LORA_KIT_RESTARTED", raising=False)
    monkeypatch.setattr(allocator, "_function", lambda _: None if why == "another C library" else print)
    allocator.restart_with_few_held_back()
    assert len(asked) == (why == "no room")


@pytest.mark.parametrize(
    ("arguments", "restarts"),
    [(["--help"], False), (["plan", "a.yaml"], False), (["plan", "a.yaml", "--probe"], True), (["train", "a"], True)],
)
def test_commands_restart_that_compute_with_whole_networks(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], restarts: bool
) -> None:
    asked = list[bool]()
    monkeypatch.setattr(allocator, "restart_with_few_held_back", lambda: asked.append(True))
    monkeypatch.setattr(program, "main", asked.append)
    program.console(arguments)
    assert asked == [True] * restarts + [arguments]
