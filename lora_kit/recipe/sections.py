"""The recipe's sections: frozen, every key known, every field with its unit, base and the reason for its default.

This module imports no torch: a recipe is checked before anything heavy is loaded.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_kit.recipe.base import (
    Fraction,
    Method,
    NonNegative,
    PathText,
    Positive,
    Precision,
    PredictionType,
    Section,
    refuse,
)
from lora_kit.recipe.buckets import BucketSection, bucket_problems
from lora_kit.recipe.cache import CacheSection
from lora_kit.recipe.captions import CaptionRules, CaptionSection
from lora_kit.recipe.checks import recipe_problems
from lora_kit.recipe.degradation import DegradationSection
from lora_kit.recipe.inpainting import InpaintingSection
from lora_kit.recipe.objective import ObjectiveSection
from lora_kit.recipe.optimizer import OptimizerSection
from lora_kit.recipe.rules import PresetName, PresetRules, TargetItem, TargetRule, Targets
from lora_kit.recipe.save import SaveSection
from lora_kit.recipe.schedule import ScheduleSection
from lora_kit.recipe.sources import Alpha, SourceSection, weight_problems
from lora_kit.recipe.templates import template_problems
from lora_kit.recipe.timesteps import TimestepSection
from lora_kit.recipe.tokens import TokenSection
from lora_kit.recipe.trackers import TrackerSection
from lora_kit.recipe.validation import EarlyStopSection, SplitSection, ValidationSection

__all__ = [
    "BucketSection",
    "CacheSection",
    "CaptionRules",
    "CaptionSection",
    "DataSection",
    "DegradationSection",
    "EarlyStopSection",
    "InpaintingSection",
    "Method",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "Precision",
    "PresetName",
    "PresetRules",
    "Recipe",
    "SaveSection",
    "ScheduleSection",
    "Section",
    "SourceSection",
    "SplitSection",
    "TargetItem",
    "TargetRule",
    "Targets",
    "TimestepSection",
    "TokenSection",
    "TrainSection",
    "ValidationSection",
]


class ModelSection(Section):
    """What is trained on."""

    base: PathText = "tiny"
    """A diffusers folder, a `.safetensors` / `.ckpt` checkpoint, a hub id, or `tiny` (the packaged base)."""
    revision: str | None = None
    """Git revision of a hub id. Ignored for local bases."""
    variant: str | None = None
    """File variant of a hub id or folder, such as `fp16`."""
    tokenizer: PathText | None = None
    """Folder or hub id of the CLIP tokenizer, for a single-file checkpoint (it carries none)."""
    prediction_type: PredictionType | None = None
    """What the network predicts: the noise (`epsilon`), v (`v_prediction`) or the clean latents (`sample`). Default:
    what the base's scheduler config says, or a single file's header. A single file of SD 2.x whose header says nothing
    needs it: `epsilon` for the 512 base, `v_prediction` for the 768 model."""
    adapter: PathText | None = None
    """Go on from this adapter, a file of any layout or PEFT's folder: training begins at its weights instead of at
    zero. `targets` must pick its modules with its ranks and alphas. The base that figures compare with is the base
    without it."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Hold the frozen base's large linear layers in 4 bits (`nf4`, with double quantisation: QLoRA, Dettmers et al.
    2023) or 8 (`int8`, LLM.int8(), Dettmers et al. 2022), by bitsandbytes. Saves memory, costs time and exactness, both
    told at the start. Of the UNet, and of the text encoder where it is trained; convolutions, norms and embeddings
    stay. For `lora` and `rslora`; the adapter is an ordinary one for the true base."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """What computes attention in the UNet and the VAE. `sdpa`: torch's own, which picks the fastest of its kernels for
    the device. `xformers`: that package's, as diffusers sets it, on NVIDIA GPUs: `pip install lora_kit[xformers]`."""
    weights: Literal["pretrained", "fresh"] = "pretrained"
    """`fresh` initialises UNet and text encoder anew from the base's configs (the VAE keeps its weights)."""


class DataSection(CacheSection):
    """Pictures, captions, and how they become a batch."""

    sources: Annotated[list[SourceSection], Field(min_length=1)]
    """One or more sets; an epoch goes through all of them."""
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = 512
    """Side of the square training picture, pixels. 512 is what SD 1.x and 2.x-base were trained on."""
    buckets: BucketSection | None = None
    """Train pictures in their own shapes, of about `resolution`² pixels. Default: squares."""
    batch_size: Positive = 4
    """Pictures in one optimizer step, over all processes and micro-batches."""
    crop: Literal["center", "random"] = "center"
    """Where the square, or the bucket's shape, is cut after the picture is resized to cover it."""
    flip: bool = False
    """Mirror each picture with probability one half. Off: text and asymmetry are part of most subjects."""
    trigger: str = ""
    """Word put before every caption; written into the adapter's header."""
    caption_dropout: Fraction = 0.0
    """Probability that a caption is replaced by the empty one (trains classifier-free guidance)."""
    captions: CaptionSection = CaptionSection()
    """Tags, wildcards, replacements, and captions longer than the text encoder reads."""
    on_error: Literal["raise", "skip"] = "skip"
    """A broken picture or missing caption is left out, named at the start and the end, and listed in the run's
    skipped.txt; or it stops the run before its first step."""
    workers: NonNegative = 0
    """Processes that load pictures ahead. 0 loads them between steps."""
    alpha: Alpha = "white"
    """What transparent pictures are put on: `white`, `black` or a colour such as `"#20a0ff"` (in quotes). `mask`: on
    white, and what is transparent counts less in the loss. Pictures without transparency are the same in all."""

    @model_validator(mode="after")
    def _weights_fit(self) -> DataSection:
        refuse("DataSection", weight_problems(self.sources))
        refuse("DataSection", bucket_problems(self.buckets, self.resolution, self.sources))
        refuse("DataSection", template_problems(self.trigger, self.captions, self.sources))
        return self


class TrainSection(TrackerSection):
    """Length and mechanics of the run."""

    max_steps: Positive = 1000
    """Optimizer steps."""
    micro_batch_size: Positive | None = None
    """Pictures in one forward pass. Smaller needs less memory; the step's result is the same to rounding.
    Default: `data.batch_size` / processes."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass. The frozen base is then held in this precision itself; trainable weights
    stay fp32. Not written: what `accelerate launch` was told, or else `no`."""
    wait_minutes: Annotated[float, Field(gt=0)] = 120
    """The longest that processes of one launch wait for each other. The others wait while the first one draws and
    measures, so this must be longer than any validation; one that hangs is noticed after it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third slower, far less memory. Blocks in front of the first adapter
    keep nothing either way, and are not computed twice."""
    compile: bool = False
    """torch.compile of the UNet's repeated blocks, resnets and transformer blocks, one by one for each shape of a
    micro-batch: the first step of each shape takes minutes, the others less time. Steps only; pictures are drawn and
    losses measured by the network as it is. Needs a C++ compiler, on a GPU triton. Not under FSDP."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the trained weights: a result of its own beside the weights as trained
    (adapter.ema.safetensors, model_ema), and what validation measures and draws. 0.999 for long full runs."""
    ema_warmup: Annotated[float, Field(gt=0, le=1)] | None = None
    """The average's decay rises as 1 - (1 + updates)^-this up to `ema_decay`: 2/3 for runs of a million steps, 3/4 for
    shorter ones. Default: it rises as (1 + updates) / (10 + updates)."""
    non_finite: Literal["stop", "skip"] = "stop"
    """When a step's loss or gradient is not finite: stop, or leave the weights as they are and go on. Either is told,
    with the pictures of the step."""
    max_non_finite: Positive = 3
    """With `non_finite: skip`: stop after more than this many such steps in a row."""
    log_every: Positive = 10
    """Optimizer steps between lines of metrics.jsonl."""
    resume: PathText | None = None
    """`latest`: go on from the newest whole checkpoint of `output_dir`, or begin if there is none. Or a
    checkpoint's folder."""
    overwrite: bool = False
    """Remove what an earlier run left in `output_dir` and begin anew. Without it such a folder is refused."""


class Recipe(Section):
    """A whole run."""

    model: ModelSection = ModelSection()
    targets: Targets = PresetRules(preset="attention")
    """What is trained: one preset, one rule, or a list of both, read in order. `none`: only `tokens`."""
    data: DataSection
    tokens: list[TokenSection] = Field(default=[])
    """New words that are learned as vectors of the text encoder's embedding, which otherwise stays as it is."""
    objective: ObjectiveSection = ObjectiveSection()
    degradation: DegradationSection | None = None
    """How a super-resolution model's low-resolution pictures are made. Default: bicubic downscaling; none for other
    models."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    inpainting: InpaintingSection | None = None
    """Which parts of a picture are to be filled: only for an inpainting base, which without it takes the defaults."""
    save: SaveSection = SaveSection()
    validation: ValidationSection = ValidationSection()
    output_dir: PathText = "runs/default"
    """The run's folder. In a recipe, relative to the recipe's folder; as an override, to the current one."""
    seed: NonNegative = 0
    """Everything random derives from (seed, step, sample)."""

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        refuse("Recipe", recipe_problems(self))
        return self
