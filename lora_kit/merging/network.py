"""Is the merged network the adapted one? Outputs on fixed inputs: live adapters, the merge before its cast, the file.

Imports diffusers and PEFT, and runs whole networks in fp32: only on request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.adapters import eject, load_adapter
from lora_kit.adapters.scaling import apply_scales
from lora_kit.errors import ModelError
from lora_kit.merging.delta import ScaledUpdate, total_bias_delta, total_delta
from lora_kit.merging.report import NetworkError
from lora_kit.merging.weights import component_files
from lora_kit.models.loading import open_layout
from lora_kit.recipe import ModelSection

ARITHMETIC_LIMIT = 1e-3
"""fp32 rounding, carried through a network of some hundred layers, stays well below; a wrong weight far above."""
LATENT_SIDE = 32
Networks = dict[str, nn.Module]
Outputs = dict[str, Tensor]
Updates = Mapping[str, Sequence[ScaledUpdate]]


def compare_networks(base: Path, updates: Updates, out: Path) -> tuple[NetworkError, ...]:
    """Relative errors of every component that changes; all in fp32 on the CPU.

    Raises ModelError if the merge before its cast is not the adapted network to rounding.
    """
    components = sorted({name.partition(".")[0] for name in updates}, reverse=True)
    networks = _load(base, components)
    adapted = _adapted_outputs(networks, updates)
    _add_in_place(networks, updates)
    exact = fixed_outputs(networks)
    del networks  # its memory is needed for the written one
    written = fixed_outputs(_load(out, components))
    errors = tuple(
        NetworkError(
            name,
            relative_error(written[name], adapted[name]),
            relative_error(exact[name], adapted[name]),
            relative_error(written[name], exact[name]),
        )
        for name in components
    )
    for error in errors:
        if not error.arithmetic <= ARITHMETIC_LIMIT:
            raise ModelError(
                f"{error.component}: the merged network differs from the adapted one by {error.arithmetic:.2e} of its "
                f"largest output before any cast; at most {ARITHMETIC_LIMIT:.0e} is rounding."
            )
    return errors


@torch.no_grad()
def fixed_outputs(networks: Networks) -> Outputs:
    """Each network's output on seeded inputs, in eval mode, fp64."""
    runs = {"unet": _unet_output, "text_encoder": _text_output}
    return {name: runs[name](network.eval()).double() for name, network in networks.items()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max |got - expected| / max |expected|."""
    return float((got - expected).abs().max() / expected.abs().max())


def _load(base: Path, components: Sequence[str]) -> Networks:
    variant = component_files(base / "unet").variant if base.is_dir() else None
    # What the network predicts does not matter here, and a single file may not say it.
    section = ModelSection(base=str(base.absolute()), variant=variant, prediction_type="epsilon")
    with open_layout(section) as layout:
        read = {"unet": layout.unet, "text_encoder": layout.text_encoder}
        return {name: read[name](torch.float32).requires_grad_(False) for name in components}


def _unet_output(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    side = min(int(unet.config.sample_size or LATENT_SIDE), LATENT_SIDE)
    latents = torch.randn(2, unet.config.in_channels, side, side, generator=generator)
    timesteps = torch.tensor([100, 800])
    width = getattr(unet.config, "cross_attention_dim", None)
    if width is None:  # reads no text
        return unet(latents, timesteps).sample
    states = torch.randn(2, 77, width, generator=generator)
    return unet(latents, timesteps, states).sample


def _text_output(text_encoder: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config = text_encoder.config
    ids = torch.randint(config.vocab_size, (2, config.max_position_embeddings), generator=generator)
    return text_encoder(ids).last_hidden_state


def _adapted_outputs(networks: Networks, updates: Updates) -> Outputs:
    """`fixed_outputs` with live adapters at their strengths; the networks are given back as they were."""
    scales: dict[str, dict[str, float]] = {}
    for index in range(max(map(len, updates.values()))):
        layer = {name: some[index] for name, some in updates.items() if len(some) > index}
        load_adapter(networks, {name: one.update for name, one in layer.items()}, f"merged_{index}")
        scales[f"merged_{index}"] = {name: one.scale for name, one in layer.items()}
    apply_scales(networks, scales)
    outputs = fixed_outputs(networks)
    for name in reversed(scales):
        eject(networks, name)
    return outputs


@torch.no_grad()
def _add_in_place(networks: Networks, updates: Updates) -> None:
    """Add every ΔW and Δbias to the live fp32 weights: the merge before its cast."""
    for name, some in updates.items():
        component, _, inner = name.partition(".")
        module = networks[component].get_submodule(inner)
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        changes = [(weight, total_delta(some, weight=weight))]
        if isinstance(bias, Tensor):
            changes.append((bias, total_bias_delta(some, bias=bias)))
        for parameter, delta in changes:
            if delta is not None:
                parameter += delta
