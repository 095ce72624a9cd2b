"""What Accelerate's config says, against what the recipe says."""

from __future__ import annotations

import pytest

from lora_kit.errors import RecipeError
from lora_kit.training.processes.launcher import Sharding, follow_launcher, take_sharding
from lora_kit.training.processes.sharding import check_sharding

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "WORLD_SIZE", *FSDP):
        monkeypatch.delenv(name, raising=False)


def told(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("accelerate", "own", "expected"),
    [
        (None, None, "no"),
        ("bf16", None, "bf16"),
        ("no", None, "no"),
        ("no", "bf16", "bf16"),  # `no` is what the launcher says when nobody asked
        ("bf16", "bf16", "bf16"),
        (None, "bf16", "bf16"),
    ],
)
def test_the_precision_is_the_recipes_or_else_accelerates(monkeypatch, make_recipe, accelerate, own, expected):
    if accelerate is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", accelerate)
    recipe = make_recipe(*([f"train.mixed_precision={own}"] if own else []))
    assert follow_launcher(recipe).train.mixed_precision == expected


@pytest.mark.parametrize("own", ["no", "fp16"])
def test_two_precisions_are_refused_and_both_named(monkeypatch, make_recipe, own):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RecipeError, match=f"mixed_precision `bf16`, and the recipe's train.mixed_precision is `{own}`"):
        follow_launcher(make_recipe(f"train.mixed_precision={own}"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision `fp8`"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps 4.*train.micro_batch_size"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend INDUCTOR"),
        (FSDP | {"FSDP_VERSION": "1"}, "fsdp_version 1.*Set fsdp_version: 2"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.gradient_checkpointing"),
        (FSDP | {"WORLD_SIZE": "1"}, "FSDP with one process"),
    ],
)
def test_what_a_run_does_not_do_is_refused_by_its_name_in_accelerates_config(
    monkeypatch, make_recipe, environment, said
):
    told(monkeypatch, environment)
    with pytest.raises(RecipeError, match=said):
        follow_launcher(make_recipe())


def test_everything_wrong_is_listed_at_once(monkeypatch, make_recipe):
    told(monkeypatch, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "bf16"})
    with pytest.raises(RecipeError, match=r"(?s)DeepSpeed.*mixed_precision"):
        follow_launcher(make_recipe("train.mixed_precision=no"))


def test_fsdp_is_taken_from_accelerate_and_the_libraries_do_not_see_it(monkeypatch, make_recipe):
    assert take_sharding() is None
    told(monkeypatch, FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"})
    follow_launcher(make_recipe())
    assert take_sharding() == Sharding(reshard_after_forward=False)
    assert take_sharding() is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.sources.0.target=base"], "target: base"),
        (["targets={match: 'unet.**', method: full}", "optimizer.name=adamw8bit"], "optimizer.name adamw8bit"),
        (["targets={match: 'unet.**', method: full}", "train.mixed_precision=fp16"], "mixed_precision fp16"),
    ],
)
def test_what_sharded_networks_cannot_do_is_refused(make_recipe, overrides, said):
    recipe = make_recipe(*overrides)
    with pytest.raises(RecipeError, match=said):
        check_sharding(recipe)


def test_adapters_over_sharded_networks_take_every_optimizer_and_precision(make_recipe):
    check_sharding(make_recipe("optimizer.name=adamw8bit", "train.mixed_precision=fp16"))
