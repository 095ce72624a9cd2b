"""optimizer: and schedule:, read without torch."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lora_kit.recipe import OptimizerSection, Recipe, ScheduleSection, dump_recipe, load_recipe
from lora_kit.recipe.messages import problems_in


def recipe(**sections) -> Recipe:
    return Recipe.model_validate({"data": {"sources": [{"path": "x"}]}, **sections})


def problems(**sections) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        recipe(**sections)
    return {".".join(map(str, problem.path)): problem.message for problem in problems_in(caught.value)}


@pytest.mark.parametrize(("name", "lr"), [("adamw", 1e-4), ("prodigy", 1.0), ("lion8bit", 1e-5), ("my.Own", 1e-4)])
def test_a_rate_that_is_not_written_suits_the_optimizer(name, lr):
    assert OptimizerSection.model_validate({"name": name}).lr == lr
    assert OptimizerSection.model_validate({"name": name, "lr": 0.5}).lr == 0.5


def test_a_dumped_recipe_reads_back_as_the_same(tmp_path):
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "r.yaml"
    path.write_text(
        "data: {sources: [{path: pictures}]}\noptimizer: {name: adafactor, args: {eps: [1e-30, 1e-3], beta1: 0.9}}\n"
    )
    read = load_recipe(path, ["optimizer.args.clip_threshold=2.0"])
    assert read.optimizer.given() == {"eps": (1e-30, 1e-3), "beta1": 0.9, "clip_threshold": 2.0}
    path.write_text(dump_recipe(read))
    assert load_recipe(path) == read


@pytest.mark.parametrize(
    ("sections", "path", "said"),
    [
        ({"optimizer": {"name": "AdamW8bit"}}, "optimizer.name", "Did you mean adamw8bit"),
        ({"optimizer": {"name": "torch.optim."}}, "optimizer.name", "or package.Class"),
        ({"optimizer": {"name": "sgd", "betas": [0.9, 0.99]}}, "optimizer.betas", "`sgd` has no single `betas`"),
        ({"optimizer": {"name": "adafactor", "eps": 1e-8}}, "optimizer.eps", "`args: {eps: [1e-30, 1e-3]}`"),
        ({"optimizer": {"args": {"lr": 1.0}}}, "optimizer.args.lr", "is set by `optimizer.lr`"),
        ({"optimizer": {"eps": 1e-6, "args": {"eps": 1e-6}}}, "optimizer.args.eps", "is there twice"),
        ({"optimizer": {"name": "prodigy", "lr": 1e-4}}, "optimizer.lr", "got 0.0001; Prodigy finds the rate itself"),
        (
            {"optimizer": {"name": "prodigy", "args": {"safeguard_warmup": False}}, "schedule": {"warmup_steps": 5}},
            "optimizer.args.safeguard_warmup",
            "remove it or the warm-up",
        ),
        (
            {"optimizer": {"name": "adafactor", "args": {"relative_step": True}}},
            "optimizer.args.relative_step",
            "ignore every learning rate",
        ),
        (
            {"optimizer": {"name": "adamw_schedulefree"}, "schedule": {"name": "cosine"}},
            "schedule.name",
            "averages weights in place of a falling rate",
        ),
        (
            {"optimizer": {"name": "schedulefree.SGDScheduleFree"}, "schedule": {"decay_steps": 5}},
            "schedule.decay_steps",
            "averages weights in place of a falling rate",
        ),
        (
            {"optimizer": {"name": "adamw_schedulefree", "args": {"warmup_steps": 5}}},
            "optimizer.args.warmup_steps",
            "`schedule.warmup_steps`",
        ),
        ({"optimizer": {"name": "sgd_schedulefree"}, "train": {"ema_decay": 0.9}}, "train.ema_decay", "itself"),
        ({"train": {"ema_warmup": 0.75}}, "train.ema_warmup", "does nothing without `train.ema_decay`"),
        (
            {"optimizer": {"lr_ratio": 16.0}, "targets": [{"match": "unet.**", "method": "full"}]},
            "optimizer.lr_ratio",
            "`method: full` has none",
        ),
        ({"schedule": {"cycles": 2}}, "schedule.cycles", "does nothing with `name: constant`; it is of cosine_with"),
        ({"schedule": {"name": "linear", "decay_steps": 5}}, "schedule.decay_steps", "falls to zero by itself"),
        ({"schedule": {"name": "piecewise_constant"}}, "schedule.step_rules", "write factors and rising steps such as"),
        (
            {"schedule": {"name": "piecewise_constant", "step_rules": "1:20,0.1:10,0"}},
            "schedule.step_rules",
            "rising steps",
        ),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(sections, path, said):
    found = problems(**sections)
    assert list(found) == [path]
    assert said in found[path]


def test_pieces_are_read_as_diffusers_reads_them():
    section = ScheduleSection(name="piecewise_constant", step_rules="1:10, 0.1:20,0.005")
    assert section.pieces() == ([(10, 1.0), (20, 0.1)], 0.005)
