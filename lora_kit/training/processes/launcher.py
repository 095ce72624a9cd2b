"""What `accelerate launch` was told, read before Accelerate reads it: what a run follows, and what it cannot do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lora_kit.errors import RecipeError
from lora_kit.recipe import Recipe

PRECISIONS = ("no", "bf16", "fp16")
_FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config (tensor, context or sequence parallel)",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}


class Sharding(NamedTuple):
    """FSDP, as Accelerate's config asks for it."""

    reshard_after_forward: bool
    """Whether a block's weights are let go after its forward pass, and gathered again for its backward pass."""


def follow_launcher(recipe: Recipe) -> Recipe:
    """The recipe in the launcher's precision, where it names none of its own.

    Raises RecipeError, with everything that is wrong, where the two say different things or the launcher's config asks
    for what a run does not do. Accelerate's `no` is what it says, too, when nobody asked for a precision, so that it
    contradicts nothing.
    """
    problems = list(_problems(os.environ))
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    own = recipe.train.mixed_precision
    if asked not in PRECISIONS:
        problems.append(f"mixed_precision `{asked}`: a run can be in {', '.join(PRECISIONS)}. Set one of these.")
    elif "mixed_precision" not in recipe.train.model_fields_set:
        own = asked
    elif asked not in ("no", own):
        problems.append(
            f"mixed_precision `{asked}`, and the recipe's train.mixed_precision is `{own}`. Make them the same, or "
            "remove one: the recipe then follows Accelerate."
        )
    if problems:
        listed = "\n  ".join(problems)
        raise RecipeError(f"Accelerate's config (or the flags of `accelerate launch`) asks for:\n  {listed}")
    train = recipe.train.model_copy(update={"mixed_precision": own})
    return recipe.model_copy(update={"train": train})


def take_sharding() -> Sharding | None:
    """The launcher's FSDP settings, which Accelerate and transformers then do not see any more; None without FSDP.

    Accelerate's own wrapper is not used: it takes one network, which has to be prepared together with its optimizer,
    averages gradients (a run sums them, as processes' shares can differ), and is passed over without a word on a CPU
    (seen in 1.15). transformers would load weights in the first process alone.
    """
    if not _true(os.environ, "ACCELERATE_USE_FSDP"):
        return None
    del os.environ["ACCELERATE_USE_FSDP"]
    return Sharding(reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


def _problems(environment: Mapping[str, str]) -> Iterator[str]:
    for variable, name in _FOREIGN.items():
        if _true(environment, variable):
            yield f"{name}, which lora_kit has no part for. Run `accelerate config` for multi-GPU or FSDP."
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        yield (
            f"gradient_accumulation_steps {steps}: the recipe says how a step is cut. Set it to 1; data.batch_size is "
            "the whole step's, and train.micro_batch_size what is in memory at a time."
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", ""):
        yield f"dynamo_backend {backend}: the recipe says it. Set it to no, and train.compile: true in the recipe."
    if _true(environment, "ACCELERATE_USE_FSDP"):
        yield from _fsdp_problems(environment)


def _fsdp_problems(environment: Mapping[str, str]) -> Iterator[str]:
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        yield f"fsdp_version {version}: only 2 shards weights one by one, as adapters need it. Set fsdp_version: 2."
    if _true(environment, "FSDP_OFFLOAD_PARAMS"):
        yield "fsdp_offload_params: weights stay on the GPUs. Set it to false, and use more processes."
    if _true(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        yield "fsdp_activation_checkpointing: the recipe's train.gradient_checkpointing does it. Set it to false."
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        yield "FSDP with one process, which has nothing to share weights with. Launch more, or leave it out."


def _true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes")
