"""A step's forward and backward pass on fake tensors: shapes, precisions and lifetimes of a real one, and no numbers.

The family's own prediction runs through the networks as a run builds them, adapters, precision and checkpointing
included, so that what autograd keeps is what it will keep, and no table of formulas has to follow the libraries.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kit.adapters.trained_parts import TrainedParts
from lora_kit.models import ModelBundle, skeleton
from lora_kit.recipe import Recipe
from lora_kit.targeting import TargetPlan
from lora_kit.targeting.quantised import Quantised
from lora_kit.training.build import make_trainable
from lora_kit.training.learned_tokens import TokenRows
from lora_kit.training.precision import base_dtype
from lora_kit.training.reckoning.few_bits import hold_in_few_bits
from lora_kit.training.reckoning.live_bytes import LiveBytes, Scratch, saved_bytes
from lora_kit.training.reckoning.scratch import cpu_scratch
from lora_kit.training.reckoning.stages import Stages, autocast, predict
from lora_kit.training.sizes import keeps_latents, micro_batch, picture_side


class Activations(NamedTuple):
    """What a micro-batch's passes hold beside weights and optimizer."""

    saved: int
    """Bytes that autograd keeps from the forward pass for the backward pass; with gradient checkpointing what blocks
    are computed again from."""
    peak: int
    """Bytes of all tensors at the fullest moment of both passes, gradients of the weights too."""
    gradients: int
    """Bytes of the weights' gradients, as far as the networks trained have any."""
    encoding: int = 0
    """Bytes of all tensors while pictures are encoded to be kept; 0 where none are."""
    measuring: int = 0
    """Bytes of all tensors while held-out pictures are measured; 0 without any."""
    drawing: int = 0
    """Bytes of all tensors while validation draws; 0 where it does not."""
    rested: int = 0
    """Bytes of the encoders' weights that are given back after encoding."""
    kept: int = 0
    """Bytes of latents and captions' states that memory keeps."""
    waiting: int = 0
    """Bytes of the UNet's weights that are in its file alone while pictures are encoded."""


def trains_text(recipe: Recipe, plan: TargetPlan) -> bool:
    """Whether gradients flow into the text encoder."""
    return bool(recipe.tokens) or any(target.module.component == "text_encoder" for target in plan.targets)


def reckon(
    recipe: Recipe, plan: TargetPlan, few_bits: Quantised | None = None, device: str = "cpu", samples: int = 0
) -> Activations:
    """Run one micro-batch on fake tensors of `device`, which need not be there. Captions count as one chunk each.
    samples: pictures that something is kept of.

    Nothing is allocated but Python's own objects; the base's configs are read, no weights.
    """
    bundle = skeleton(recipe.model)
    bundle.family = bundle.family.for_recipe(recipe)
    networks: list[Any] = list(bundle.components.values())
    for network in networks:
        nn.Module.to(network, base_dtype(recipe)).requires_grad_(False)
    bundle.vae.requires_grad_(False)
    make_trainable(recipe, bundle, plan)
    if few_bits is not None:
        hold_in_few_bits(bundle.components, few_bits)
    if recipe.tokens:
        _learn_a_token(bundle)
    with FakeTensorMode(), torch.device(device):
        for network in bundle.networks:
            _put_on(network, device)
        bundle.tokenizer = _FullCaptions()
        scratch = cpu_scratch if device == "cpu" else None
        found = _step(recipe, bundle, device, trains_text(recipe, plan), scratch)
        other = Stages(recipe, bundle, device, scratch)
        with_text = trains_text(recipe, plan)
        found = found._replace(rested=other.rested(with_text), kept=other.kept(samples, with_text))
        found = found._replace(encoding=other.encoding(), waiting=other.waiting())
        return found._replace(measuring=other.measuring(), drawing=other.drawing())


def _step(recipe: Recipe, bundle: ModelBundle, device: str, with_text: bool, scratch: Scratch | None) -> Activations:
    count = micro_batch(recipe)
    trained = [weight for weight in _weights(bundle.components.values()) if weight.requires_grad]
    several = count < recipe.data.batch_size
    for weight in trained if several else ():  # those of the micro-batches before
        weight.grad = torch.empty_like(weight)
    known = list(_weights(bundle.networks))
    with LiveBytes([*known, *(weight.grad for weight in trained if weight.grad is not None)], scratch) as live:
        if not keeps_latents(recipe):
            _encode(recipe, bundle)
        with autocast(recipe, device), saved_bytes(known) as saved:
            loss = _loss(recipe, bundle, with_text)
        kept = sum(saved.values())
        loss.backward()
    gradients = sum(_size(weight.grad) for weight in trained if weight.grad is not None)
    return Activations(kept, live.peak + (gradients if several else 0), gradients)


def _loss(recipe: Recipe, bundle: ModelBundle, with_text: bool) -> Tensor:
    """A squared error: other losses differ in a few tensors of the latents' size."""
    predicted = predict(bundle, micro_batch(recipe), picture_side(recipe), with_text)
    return (predicted.float() - torch.empty_like(predicted, dtype=torch.float32)).square().mean()


def _encode(recipe: Recipe, bundle: ModelBundle) -> None:
    side = picture_side(recipe)
    bundle.family.encode(bundle, torch.empty(micro_batch(recipe), 3, side, side))


class _FullCaptions:
    """Stands for a tokenizer: every caption has as many tokens as there may be."""

    model_max_length = 2**30
    added_tokens_encoder: dict[str, int] = {}  # noqa: RUF012

    def __call__(self, captions: list[str], max_length: int, **options: Any) -> Any:
        """Token ids [captions, max_length]."""
        return SimpleNamespace(input_ids=torch.zeros(len(captions), max_length, dtype=torch.int64))


def _learn_a_token(bundle: ModelBundle) -> None:
    embedding = bundle.text_encoder.get_input_embeddings()
    first, width = embedding.weight.shape
    bundle.text_encoder.set_input_embeddings(TokenRows(embedding, first, [torch.empty(1, width, device="meta")]))


def _put_on(network: nn.Module, device: str) -> None:
    """Every weight of a network on the meta device becomes a fake one on `device`, laid out alike."""
    for module in network.modules():
        for name, weight in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            setattr(module, name, nn.Parameter(_like(weight, device), weight.requires_grad))
        for name, value in [*module.named_buffers(recurse=False, remove_duplicate=False)]:
            setattr(module, name, _like(value, device))
        if isinstance(module, TrainedParts):
            module.begun = {name: _like(value, device) for name, value in module.begun.items()}


def _like(value: Tensor, device: str) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _weights(networks: Iterable[nn.Module]) -> Iterable[Tensor]:
    for network in networks:
        yield from network.parameters()
        yield from network.buffers()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
