from __future__ import annotations

import pytest
from pydantic import ValidationError

from lora_kit.recipe import PresetRules, Recipe, TargetRule

DATA = {"sources": [{"path": "/pictures"}]}


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate({"data": DATA, **sections})


def problems(**sections: object) -> dict[str, str]:
    """Messages by dotted path; pydantic's tags are left out of the paths."""
    with pytest.raises(ValidationError) as caught:
        recipe(**sections)
    found: dict[str, str] = {}
    for error in caught.value.errors():
        path = ".".join(str(part) for part in error["loc"] if not str(part).startswith("<"))
        found[path] = error["msg"]
    return found


def test_a_source_alone_is_a_recipe() -> None:
    assert recipe().targets == PresetRules(preset="attention")


def test_a_preset_alone() -> None:
    assert recipe(targets={"preset": "kohya", "rank": 4}).targets == PresetRules(preset="kohya", rank=4)


def test_a_rule_alone_is_a_list_of_one() -> None:
    assert recipe(targets={"match": "unet.**"}).targets == [TargetRule(match="unet.**")]


def test_a_list_mixes_presets_and_rules() -> None:
    got = recipe(targets=[{"preset": "all"}, {"match": "unet.mid_block.**", "exclude": True}]).targets
    assert got == [PresetRules(preset="all"), TargetRule(match="unet.mid_block.**", exclude=True)]


def test_sections_built_in_code_are_taken() -> None:
    rule = TargetRule(match="unet.**")
    assert recipe(targets=rule).targets == [rule]
    assert recipe(targets=[rule, PresetRules(preset="all")]).targets == [rule, PresetRules(preset="all")]


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().seed = 1  # type: ignore[misc]  # what is tested


@pytest.mark.parametrize("value", [True, "1", 1.0])
def test_nothing_is_converted_to_an_integer(value: object) -> None:
    assert list(problems(seed=value)) == ["seed"]


def test_whole_numbers_are_taken_for_real_ones() -> None:
    assert recipe(targets={"preset": "all", "alpha": 8}).targets == PresetRules(preset="all", alpha=8.0)


def test_betas_are_read_from_a_list() -> None:
    assert recipe(optimizer={"betas": [0.5, 0.9]}).optimizer.betas == (0.5, 0.9)


@pytest.mark.parametrize(
    ("sections", "path", "said"),
    [
        ({"targets": {"rank": 3}}, "targets", "needs the key `preset`"),
        ({"targets": [{"rank": 3}]}, "targets.0", "needs the key `preset`"),
        ({"targets": "all"}, "targets", "needs the key `preset`"),
        ({"targets": []}, "targets", "at least 1 item"),
        ({"targets": {"match": "re:(["}}, "targets.0.match", "not a regular expression: unterminated"),
        ({"targets": {"match": " "}}, "targets.0.match", "is empty"),
        (
            {"targets": {"preset": "all", "method": "full", "alpha": 4}},
            "targets.alpha",
            "`alpha: 4.0` does nothing with `method: full`",
        ),
        ({"targets": {"match": "unet.**", "method": "full", "rank": 4}}, "targets.0.rank", "with `method: full`"),
        ({"targets": [{"preset": "all"}, {"match": "a", "exclude": True, "rank": 4}]}, "targets.1.rank", "`exclude:"),
        (
            {"targets": [{"preset": "all"}, {"match": "unet.**", "method": "full"}]},
            "targets.1.method",
            "`method: full` beside `method: lora` of targets.0: `full` makes a whole model",
        ),
        (
            {"targets": {"preset": "all", "method": "full", "rules": [{"match": "unet.**"}]}},
            "targets.rules.0.method",
            "For whole weights in an adapter write `method: diff`",
        ),
        ({"targets": {"match": "unet.**", "exclude": True}}, "targets", "nothing would be trained"),
        ({"optimizer": {"text_encoder_lr": 1e-5}}, "optimizer.text_encoder_lr", "no rule picks from the text encoder"),
        ({"train": {"micro_batch_size": 5}}, "train.micro_batch_size", "got 5, but one optimizer step has only"),
        ({"train": {"resume": "latest", "overwrite": True}}, "train.overwrite", "keep one"),
        ({"schedule": {"warmup_steps": 1001}}, "schedule.warmup_steps", "Make this at most 1000"),
        ({"schedule": {"warmup_steps": 600, "decay_steps": 401}}, "schedule.decay_steps", "400 steps are left"),
        (
            {"schedule": {"name": "cosine", "decay_steps": 1}},
            "schedule.decay_steps",
            "does nothing with `name: cosine`",
        ),
        ({"validation": {"retrieval": True}}, "validation.retrieval", "needs `validation.held_out`"),
        ({"validation": {"held_out": {"path": "/pictures"}}}, "validation.held_out", "same set as data.sources.0"),
        ({"validation": {"strengths": []}}, "validation.strengths", "at least 1 item"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr", "finite"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas.1", "less than 1"),
        ({"output_dir": ""}, "output_dir", "at least 1 character"),
    ],
)
def test_what_cannot_be_run_is_refused(sections: dict[str, object], path: str, said: str) -> None:
    found = problems(**sections)
    assert list(found) == [path]
    assert said in found[path]


def test_all_checks_between_sections_report_at_once() -> None:
    found = problems(train={"micro_batch_size": 9}, validation={"retrieval": True}, schedule={"warmup_steps": 2000})
    assert set(found) == {"train.micro_batch_size", "validation.retrieval", "schedule.warmup_steps"}


@pytest.mark.parametrize("match", ["text_encoder.**", "{unet,text_encoder}.**", "re:text.*", "**"])
def test_a_text_encoder_rate_goes_with_a_rule_that_may_pick_there(match: str) -> None:
    assert recipe(targets=[{"match": match}], optimizer={"text_encoder_lr": 1e-5})


def test_held_out_pictures_may_be_parted_by_where() -> None:
    data = {"sources": [{"path": "/p", "where": {"kind": ["line"]}}]}
    held_out = {"path": "/p", "where": {"kind": ["held"]}}
    assert recipe(data=data, validation={"held_out": held_out, "retrieval": True})
