"""Is the merged base the adapted base? Outputs on fixed inputs, and a sample of weights in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.adapters import AdapterState, eject, load_adapter, set_scales
from lora_kit.errors import ModelError
from lora_kit.merging.delta import ScaledUpdate, rounding_bound, total_delta
from lora_kit.merging.report import NetworkError, WeightCheck
from lora_kit.models import ModelBundle

ARITHMETIC_LIMIT = 1e-3
"""fp32 rounding, carried through a network of some hundred layers, stays well below; a wrong weight far above."""
SAMPLE = 8
LATENT_SIDE = 32
Outputs = dict[str, Tensor]


@torch.no_grad()
def fixed_outputs(bundle: ModelBundle, components: Sequence[str]) -> Outputs:
    """Each component's output on seeded inputs, in eval mode, fp64 on the CPU."""
    runs = {"unet": _unet_output, "text_encoder": _text_output}
    return {name: runs[name](bundle.components[name].eval()).double().cpu() for name in components}


def _unet_output(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    side = min(int(unet.config.sample_size or LATENT_SIDE), LATENT_SIDE)
    latents = torch.randn(2, unet.config.in_channels, side, side, generator=generator)
    states = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    return unet(latents, torch.tensor([100, 800]), states).sample


def _text_output(text_encoder: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config = text_encoder.config
    ids = torch.randint(config.vocab_size, (2, config.max_position_embeddings), generator=generator)
    return text_encoder(ids).last_hidden_state


def adapted_outputs(
    bundle: ModelBundle, adapters: Sequence[tuple[AdapterState, float]], components: Sequence[str]
) -> Outputs:
    """`fixed_outputs` with the adapters live at their scales; the bundle is given back as it was."""
    names = [f"merged_{index}" for index in range(len(adapters))]
    for name, (state, _) in zip(names, adapters, strict=True):
        load_adapter(bundle.components, state.updates, name)
    set_scales(bundle.components, {name: scale for name, (_, scale) in zip(names, adapters, strict=True)})
    outputs = fixed_outputs(bundle, components)
    for name in reversed(names):
        eject(bundle.components, name)
    return outputs


@torch.no_grad()
def add_in_place(components: Mapping[str, nn.Module], wanted: Mapping[str, Sequence[ScaledUpdate]]) -> None:
    """Add every ΔW to the live fp32 weights: the merge before its cast."""
    for name, updates in wanted.items():
        component, _, inner = name.partition(".")
        weight = components[component].get_submodule(inner).weight
        assert isinstance(weight, Tensor)
        delta = total_delta(updates, weight=weight)
        if delta is not None:
            weight += delta


def compare(adapted: Outputs, exact: Outputs, written: Outputs) -> tuple[NetworkError, ...]:
    """Relative errors between the three.

    Raises ModelError if the merge before its cast is not the adapted network to rounding.
    """
    errors = tuple(
        NetworkError(
            name,
            relative_error(written[name], adapted[name]),
            relative_error(exact[name], adapted[name]),
            relative_error(written[name], exact[name]),
        )
        for name in adapted
    )
    for error in errors:
        if not error.arithmetic <= ARITHMETIC_LIMIT:
            raise ModelError(
                f"{error.component}: the merged network differs from the adapted one by {error.arithmetic:.2e} of its "
                f"largest output before any cast; at most {ARITHMETIC_LIMIT:.0e} is rounding. Nothing was written."
            )
    return errors


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max |got - expected| / max |expected|."""
    return float((got - expected).abs().max() / expected.abs().max())


def rounding_share(base: Tensor, merged: Tensor, updates: Sequence[ScaledUpdate]) -> float:
    """Largest error of a merged weight against float64, as a share of what rounding allows (at most 1).

    The arithmetic is within `rounding_bound`; the cast adds half a unit in the last place.
    """
    delta = total_delta(updates, torch.float64, base)
    exact = base.double() if delta is None else base.double() + delta
    arithmetic = rounding_bound(updates, base)
    limits = torch.finfo(merged.dtype)
    cast = limits.eps / 2 * (exact.abs() + arithmetic) + limits.smallest_normal * limits.eps / 2
    return float(((merged.double() - exact).abs() / (arithmetic + cast)).max())


def check_weights(shares: Mapping[str, float]) -> WeightCheck:
    """Sum up `rounding_share` of a sample. Raises ModelError naming the worst weight if one is beyond rounding."""
    worst = max(shares, key=lambda name: shares[name])
    if not shares[worst] <= 1:
        raise ModelError(
            f"{worst}: the merged weight is {shares[worst]:.1f} times further from its float64 value than rounding "
            "allows. Nothing was written."
        )
    return WeightCheck(len(shares), shares[worst])


def sample_of(names: Sequence[str]) -> list[str]:
    """Up to SAMPLE names, evenly spread, the first and last among them."""
    count = min(SAMPLE, len(names))
    if count < 2:
        return list(names)
    return [names[round(index * (len(names) - 1) / (count - 1))] for index in range(count)]
