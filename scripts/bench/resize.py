"""`lora-kit resize` of an adapter on every layer of Stable Diffusion 1.5, against a dense SVD of every ΔW.

    python scripts/bench/resize.py [--rank 64] [--to 16] [--dense-all]

The adapter has random factors (fp16) for every linear and convolution of UNet and text encoder. What a user would
otherwise run multiplies ΔW out and takes its SVD in fp32 (sd-scripts' resize_lora.py, which even asks for full
matrices; here the cheaper thin ones). As that takes many minutes, one module of each distinct shape is decomposed
densely, and its time counted as often as the shape occurs; `--dense-all` does every module. Both sides run in this
process on the same threads; singular values, and the errors of the two truncations, are compared. The whole command,
from cold start to the file on disk, is timed in a process of its own, with its peak resident memory (getrusage).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lora_kit.adapters import AdapterState, LoraUpdate, Update, write_kohya
from lora_kit.algebra import Budget, ModuleLoss, resize
from lora_kit.algebra.lowrank import singular_values
from lora_kit.models.known_trees import known_trees

Result = TypeVar("Result")


class Row(NamedTuple):
    """One distinct shape."""

    shape: tuple[int, ...]
    count: int
    ours_s: float
    """Mean over its modules."""
    dense_s: float
    """Of one module, or the mean of all."""
    values_off: float
    """Largest difference of the singular values over the largest of them."""
    error_off: float
    """Difference of the two truncation errors over ‖ΔW‖."""


def random_adapter(rank: int) -> AdapterState:
    """Factors with a spectrum that falls as k^-1/2; fp16."""
    generator = torch.Generator().manual_seed(0)
    updates: dict[str, Update] = {}
    falling = torch.arange(1, rank + 1) ** -0.5
    for module in known_trees()["sd1"]:
        if module.kind == "other":
            continue
        ones = [1] * (len(module.shape) - 2)
        down = torch.randn(rank, *module.shape[1:], generator=generator) / module.shape[1] ** 0.5
        up = torch.randn(module.shape[0], rank, *ones, generator=generator) * falling.view(1, -1, *ones) * 0.02
        updates[module.name] = LoraUpdate(down.half(), up.half(), rank / 2)
    return AdapterState(updates, {"ss_base_model_version": "sd_v1"})


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def dense_svd(update: LoraUpdate) -> Tensor:
    """What a resize by the dense matrix computes; the singular values, fp32."""
    strength = update.alpha / update.rank
    delta = strength * update.up.float().flatten(1) @ update.down.float().flatten(1)
    return torch.linalg.svd(delta, full_matrices=False).S


def rows(
    updates: dict[str, Update], losses: dict[str, ModuleLoss], ours: dict[str, float], all_modules: bool
) -> Iterator[Row]:
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, update in updates.items():
        assert isinstance(update, LoraUpdate)
        by_shape.setdefault((update.up.shape[0], *update.down.shape[1:]), []).append(name)
    for shape, names in by_shape.items():
        seconds, values_off, error_off = [], 0.0, 0.0
        for name in names if all_modules else names[:1]:
            update, loss = updates[name], losses[name]
            assert isinstance(update, LoraUpdate)
            values, took = timed(lambda update=update: dense_svd(update))
            seconds.append(took)
            factors = update.factors(torch.float64)
            assert factors is not None
            exact = singular_values(factors)
            values_off = max(values_off, float((values[: len(exact)] - exact).abs().max() / exact[0]))
            error_off = max(error_off, abs(float(values[loss.rank :].double().norm()) - loss.lost) / loss.norm)
        mean = sum(ours[name] for name in names) / len(names)
        yield Row(shape, len(names), mean, sum(seconds) / len(seconds), values_off, error_off)


def whole_command(source: Path, rank: int, out: Path) -> tuple[float, float]:
    """(seconds, peak MiB) of one cold `lora-kit resize`."""
    script = (
        "import resource, sys\n"
        "from lora_kit.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script, "resize", str(source), "--rank", str(rank), "--out", str(out), "--json"]
    done, seconds = timed(lambda: subprocess.run(command, capture_output=True, text=True, check=True))
    return seconds, float(done.stderr.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--to", type=int, default=16)
    parser.add_argument("--dense-all", action="store_true")
    options = parser.parse_args()
    updates = random_adapter(options.rank).updates
    budget = Budget(rank=options.to)
    resize(dict(list(updates.items())[:3]), budget)  # first calls load libraries
    losses, ours = {}, {}
    for name, update in updates.items():
        resized, ours[name] = timed(lambda name=name, update=update: resize({name: update}, budget))
        losses[name] = resized.losses[0]
    found = sorted(rows(updates, losses, ours, options.dense_all), key=lambda row: -row.count * row.dense_s)
    report(found, len(updates), options)


def report(found: list[Row], modules: int, options: argparse.Namespace) -> None:
    ours, dense = sum(row.count * row.ours_s for row in found), sum(row.count * row.dense_s for row in found)
    one = f"one module of each of {len(found)} shapes, counted as often as the shape occurs"
    threads = f"{torch.get_num_threads()} threads"
    print(
        f"r {options.rank} → r {options.to}, {modules} modules, {threads}; dense: "
        f"{'every module' if options.dense_all else one}\n"
    )
    print("| weight | modules | lora_kit, ms each | dense SVD, ms each | ratio | values differ by | errors differ by |")
    print("|---|---|---|---|---|---|---|")
    for row in found[:10]:
        shape = " × ".join(map(str, row.shape))
        ratio = row.dense_s / row.ours_s
        print(
            f"| {shape} | {row.count} | {row.ours_s * 1e3:.1f} | {row.dense_s * 1e3:.0f} | {ratio:.0f} "
            f"| {row.values_off:.1e} | {row.error_off:.1e} |"
        )
    values, errors = max(row.values_off for row in found), max(row.error_off for row in found)
    print(f"| all | {modules} | {ours:.1f} s | {dense:.0f} s | {dense / ours:.0f} | {values:.1e} | {errors:.1e} |\n")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "r.safetensors"
        write_kohya(source, random_adapter(options.rank))
        seconds, peak = whole_command(source, options.to, Path(folder) / "out.safetensors")
        size = source.stat().st_size / 2**20
    print(f"`lora-kit resize` of the {size:.0f} MiB file, a cold process: {seconds:.1f} s, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
