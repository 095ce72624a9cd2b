"""FSDP: networks whose weights are spread over the processes, and whole tensors made of them again.

torch's `fully_shard` (FSDP2, Zhao et al. 2023 describe the first version): a block's weights are gathered for its
forward and backward pass only. Adapters are small and stay whole in every process; with `method: full` the trained
weights, their gradients and the optimizer's state are sharded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_kit.errors import RecipeError
from lora_kit.recipe import Recipe
from lora_kit.recipe.rules import listed
from lora_kit.training.processes.launcher import Sharding

_BY_ELEMENT = ("adamw", "adam", "sgd")


def check_sharding(recipe: Recipe) -> None:
    """Raise RecipeError, with all of it, for what a recipe asks for and sharded networks cannot do."""
    problems = list(_problems(recipe))
    if problems:
        listed = "\n  ".join(problems)
        raise RecipeError(f"With FSDP a run cannot do what this recipe asks for:\n  {listed}")


def shard(networks: Mapping[str, nn.Module], sharding: Sharding, device: torch.device) -> None:
    """Spread the networks' weights over all processes, in place; each keeps its part, on the device.

    Must come after adapters are injected and before the optimizer is made: trained weights are other Parameter objects
    afterwards. Only one block at a time is whole on the device.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for network in networks.values():
        network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue] (stub lacks the overload)
        whole = _adapter_parameters(network)
        for weight in whole:
            weight.data = weight.data.to(device)
        for block in _blocks(network):
            _shard_one(block, mesh, sharding.reshard_after_forward, whole)
        _shard_one(network, mesh, sharding.reshard_after_forward, whole)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of a sharded one every process must ask, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, as `like` is held: this process's part of it, or itself."""
    if not isinstance(like, DTensor):
        return tensor
    there = tensor.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def whole_network(network: nn.Module, keeps: bool, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy on the CPU of a network without adapters, its weights whole and in `dtype` (None: their own); the network
    itself if it is neither sharded nor to be cast.

    Every process must ask. keeps: whether this one wants it; the others get the network back as it is.
    """
    is_cast = any(weight.dtype != (dtype or weight.dtype) for weight in network.parameters())
    if not isinstance(network, FSDPModule) and not is_cast:
        return network
    gathered: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        made = whole(tensor)
        if keeps:
            gathered[name] = made.detach().to("cpu", dtype if made.is_floating_point() else None)
    if not keeps:
        return network
    kind = cast(Any, type(network).__mro__[2 if isinstance(network, FSDPModule) else 0])
    config = cast(Any, network).config
    with init_empty_weights(include_buffers=False):
        copy: nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    copy.load_state_dict(gathered, assign=True)
    return copy.eval()


def _problems(recipe: Recipe) -> Iterator[str]:
    if any(source.target == "base" for source in recipe.data.sources):
        yield "`target: base` of a source: processes would run their networks unequally often. Launch without FSDP."
    if recipe.train.compile:
        yield "train.compile: compiled blocks were not tried on sharded weights. Set it to false, or launch with DDP."
    rules = listed(recipe.targets)
    if not any(rule.method == "full" for rule in rules):
        return
    if recipe.optimizer.name not in _BY_ELEMENT:
        yield (
            f"optimizer.name {recipe.optimizer.name} with `method: full`: it looks at whole weights. Use "
            f"{', '.join(_BY_ELEMENT)}."
        )
    if recipe.train.mixed_precision == "fp16":
        yield "train.mixed_precision fp16 with `method: full`: each process would scale its part alone. Use bf16."


def _blocks(network: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: what the network's library never splits over devices; inner ones first."""
    names = set(cast("list[str]", getattr(network, "_no_split_modules", None) or []))
    found = [module for module in network.modules() if type(module).__name__ in names and module is not network]
    return found[::-1]  # modules() gives a module before those in it


def _adapter_parameters(network: nn.Module) -> set[nn.Parameter]:
    """Weights that were put in, which stay whole: those in PEFT's or in our own layers beside `base_layer`."""
    own = {id(weight) for name, weight in network.named_parameters() if _is_added(name, network)}
    return {weight for weight in network.parameters() if id(weight) in own}


def _is_added(name: str, network: nn.Module) -> bool:
    """Whether a parameter lies beneath an adapted module and not in the module itself."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        above = network.get_submodule(".".join(parts[: depth - 1]))
        if hasattr(above, "base_layer"):
            return parts[depth - 1] != "base_layer"
    return False


def _shard_one(module: nn.Module, mesh: DeviceMesh, reshard: bool, ignored: set[nn.Parameter]) -> None:
    sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=reshard, ignored_params=ignored)
    # Gradients are summed: each sample's loss counts 1 / the step's samples, wherever it is computed. Gloo knows no
    # sum with a factor, which is what a factor of one would be otherwise.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
