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
from lora_kit.models.first_stage import latent_channels, vae_factor
from lora_kit.recipe import Recipe
from lora_kit.targeting import TargetPlan
from lora_kit.targeting.quantised import Quantised
from lora_kit.training.build import make_trainable
from lora_kit.training.learned_tokens import TokenRows
from lora_kit.training.precision import DTYPES, base_dtype
from lora_kit.training.reckoning.few_bits import hold_in_few_bits
from lora_kit.training.reckoning.live_bytes import LiveBytes, saved_bytes


class Activations(NamedTuple):
    """What a micro-batch's passes hold beside weights and optimizer."""

    saved: int
    """Bytes that autograd keeps from the forward pass for the backward pass; with gradient checkpointing what blocks
    are computed again from."""
    peak: int
    """Bytes of all tensors at the fullest moment of both passes, gradients of the weights too."""
    gradients: int
    """Bytes of the weights' gradients, as far as the networks trained have any."""


def picture_side(recipe: Recipe) -> int:
    """Of the largest pictures that are trained on, as a square: buckets have as many pixels."""
    sides = {source.resolution or recipe.data.resolution for source in recipe.data.sources}
    several = recipe.data.buckets.resolutions if recipe.data.buckets else None
    return max(sides | set(several or ()))


def micro_batch(recipe: Recipe) -> int:
    """Pictures in the largest forward pass of one process."""
    return min(recipe.train.micro_batch_size or recipe.data.batch_size, recipe.data.batch_size)


def keeps_latents(recipe: Recipe) -> bool:
    """Whether steps find latents at hand; else the VAE is part of a step."""
    return recipe.data.cache != "none" and recipe.data.crop == "center"


def trains_text(recipe: Recipe, plan: TargetPlan) -> bool:
    """Whether gradients flow into the text encoder."""
    return bool(recipe.tokens) or any(target.module.component == "text_encoder" for target in plan.targets)


def reckon(recipe: Recipe, plan: TargetPlan, few_bits: Quantised | None = None, device: str = "cpu") -> Activations:
    """Run one micro-batch on fake tensors of `device`, which need not be there. Captions count as one chunk each.

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
        return _passes(recipe, bundle, device, trains_text(recipe, plan))


def _passes(recipe: Recipe, bundle: ModelBundle, device: str, with_text: bool) -> Activations:
    bundle.tokenizer = _FullCaptions()
    count = micro_batch(recipe)
    trained = [weight for weight in _weights(bundle.components.values()) if weight.requires_grad]
    several = count < recipe.data.batch_size
    for weight in trained if several else ():  # those of the micro-batches before
        weight.grad = torch.empty_like(weight)
    known = list(_weights(bundle.networks))
    with LiveBytes([*known, *(weight.grad for weight in trained if weight.grad is not None)]) as live:
        if not keeps_latents(recipe):
            _encode(recipe, bundle)
        with _autocast(recipe, device), saved_bytes(known) as saved:
            loss = _loss(recipe, bundle, with_text)
        kept = sum(saved.values())
        loss.backward()
    gradients = sum(_size(weight.grad) for weight in trained if weight.grad is not None)
    return Activations(kept, live.peak + (gradients if several else 0), gradients)


def _loss(recipe: Recipe, bundle: ModelBundle, with_text: bool) -> Tensor:
    """A squared error: other losses differ in a few tensors of the latents' size."""
    count, side = micro_batch(recipe), picture_side(recipe) // vae_factor(bundle)
    noisy = torch.empty(count, latent_channels(bundle.vae), side, side)
    config: Any = bundle.unet.config
    more = int(config.in_channels) - noisy.shape[1]
    beside = torch.empty(count, more, side, side) if more > 0 else None
    condition: Any = None
    if bundle.has_text:
        with torch.set_grad_enabled(with_text):
            condition = bundle.family.condition(bundle, [""] * count)
    times = torch.zeros(count, dtype=torch.int64)
    predicted = bundle.family.predict(bundle, noisy, times, condition, beside)
    return (predicted.float() - torch.empty_like(noisy)).square().mean()


def _encode(recipe: Recipe, bundle: ModelBundle) -> None:
    side = picture_side(recipe)
    bundle.family.encode(bundle, torch.empty(micro_batch(recipe), 3, side, side))


def _autocast(recipe: Recipe, device: str) -> Any:
    precision = DTYPES[recipe.train.mixed_precision]
    return torch.autocast(device, precision, enabled=precision != torch.float32)


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
