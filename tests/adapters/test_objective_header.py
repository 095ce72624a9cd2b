"""What a header says of objective and noise schedule, and what is read out of one."""

from __future__ import annotations

import pytest

from lora_kit.adapters.formats.objective_header import (
    SCHEDULER_KEY,
    TrainedSchedule,
    objective_metadata,
    trained_schedule,
)
from lora_kit.errors import AdapterFileError
from lora_kit.recipe import ObjectiveSection

ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def test_only_what_is_on_is_written_by_sd_scripts_names() -> None:
    plain = objective_metadata(ObjectiveSection(), {"prediction_type": "epsilon"})
    assert plain == {"ss_loss_type": "l2", SCHEDULER_KEY: '{"prediction_type": "epsilon"}'}
    section = ObjectiveSection(loss="huber", min_snr_gamma=5.0, pyramid_levels=6, input_perturbation=0.1)
    assert objective_metadata(section, {}) == {
        "ss_loss_type": "huber",
        "ss_huber_schedule": "snr",
        "ss_huber_c": "0.1",
        "ss_min_snr_gamma": "5.0",
        "ss_multires_noise_iterations": "6",
        "ss_multires_noise_discount": "0.3",
        "ss_ip_noise_gamma": "0.1",
    }


def test_a_schedule_is_read_back_as_it_was_written() -> None:
    told = objective_metadata(ObjectiveSection(zero_terminal_snr=True), ZERO)
    assert told["ss_zero_terminal_snr"] == "True"
    assert trained_schedule("a", told) == TrainedSchedule("v_prediction", True, binding=True)


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ({}, TrainedSchedule(None, False, binding=False)),
        ({"modelspec.prediction_type": "v"}, TrainedSchedule("v_prediction", False, binding=False)),
        ({"ss_zero_terminal_snr": "False"}, TrainedSchedule(None, False, binding=False)),
        (
            {"ss_zero_terminal_snr": "True", "modelspec.prediction_type": "v"},
            TrainedSchedule("v_prediction", True, binding=True),
        ),
    ],
)
def test_files_of_sd_scripts_tell_it_too(metadata: dict[str, str], wanted: TrainedSchedule) -> None:
    assert trained_schedule("a", metadata) == wanted


@pytest.mark.parametrize("text", ["{", "3", "null", '["v"]', '{"prediction_type": "flow"}'])
def test_a_header_that_something_else_changed_is_refused(text: str) -> None:
    with pytest.raises(
        AdapterFileError, match=r"a\.safetensors: its header's lora_kit\.scheduler is .*it should be JSON such as"
    ):
        trained_schedule("a.safetensors", {SCHEDULER_KEY: text})
