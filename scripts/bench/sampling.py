"""Sampling: an adapter live beside merged, and a strength grid beside a loop of diffusers' pipeline calls.

    python scripts/bench/sampling.py [--parts rows,live,grid] [--only tiny,sd1] [--rounds 3] [--cpu]
    python scripts/bench/sampling.py --quick        does it run at all? Its figures mean nothing

`tiny` is the packaged base (64 px, 25 steps); `sd1` has Stable Diffusion 1.5's published configs and random weights
(256 px, 10 steps: a CPU takes long). fp32, guidance 7.5, DDIM, rank 16 on every linear layer and convolution of the
UNet (`--preset`).

rows: a forward of the UNet, seconds for each row of its batch: as many as a lone picture has with guidance, and eight.
live: one picture by `lora_kit`, in turn with the base alone, the adapter folded into the weights (as a merged base
has it), lora_kit's live layers and PEFT's. The base alone is the folded network at strength 0: the base's own modules
and bits, which is checked. Ratios are medians of each round's own.
grid: prompts × strengths, each contender a process of its own, by turns: `generate_columns`, the same with a batch of
one picture, and StableDiffusionPipeline called for each cell with `cross_attention_kwargs={"scale": s}`. Drawing time
is from the loaded base and adapter to the pictures; memory is the process's peak resident; levels are the largest
difference from the pipeline's pictures, of 255.
`--cpu` gives CPU seconds of all threads instead of seconds: for a machine with other work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lora_kit.allocator import keep_freed_blocks

PROMPTS = ("red apple", "tulip", "fox", "cup of coffee")
STRENGTHS = {"tiny": (0.0, 0.25, 0.5, 0.75, 1.0), "sd1": (0.0, 0.5, 1.0)}
PIXELS = {"tiny": 64, "sd1": 256}
STEPS = {"tiny": 25, "sd1": 10}
GRIDS = ("loop of pipeline calls", "lora_kit, one picture at once", "lora_kit")
WEIGHTS = "pytorch_lora_weights.safetensors"
CLOCKS: dict[bool, Callable[[], float]] = {False: time.perf_counter, True: time.process_time}


class Drawn(NamedTuple):
    """What a contender's process tells of a grid."""

    load: float
    draw: float
    peak_mb: float
    pixels: Any
    """uint8 [prompts · strengths, H, W, 3]."""


def main() -> None:
    options = _options()
    if options.child:
        _grid_child(options)
        return
    keep_freed_blocks()  # as commands do; each child says for itself, since the pipeline's user does not
    parts = options.parts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        bases = {name: _base(name, Path(folder), options.quick) for name in options.only.split(",")}
        for name, base in bases.items():
            _write_adapter(Path(folder) / name, base, options.preset)
        if "rows" in parts:
            print(
                f"| base | pixels | targets | rows at once | {' | '.join(STATES)} |\n|---|---|---|---|---|---|---|",
                flush=True,
            )
            for name, base in bases.items():
                _row_costs(name, base, Path(folder) / name, options)
            print()
        if "live" in parts:
            print(f"| base | pixels | targets | base, s | {' | '.join(LIVE[1:])} | live - merged, output |")
            print("|---|---|---|---|---|---|---|---|", flush=True)
            for name, base in bases.items():
                print(_live_row(name, base, Path(folder) / name, options), flush=True)
            print()
        if "grid" in parts:
            print("| base | pixels | pictures | steps | contender | load, s | draw, s | faster | peak MB | levels |")
            print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
            for name, base in bases.items():
                _grid_rows(name, base, Path(folder) / name, options)


STATES = ("folded, s a row", "live", "PEFT live")
LIVE = ("base", "merged / base", "live / base", "PEFT live / base")


def _row_costs(name: str, base: str, folder: Path, options: argparse.Namespace) -> None:
    """What a row of the UNet's batch costs, as one of two and as one of eight; the fastest of rounds, of which the
    first is not counted."""
    import torch

    from lora_kit.adapters import fuse, unfuse
    from lora_kit.inference import prepare

    bundle, side = prepare(base, [folder / WEIGHTS], torch.float32).bundle, _pixels(name, options)
    factor = 2 ** (len(bundle.vae.config.block_out_channels) - 1)
    unet: Any = bundle.unet
    for rows in (2, 8):
        latents = torch.randn(rows, unet.config.in_channels, side // factor, side // factor)
        states, fastest = torch.randn(rows, 77, unet.config.cross_attention_dim), dict.fromkeys(STATES, float("inf"))
        for index, state in enumerate(STATES * (options.rounds + 1)):
            _use_peft(unet, state == STATES[2])
            if state == STATES[0]:
                fuse(bundle)
            began = CLOCKS[options.cpu]()
            with torch.inference_mode():
                unet(latents, torch.tensor([500]), states)
            if index >= len(STATES):
                fastest[state] = min(fastest[state], CLOCKS[options.cpu]() - began)
            if state == STATES[0]:
                unfuse(bundle)
        figures = " | ".join(f"{seconds / rows:.4f}" for seconds in fastest.values())
        print(f"| {name} | {side} | {options.preset} | {rows} | {figures} |", flush=True)


def _live_row(name: str, base: str, folder: Path, options: argparse.Namespace) -> str:
    """One picture in each state of one network, by turns; the first round is not counted."""
    import torch

    from lora_kit.adapters import fuse, unfuse
    from lora_kit.inference import SamplingSettings, draw, prepare, scale_adapters

    prepared = prepare(base, [folder / WEIGHTS], torch.float32)
    unet, side = prepared.bundle.unet, _pixels(name, options)
    settings = SamplingSettings(steps=_steps(name, options), width=side, height=side)
    own = [type(module) for module in prepare(base, [], torch.float32).bundle.unet.modules()]
    seconds: dict[str, list[float]] = {state: [] for state in LIVE}
    outputs: dict[str, Any] = {}
    for index in range(options.rounds + 1):
        for state in LIVE:
            folds = state in LIVE[:2]
            _use_peft(unet, state == LIVE[3])
            scale_adapters(prepared, [0.0 if state == "base" else 1.0])
            if folds:
                fuse(prepared.bundle)
                assert [type(module) for module in unet.modules()] == own, "folded, it is not the base's modules"
            began = CLOCKS[options.cpu]()
            with torch.inference_mode():
                draw(prepared.bundle, PROMPTS[:1], [0], settings=settings)
            seconds[state] += [CLOCKS[options.cpu]() - began] if index else []
            outputs[state] = _output(prepared.bundle)
            if folds:
                unfuse(prepared.bundle)
    ratios = [
        statistics.median(a / b for a, b in zip(seconds[state], seconds["base"], strict=True)) for state in LIVE[1:]
    ]
    away = float((outputs[LIVE[1]] - outputs[LIVE[2]]).abs().max() / outputs[LIVE[2]].abs().max())
    figures = " | ".join(f"{ratio:.3f}" for ratio in ratios)
    return f"| {name} | {side} | {options.preset} | {statistics.median(seconds['base']):.2f} | {figures} | {away:.1e} |"


def _output(bundle: Any) -> Any:
    """The UNet's on fixed inputs."""
    import torch

    generator, config = torch.Generator().manual_seed(0), bundle.unet.config
    latents = torch.randn(1, config.in_channels, 8, 8, generator=generator)
    states = torch.randn(1, 77, config.cross_attention_dim, generator=generator)
    with torch.inference_mode():
        return bundle.unet(latents, torch.tensor([500]), states).sample


def _use_peft(network: Any, peft: bool) -> None:
    """PEFT's own forward, or ours, over the same parameters."""
    from peft.tuners.lora import Conv2d, Linear

    from lora_kit.adapters.joined import JoinedConv2d, JoinedLinear

    for module in network.modules():
        if isinstance(module, Linear):
            module.__class__ = Linear if peft else JoinedLinear
        elif isinstance(module, Conv2d):
            module.__class__ = Conv2d if peft else JoinedConv2d


def _grid_rows(name: str, base: str, folder: Path, options: argparse.Namespace) -> None:
    """A line for each contender: medians over rounds, the ratio of drawing times of the same round."""
    import numpy as np

    drawn: dict[str, list[Drawn]] = {contender: [] for contender in GRIDS}
    for _ in range(options.rounds if name == "tiny" else 1):
        for contender in GRIDS:
            if contender != GRIDS[1] or not options.brief:
                drawn[contender].append(_run_child(name, base, folder, contender, options))
    loop = drawn[GRIDS[0]]
    for contender, rounds in drawn.items():
        if not rounds:
            continue
        load, draw, peak = (statistics.median(getattr(one, field) for one in rounds) for field in Drawn._fields[:3])
        faster = statistics.median(naive.draw / one.draw for naive, one in zip(loop, rounds, strict=True))
        away = int(np.abs(rounds[0].pixels.astype(np.int16) - loop[0].pixels).max())
        facts = (name, _pixels(name, options), len(loop[0].pixels), _steps(name, options), contender)
        numbers = (f"{load:.1f}", f"{draw:.1f}", f"{faster:.2f}", f"{peak:,.0f}", away)
        print("| " + " | ".join(map(str, (*facts, *numbers))) + " |", flush=True)


def _run_child(name: str, base: str, folder: Path, contender: str, options: argparse.Namespace) -> Drawn:
    import numpy as np

    command = [sys.executable, __file__, "--child", contender, "--only", name, "--base", base, "--folder", str(folder)]
    command += ["--steps", str(_steps(name, options)), "--pixels", str(_pixels(name, options))]
    command += ["--cpu"] * options.cpu + ["--quick"] * options.quick
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet)
    told = json.loads(child.stdout.splitlines()[-1])
    return Drawn(told["load"], told["draw"], told["peak_mb"], np.load(folder / "pictures.npy"))


def _grid_child(options: argparse.Namespace) -> None:
    """One contender: load, draw, tell on stdout. The pictures go prompt by prompt, strength by strength."""
    import numpy as np
    import torch

    from lora_kit.training.peak_memory import peak_memory

    clock, strengths = CLOCKS[options.cpu], STRENGTHS[options.only][: 2 if options.quick else None]
    began = clock()
    make = _pipeline_calls if options.child == GRIDS[0] else _ours
    run = make(options, strengths)
    loaded = clock()
    pictures = run()
    drawn = clock()
    np.save(options.folder / "pictures.npy", np.stack([np.asarray(one) for one in pictures]))
    peak = (peak_memory(torch.device("cpu")) or 0) / 2**20
    print(json.dumps({"load": loaded - began, "draw": drawn - loaded, "peak_mb": peak}))


def _ours(options: argparse.Namespace, strengths: tuple[float, ...]) -> Callable[[], list[Any]]:
    import torch

    from lora_kit.inference import SamplingSettings, generate_columns, prepare

    keep_freed_blocks()  # as `lora-kit grid` does
    prepared = prepare(options.base, [options.folder / WEIGHTS], torch.float32)
    batch = 1 if options.child == GRIDS[1] else None
    settings = SamplingSettings(steps=options.steps, width=options.pixels, height=options.pixels, batch_size=batch)

    def run() -> list[Any]:
        drawn = generate_columns(prepared, PROMPTS, [0], strengths, settings)
        return [drawn[strength][place].image for place in range(len(PROMPTS)) for strength in strengths]

    return run


def _pipeline_calls(options: argparse.Namespace, strengths: tuple[float, ...]) -> Callable[[], list[Any]]:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipe: Any = StableDiffusionPipeline.from_pretrained(options.base, dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(options.folder), weight_name=WEIGHTS)
    pipe.set_progress_bar_config(disable=True)
    fixed = {"num_inference_steps": options.steps, "guidance_scale": 7.5}
    fixed |= {"width": options.pixels, "height": options.pixels}

    def run() -> list[Any]:
        return [
            pipe(
                prompt,
                generator=torch.Generator().manual_seed(0),
                cross_attention_kwargs={"scale": strength},
                **fixed,
            ).images[0]
            for prompt in PROMPTS
            for strength in strengths
        ]

    return run


def _base(name: str, root: Path, quick: bool) -> str:
    """A diffusers folder."""
    from lora_kit.models.loading import TINY_FOLDER

    (root / name).mkdir()
    if name == "tiny":
        return str(TINY_FOLDER)
    from families import stable_diffusion

    stable_diffusion("SD 1.5", {}, {}, quick).save_pretrained(root / name / "base")
    return str(root / name / "base")


def _write_adapter(folder: Path, base: str, preset: str) -> None:
    """Random factors of rank 16 on what the preset picks of the UNet, in diffusers' layout; ΔW about a tenth of W."""
    import torch
    from safetensors.torch import save_file

    from lora_kit.models.loading import skeleton
    from lora_kit.recipe import ModelSection, PresetRules
    from lora_kit.targeting import make_plan, module_tree

    plan = make_plan(
        PresetRules.model_validate({"preset": preset, "rank": 16}),
        module_tree({"unet": skeleton(ModelSection(base=base)).unet}),
    )
    generator, tensors = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for target in plan.targets:
        out, *inner = target.module.shape
        ones = [1] * (len(inner) - 1)
        tensors[f"{target.module.name}.lora_A.weight"] = 0.02 * torch.randn(16, *inner, generator=generator)
        tensors[f"{target.module.name}.lora_B.weight"] = 0.02 * torch.randn(out, 16, *ones, generator=generator)
    save_file(tensors, folder / WEIGHTS)


def _pixels(name: str, options: argparse.Namespace) -> int:
    return options.pixels or (64 if options.quick else PIXELS[name])


def _steps(name: str, options: argparse.Namespace) -> int:
    return options.steps or (2 if options.quick else STEPS[name])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="rows,live,grid")
    parser.add_argument("--only", default="tiny,sd1", help="bases")
    parser.add_argument("--preset", default="all")
    parser.add_argument("--rounds", type=int, default=3, help="of the grid at sd1 there is one")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds")
    parser.add_argument("--brief", action="store_true", help="without lora_kit's batch of one")
    parser.add_argument("--quick", action="store_true", help="narrow networks, two steps")
    for name, kind in (("--child", str), ("--base", str), ("--folder", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
