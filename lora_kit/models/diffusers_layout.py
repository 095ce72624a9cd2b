"""Bases in diffusers' layout: a folder here, or a repository on the hub."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from lora_kit.errors import ModelError
from lora_kit.models import tokenizers
from lora_kit.models.bundle import FirstStage, Tokenizer
from lora_kit.models.first_stage import first_stage_class
from lora_kit.models.layout import Configs
from lora_kit.models.mapped import cast as to_dtype
from lora_kit.models.pipeline_index import Parts, check_index, index_in, read_index
from lora_kit.models.text_models import CLASSES, TextConfig, TextModel, without_dropout
from lora_kit.models.unets import UNet, unet_class
from lora_kit.recipe.sections import ModelSection

_SHOWN = 8
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DAMAGE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""What diffusers and transformers raise for files that are missing, damaged or do not fit their config."""


class DiffusersBase:
    """A diffusers pipeline, in a folder or on the hub, as a `Layout`."""

    def __init__(self, where: str | Path, section: ModelSection) -> None:
        """`where`: the folder as a Path, or the hub id as a string. Raises ModelError if no pipeline is there."""
        self._where, self._section = where, section
        self._local = isinstance(where, Path)
        self._parts = check_index(read_index(_index(where, section.revision)), str(where))
        if isinstance(where, Path):
            _check_folders(where, self._parts)

    def configs(self) -> Configs:
        """As in Layout."""
        with self._reading("configs"):
            return Configs(
                unet=self._config("unet"),
                vae=self._config("vae"),
                text_encoder=self._text_config(),
                scheduler=self._config("scheduler", DDIMScheduler),
            )

    def unet(self, dtype: torch.dtype) -> UNet:
        """As in Layout."""
        return self._cast_network(unet_class(self.configs().unet), "unet", dtype)

    def vae(self, dtype: torch.dtype) -> FirstStage:
        """As in Layout."""
        kind = first_stage_class({"_class_name": self._parts["vae"].classes[0]}, str(self._where))
        return self._cast_network(kind, "vae", dtype)

    def text_encoder(self, dtype: torch.dtype) -> TextModel:
        """As in Layout."""
        kind = CLASSES[self._parts["text_encoder"].classes[0]][1]
        return without_dropout(self._network(kind, "text_encoder", dtype=dtype))

    def tokenizer(self) -> Tokenizer:
        """As in Layout."""
        folder, classes = self._parts["tokenizer"]
        kind = tokenizers.KINDS.get(classes[0], tokenizers.CLIP)
        if self._section.tokenizer:
            return tokenizers.named(self._section.tokenizer, kind)
        if isinstance(self._where, Path):
            return tokenizers.from_folder(self._where / folder, kind)
        with self._reading("tokenizer"):
            return kind.make.from_pretrained(self._where, subfolder=folder, **self._options)

    def _text_config(self) -> TextConfig | None:
        if "text_encoder" not in self._parts:
            return None
        folder, classes = self._parts["text_encoder"]
        return CLASSES[classes[0]][0].from_pretrained(self._where, subfolder=folder, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"local_files_only": True} if self._local else {"revision": self._section.revision}

    def _config(self, part: str, reader: Any = UNet2DModel) -> dict[str, Any]:
        """A part's own config; `reader` knows the file's name, whatever class it is for."""
        folder = self._parts[part].folder
        return _plain(reader.load_config(self._where, subfolder=folder, **self._options))

    def _cast_network(self, network_class: Any, part: str, dtype: torch.dtype) -> Any:
        """A network of diffusers', read as it is stored, which maps the file, and cast afterwards: diffusers' own cast
        holds the file's weights beside those made of them until the last one is made."""
        network = self._network(network_class, part, torch_dtype=self.stored_dtype(part) or dtype)
        to_dtype(network, dtype)
        return network

    def stored_dtype(self, part: str) -> torch.dtype | None:
        """The one precision of a part's file here; None where there are several, or it is not so simple."""
        if not isinstance(self._where, Path):
            return None
        variant = f".{self._section.variant}" if self._section.variant else ""
        path = self._where / self._parts[part].folder / f"diffusion_pytorch_model{variant}.safetensors"
        if not path.is_file():
            return None
        with self._reading(part), safe_open(path, framework="pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        return _STORED.get(kinds.pop()) if len(kinds) == 1 else None

    def _network(self, network_class: Any, part: str, **dtype: torch.dtype) -> Any:
        """Load one network. The libraries only warn of missing tensors, and fill them at random: an error here."""
        options = {**self._options, "variant": self._section.variant, "output_loading_info": True, **dtype}
        with self._reading(part), _without_bars(self._local):
            network, report = network_class.from_pretrained(self._where, subfolder=self._parts[part].folder, **options)
        for fault, what in (
            ("missing_keys", "lacks"),
            ("unexpected_keys", "holds tensors that its config has no place for:"),
            ("mismatched_keys", "does not fit its config.json in shape:"),
        ):
            if names := sorted(str(name) for name in report[fault]):
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                raise ModelError(f"{self._where}: the {part} {what} {', '.join(names[:_SHOWN])}{more}.")
        return network

    @contextmanager
    def _reading(self, part: str) -> Generator[None]:
        try:
            yield
        except _DAMAGE as error:
            variant = f" (variant {self._section.variant})" if self._section.variant else ""
            raise ModelError(
                f"{self._where}: its {part}{variant} cannot be read: {_first_lines(error)} "
                f"Check that the files are whole, or fetch them again."
            ) from error


def _index(where: str | Path, revision: str | None) -> Path:
    """The pipeline's model_index.json."""
    return index_in(where) if isinstance(where, Path) else _fetch_index(where, revision)


def _fetch_index(name: str, revision: str | None) -> Path:
    try:
        return Path(hf_hub_download(name, "model_index.json", revision=revision))
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{name!r} is neither a file or folder here (looked in {Path.cwd()}) nor a diffusers pipeline that could "
            f"be had from the hub or its local cache{at}: {_first_lines(error)} A base is a diffusers folder, a "
            f".safetensors or .ckpt file, a hub id such as owner/name, or `tiny`."
        ) from error


def _check_folders(folder: Path, parts: Parts) -> None:
    missing = [part.folder for part in parts.values() if not (folder / part.folder).is_dir()]
    if missing:
        raise ModelError(
            f"{folder} is incomplete: it has no folder {', '.join(missing)}, which its model_index.json names. "
            f"Fetch the base again, or copy what is missing."
        )


@contextmanager
def _without_bars(quiet: bool) -> Generator[None]:
    """No progress bar for reading a local file; downloads keep theirs."""
    hide = quiet and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()


def _plain(config: Any) -> dict[str, Any]:
    """`load_config` gives a dict, or a tuple that begins with it."""
    return dict(config[0] if isinstance(config, tuple) else config)


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"
