"""A LoRA step on a GPU at Stable Diffusion 1.5's size: lora_kit's, and plain diffusers + PEFT on the same GPU.

    python scripts/bench/gpu.py [--batches 1,4,16] [--precisions bf16,fp16] [--targets attention] [--only plain,eager]
    python scripts/bench/gpu.py --device cpu --quick       does it run at all? A toy network; its figures mean nothing

Random weights of the published config; latents and text states at hand; rank 16; clipping, AdamW, fp16's loss scale.

`plain`: diffusers' example with PEFT's `add_adapter`, the U-Net held in the precision, autocast, the loss read every
step. `eager`: lora_kit's layers, channels last, each step read once the next one's passes are queued, as a run does it.
`waiting`: eager, each step read at once, as a run does it with fp16, with several processes and with other optimizers
than fused Adam. `xformers`: eager with that attention. `compiled`: eager as `train.compile` has it. `checkpointed`:
eager, with gradient checkpointing. In fp16 all wait.

Seconds a step are medians over three rows of `--rounds` steps, of which only the whole row is waited for; peak memory
is what torch allocated at most, weights and optimizer included. `compiling` is the first step, which makes the
optimizer's state too. What does not fit the GPU or is not installed says so in its row.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from lora_kit.adapters import inject
from lora_kit.arithmetic.frozen_convolution import freeze_convolutions
from lora_kit.errors import LoraKitError
from lora_kit.models.attention import use_attention
from lora_kit.recipe import PresetRules
from lora_kit.targeting import make_plan, module_tree
from lora_kit.training.compiling import check_device, compile_network
from lora_kit.training.late import HostCopy
from lora_kit.training.peak_memory import peak_memory, reset_peak

CONFIG: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TOY: dict[str, Any] = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VARIANTS = ("plain", "eager", "waiting", "xformers", "compiled", "checkpointed")
WAITING = {"plain", "waiting"}
ROWS = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class Case(NamedTuple):
    """A row of the table."""

    variant: str
    precision: str
    batch: int


class Measured(NamedTuple):
    """Of one case."""

    seconds: float
    first: float
    """Seconds of the first step, which also compiles."""
    peak_bytes: int | None


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    print(f"{_named(device)}, torch {torch.__version__}; {'a toy network' if options.quick else 'SD 1.5, 512 px'}\n")
    print("| precision | batch | | step, s | pictures a second | of plain | peak MB | compiling, s |")
    print("|---|---|---|---|---|---|---|---|")
    plain = dict[tuple[str, int], float]()
    for case in _cases(options):
        found = _tried(case, options, device)
        if isinstance(found, Measured) and case.variant == "plain":
            plain[case.precision, case.batch] = found.seconds
        print(_row(case, found, plain.get((case.precision, case.batch))), flush=True)


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    batches = map(int, options.batches.split(","))
    for precision, batch, variant in product(options.precisions.split(","), batches, options.only.split(",")):
        if (precision, variant) != ("fp16", "waiting"):  # eager is that already
            yield Case(variant, precision, batch)


def _tried(case: Case, options: argparse.Namespace, device: torch.device) -> Measured | str:
    """The case's figures, or why there are none."""
    try:
        return measure(case, options, device)
    except torch.OutOfMemoryError:
        return "does not fit"
    except LoraKitError as error:
        return str(error).split(".")[1].strip() if options.quick else str(error)
    finally:
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(case: Case, options: argparse.Namespace, device: torch.device) -> Measured:
    """Build the network, warm up with two steps, and time three rows of `rounds` more."""
    step = _step(case, options, device)
    first = _timed(step, 1, device)
    step()
    reset_peak(device)
    seconds = [_timed(step, options.rounds, device) for _ in range(ROWS)]
    return Measured(statistics.median(seconds), first, peak_memory(device))


def _timed(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Seconds of each of `count` steps in a row."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        step()
    _wait(device)
    return (time.perf_counter() - began) / count


def _step(case: Case, options: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """One optimizer step of the case."""
    network = _network(case, options, device)
    trainable = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer: Any = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16" and device.type == "cuda")
    inputs = _inputs(case, network, device)
    unread = list[HostCopy]()
    waits = case.variant in WAITING or case.precision == "fp16"

    def step() -> None:
        with torch.autocast(device.type, DTYPES[case.precision]):
            predicted = network(*inputs[:3]).sample
        loss = (predicted.float() - inputs[3]).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        if waits:
            loss.item()
            scaler.step(optimizer)
            scaler.update()
        else:
            while unread:
                unread.pop().read()
            optimizer.found_inf = (loss.isfinite() & norm.isfinite()).logical_not().float()
            optimizer.step()
            unread.append(HostCopy(torch.stack([loss.detach(), norm])))
        optimizer.zero_grad(set_to_none=True)

    return step


def _network(case: Case, options: argparse.Namespace, device: torch.device) -> Any:
    """The U-Net with adapters, as the variant lays it out."""
    torch.manual_seed(0)
    with torch.device(device):
        network: Any = UNet2DConditionModel(**(TOY if options.quick else CONFIG))
    network.to(DTYPES[case.precision]).requires_grad_(False)
    if case.variant == "plain":
        return _plain(network, options)
    network.to(memory_format=torch.channels_last)
    components: dict[str, nn.Module] = {"unet": network}
    tree = module_tree(components)
    plan = make_plan(PresetRules.model_validate({"preset": options.targets, "rank": 16}), tree)
    inject(components, plan)
    freeze_convolutions(network)
    network.train()
    if case.variant == "xformers":
        use_attention("xformers", network)
    elif case.variant == "checkpointed":
        network.enable_gradient_checkpointing()
    elif case.variant == "compiled":
        check_device(device)
        compile_network(network, tree, plan, shapes=1)
    return network


def _plain(network: Any, options: argparse.Namespace) -> Any:
    """As diffusers' text-to-image LoRA example has it, its factors cast to fp32."""
    names = ATTENTION if options.targets == "attention" else _leaves(network, options.targets)
    network.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=names))
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return network.train()


def _leaves(network: nn.Module, preset: str) -> list[str]:
    plan = make_plan(PresetRules.model_validate({"preset": preset, "rank": 16}), module_tree({"unet": network}))
    return [target.module.name.removeprefix("unet.") for target in plan.targets]


def _inputs(case: Case, network: Any, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Noisy latents, timesteps, text states, and what is to be predicted."""
    side, width, dtype = network.config.sample_size, network.config.cross_attention_dim, DTYPES[case.precision]
    shape = (case.batch, 4, side, side)
    torch.manual_seed(1)
    noisy = torch.randn(shape, device=device, dtype=dtype)
    times = torch.full((case.batch,), 500, device=device)
    states = torch.randn(case.batch, 77, width, device=device, dtype=dtype)
    return noisy, times, states, torch.randn(shape, device=device)


def _row(case: Case, found: Measured | str, plain: float | None) -> str:
    start = f"| {case.precision} | {case.batch} | {case.variant} |"
    if isinstance(found, str):
        return f"{start} {found} | | | | |"
    times = f"{found.seconds:.4f} | {case.batch / found.seconds:.2f}"
    ratio = f"{plain / found.seconds:.2f}" if plain else ""
    peak = f"{found.peak_bytes / 1e6:,.0f}" if found.peak_bytes is not None else ""
    compiling = f"{found.first:.1f}" if case.variant == "compiled" else ""
    return f"{start} {times} | {ratio} | {peak} | {compiling} |"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--precisions", default="bf16,fp16")
    parser.add_argument("--targets", default="attention", help="a preset")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a toy network, batch as given")
    return parser.parse_args()


if __name__ == "__main__":
    main()
