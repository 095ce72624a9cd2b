"""Single-file checkpoints (.safetensors, .ckpt) in the original LDM layout: what they are, and their networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_kit.errors import ModelError
from lora_kit.models import tokenizers
from lora_kit.models.layout import Configs
from lora_kit.models.mapped import cast as to_dtype
from lora_kit.models.single_file import ldm_configs, ldm_prediction
from lora_kit.models.single_file.checkpoint_file import CheckpointFile
from lora_kit.models.single_file.ldm_keys import Claim, claim, is_unused, structure
from lora_kit.models.single_file.ldm_marks import recognise, some
from lora_kit.recipe.sections import ModelSection

N = TypeVar("N", bound=nn.Module)


class LdmCheckpoint:
    """An open single-file checkpoint as a `Layout`."""

    def __init__(self, file: CheckpointFile, section: ModelSection) -> None:
        self._file, self._section = file, section
        recognise(file.path, file.shapes)
        self._structure = structure(file.shapes)
        self._claims = self._claimed()

    def configs(self) -> Configs:
        """As in Layout."""
        shapes, form = self._file.shapes, self._structure
        scale = float(self._file.read("scale_factor")) if "scale_factor" in shapes else ldm_configs.SCALING_FACTOR
        try:
            unet = ldm_configs.unet_config(shapes, form)
            vae = ldm_configs.vae_config(shapes, form, scale)
            text = ldm_configs.text_config(shapes, form)
        except KeyError as error:
            raise ModelError(f"{self._file.path} is incomplete: it has no tensor {error}.") from error
        asked, told = self._section.prediction_type, self._told()
        if (asked or told) == "v_prediction":
            unet["sample_size"] = 96
        schedule = {**ldm_configs.SCHEDULER, "prediction_type": told or asked or "epsilon"}
        return Configs(unet, vae, CLIPTextConfig(**text), schedule)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """As in Layout."""
        with init_empty_weights():
            network = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(self.configs().unet))
        return self._filled(network, "unet", dtype)

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """As in Layout."""
        with init_empty_weights():
            network = cast(AutoencoderKL, AutoencoderKL.from_config(self.configs().vae))
        return self._filled(network, "vae", dtype)

    def text_encoder(self, dtype: torch.dtype) -> CLIPTextModel:
        """As in Layout."""
        with init_empty_weights():
            network = CLIPTextModel(cast(CLIPTextConfig, self.configs().text_encoder))
        return self._filled(network, "text_encoder", dtype)

    def tokenizer(self) -> CLIPTokenizer:
        """As in Layout."""
        return tokenizers.for_single_file(self._section, pad_with_zero=ldm_configs.is_v2(self._file.shapes))

    def _told(self) -> str | None:
        """What the file says that it predicts. Raises ModelError where neither it nor the section does."""
        path, shapes, metadata, read, _ = self._file
        if self._section.prediction_type is None and ldm_prediction.is_open(shapes, metadata):
            raise ldm_prediction.ask(path, shapes, metadata, read)
        return ldm_prediction.told_by(metadata)

    def _claimed(self) -> dict[str, Claim]:
        """Name in the file → where it belongs. Raises ModelError for names that nothing explains."""
        form = self._structure
        claims = {name: found for name in self._file.shapes if (found := claim(name, form)) is not None}
        unknown = [name for name in self._file.shapes if name not in claims and not is_unused(name, form)]
        if unknown:
            raise ModelError(
                f"{self._file.path} holds {some(unknown)}, which no Stable Diffusion v1 or v2 network has."
            )
        return claims

    def _filled(self, network: N, component: str, dtype: torch.dtype) -> N:
        """Put the component's tensors into `network`, which lies on the meta device: one copy, in `dtype`."""
        prefix = "text_model." if hasattr(network, "text_model") else ""
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        state: dict[str, Tensor] = {}
        for name, found in self._claims.items():
            if found.component == component:
                parts = unpacked(self._file.read(name), found, prefix)
                state.update({key: _as_linear(part, wanted.get(key, ())) for key, part in parts.items()})
        self._check(component, wanted, {name: tuple(tensor.shape) for name, tensor in state.items()})
        network.load_state_dict(state, strict=True, assign=True)
        state.clear()
        to_dtype(network, dtype)  # one weight after the other, and their mapped pages are given back
        return network

    def _check(self, component: str, wanted: Mapping[str, Any], got: Mapping[str, Any]) -> None:
        path = self._file.path
        if missing := [name for name in wanted if name not in got]:
            raise ModelError(f"{path} is incomplete: its {component} lacks {some(missing)}.")
        if extra := [name for name in got if name not in wanted]:
            raise ModelError(f"{path} holds {some(extra)}, which a Stable Diffusion {component} does not have.")
        if odd := [name for name in wanted if wanted[name] != got[name]]:
            shapes = f"{list(got[odd[0]])}, not {list(wanted[odd[0]])}"
            raise ModelError(f"{path}: {some(odd)} of the {component} have the wrong shape (the first {shapes}).")


def _as_linear(tensor: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """A 1 × 1 convolution's weight as [out, in], where the network has a linear layer."""
    return tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) and len(wanted) == 2 else tensor


def unpacked(tensor: Tensor, found: Claim, prefix: str = "") -> dict[str, Tensor]:
    """One tensor of the file as the diffusers network holds it: name → tensor, sharing memory where it can."""
    if found.form == "packed":
        # Copies, as views of one storage cannot be saved one by one.
        return {prefix + name: part.clone() for name, part in zip(found.names, tensor.chunk(3), strict=True)}
    if found.form == "pointwise" and tensor.ndim > 2:
        tensor = tensor.reshape(tensor.shape[0], -1)
    return {prefix + found.names[0]: tensor}
