"""Bases in diffusers' layout: a folder here, or a repository on the hub."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from lora_kit.errors import ModelError
from lora_kit.models import tokenizers
from lora_kit.models.bundle import FirstStage, Tokenizer
from lora_kit.models.first_stage import first_stage_class
from lora_kit.models.layout import Configs
from lora_kit.models.pipeline_index import PipelineKind, check_index, class_of, index_in, read_index
from lora_kit.models.text_models import CLASSES, TextModel, without_dropout
from lora_kit.recipe.sections import ModelSection

_SHOWN = 8
_DAMAGE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""What diffusers and transformers raise for files that are missing, damaged or do not fit their config."""


class DiffusersBase:
    """A diffusers pipeline, in a folder or on the hub, as a `Layout`."""

    def __init__(self, where: str | Path, section: ModelSection) -> None:
        """`where`: the folder as a Path, or the hub id as a string. Raises ModelError if no pipeline is there."""
        self._where, self._section = where, section
        self._local = isinstance(where, Path)
        index = read_index(_index(where, section.revision))
        kind = check_index(index, str(where))
        self._folders = kind.folders
        self._tokenizers = tokenizers.KINDS.get(class_of(index, kind, "tokenizer") or "", tokenizers.CLIP)
        self._text_config, self._text_model = CLASSES[class_of(index, kind, "text_encoder") or ""]
        if isinstance(where, Path):
            _check_folders(where, kind)

    def configs(self) -> Configs:
        """As in Layout."""
        with self._reading("configs"):
            return Configs(
                unet=self._config(UNet2DConditionModel, "unet"),
                vae=self._config(AutoencoderKL, "vae"),  # or a VQModel: the config says
                text_encoder=self._text_config.from_pretrained(
                    self._where, subfolder=self._folders["text_encoder"], **self._options
                ),
                scheduler=self._config(DDIMScheduler, "scheduler"),
            )

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """As in Layout."""
        return cast(UNet2DConditionModel, self._network(UNet2DConditionModel, "unet", torch_dtype=dtype))

    def vae(self, dtype: torch.dtype) -> FirstStage:
        """As in Layout."""
        with self._reading("configs"):
            network_class = first_stage_class(self._config(AutoencoderKL, "vae"), str(self._where))
        return cast(FirstStage, self._network(network_class, "vae", torch_dtype=dtype))

    def text_encoder(self, dtype: torch.dtype) -> TextModel:
        """As in Layout."""
        return without_dropout(self._network(self._text_model, "text_encoder", dtype=dtype))

    def tokenizer(self) -> Tokenizer:
        """As in Layout."""
        if self._section.tokenizer:
            return tokenizers.named(self._section.tokenizer, self._tokenizers)
        folder = self._folders["tokenizer"]
        if isinstance(self._where, Path):
            return tokenizers.from_folder(self._where / folder, self._tokenizers)
        with self._reading("tokenizer"):
            return self._tokenizers.make.from_pretrained(self._where, subfolder=folder, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"local_files_only": True} if self._local else {"revision": self._section.revision}

    def _config(self, config_class: Any, part: str) -> dict[str, Any]:
        """A part's own config."""
        return _plain(config_class.load_config(self._where, subfolder=self._folders[part], **self._options))

    def _network(self, network_class: Any, part: str, **dtype: torch.dtype) -> Any:
        """Load one network. The libraries only warn of missing tensors, and fill them at random: an error here."""
        options = {**self._options, "variant": self._section.variant, "output_loading_info": True, **dtype}
        with self._reading(part), _without_bars(self._local):
            network, report = network_class.from_pretrained(self._where, subfolder=self._folders[part], **options)
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


def _check_folders(folder: Path, kind: PipelineKind) -> None:
    missing = [part for part in kind.folders.values() if not (folder / part).is_dir()]
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
