"""Pictures follow the schedule that an adapter was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapter_samples import bundle_of

from lora_kit.errors import ModelError
from lora_kit.inference import SamplingSettings, draw
from lora_kit.inference.schedules import follow_schedules
from lora_kit.models import scheduler_named
from lora_kit.models.pipelines import SCHEDULERS, WITHOUT_CLEAN_LATENTS, WITHOUT_ZERO_SNR
from lora_kit.models.schedules import ZERO_TERMINAL_SNR

ZERO = {"lora_kit.scheduler": json.dumps({"prediction_type": "v_prediction", **ZERO_TERMINAL_SNR})}
SMALL = SamplingSettings(steps=4, guidance=1.0, width=16, height=16)


def test_a_file_that_fits_the_base_changes_nothing(tiny_sd2_folder: Path) -> None:
    bundle = bundle_of(tiny_sd2_folder)
    before = dict(bundle.scheduler_config)
    told = [{}, {"lora_kit.scheduler": '{"prediction_type": "v_prediction"}'}, {"modelspec.prediction_type": "v"}]
    assert follow_schedules(bundle, [Path("a"), Path("b"), Path("c")], told) == []
    assert bundle.scheduler_config == before


def test_zero_terminal_snr_is_followed_and_told(tiny_sd1_folder: Path) -> None:
    bundle = bundle_of(tiny_sd1_folder)
    plain = draw(bundle, ["red apple"], [0], settings=SMALL)[0]
    (warning,) = follow_schedules(bundle, [Path("dark.safetensors")], [ZERO])
    assert warning.startswith("dark.safetensors: was trained to predict v_prediction and with zero terminal SNR")
    assert "pictures follow the adapter" in warning
    assert bundle.prediction_type == "v_prediction"
    assert ZERO_TERMINAL_SNR.items() <= bundle.scheduler_config.items()
    drawn = draw(bundle, ["red apple"], [0], settings=SMALL)[0]
    assert np.asarray(drawn).tobytes() != np.asarray(plain).tobytes()


def test_a_second_file_of_another_schedule_is_named(tiny_sd2_folder: Path) -> None:
    bundle = bundle_of(tiny_sd2_folder)
    other = {"lora_kit.scheduler": '{"prediction_type": "sample"}'}
    first, second = follow_schedules(bundle, [Path("a"), Path("b")], [ZERO, other])
    assert first.startswith("a: was trained with zero terminal SNR")
    assert second == "b: was trained to predict sample; pictures are drawn as a was, which may be wrong for it"


def test_another_tools_word_on_the_prediction_alone_is_told_and_not_followed(tiny_sd1_folder: Path) -> None:
    bundle = bundle_of(tiny_sd1_folder)
    (warning,) = follow_schedules(bundle, [Path("a")], [{"modelspec.prediction_type": "v"}])
    assert "to predict v_prediction; pictures are drawn as the base's config says" in warning
    assert bundle.prediction_type == "epsilon"


ABLE = [
    (name, predicts)
    for name in SCHEDULERS
    for predicts in ("v_prediction", "sample")
    if name not in WITHOUT_ZERO_SNR and not (predicts == "sample" and name in WITHOUT_CLEAN_LATENTS)
]


@pytest.mark.parametrize(("name", "predicts"), ABLE)
def test_every_other_sampler_draws_with_zero_terminal_snr(tiny_sd2_folder: Path, name: str, predicts: str) -> None:
    bundle = bundle_of(tiny_sd2_folder)
    bundle.scheduler_config, bundle.prediction_type = {**bundle.scheduler_config, **ZERO_TERMINAL_SNR}, predicts
    sampler = scheduler_named(name, bundle.scheduler_config)
    sampler.set_timesteps(4)
    assert sampler.timesteps[0] == 999
    # diffusers keeps 2^-24 instead of 0 where a sampler divides by √ᾱ.
    assert float(sampler.alphas_cumprod[-1]) <= 2**-24
    draw(bundle, ["red apple"], [0], settings=SamplingSettings(steps=4, width=16, height=16, sampler=name))


def test_a_sampler_is_refused_where_it_would_draw_something_else(tiny_sd2_folder: Path) -> None:
    config = bundle_of(tiny_sd2_folder).scheduler_config
    for name in WITHOUT_ZERO_SNR:
        with pytest.raises(ModelError, match=f"'{name}' cannot draw with zero terminal SNR; use one of ddim, ddpm"):
            scheduler_named(name, {**config, **ZERO_TERMINAL_SNR})
    for name in WITHOUT_CLEAN_LATENTS:
        with pytest.raises(ModelError, match="predicts clean latents"):
            scheduler_named(name, {**config, "prediction_type": "sample"})
