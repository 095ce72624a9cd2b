"""A whole run: recipe → build → steps → result."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from lora_kit.allocator import give_back_freed
from lora_kit.data import make_loader
from lora_kit.files import write_text
from lora_kit.models.attention import check_attention
from lora_kit.models.quantise import check_quantise
from lora_kit.recipe import Recipe, dump_recipe
from lora_kit.training.build import build_run
from lora_kit.training.checkpoints.disk import full_disk_told
from lora_kit.training.checkpoints.resume import begin
from lora_kit.training.checkpoints.saving import interrupted, is_best, last_whole, link_best, save_now, write_checkpoint
from lora_kit.training.checkpoints.state import Progress
from lora_kit.training.compiling import check_compile
from lora_kit.training.finish import Outcome, finish_run
from lora_kit.training.folder import RunFolder, prepare_folder
from lora_kit.training.metrics import Metrics, NoMetrics
from lora_kit.training.objects import Run
from lora_kit.training.one_step import Steps, is_due, take_step
from lora_kit.training.optimization.optimizers import check_optimizer
from lora_kit.training.peak_memory import RunPeak
from lora_kit.training.prepared import rest_encoders
from lora_kit.training.processes.launch import build_accelerator, sharding_of
from lora_kit.training.processes.launcher import follow_launcher
from lora_kit.training.processes.shares import common_facts, takes_part, written_by_main
from lora_kit.training.processes.signals import StopSignals
from lora_kit.training.processes.together import agreed, common_checkpoint, lost_process_told, require_same
from lora_kit.training.trackers import check_trackers, start_trackers, stop_trackers
from lora_kit.training.validation.measuring import Base
from lora_kit.training.validation.rounds import validate
from lora_kit.training.validation.verdict import reason_to_stop, with_validation


def train(recipe: Recipe) -> Outcome:
    """Train as the recipe says. Every process of an `accelerate launch` calls this.

    Raises LoraKitError for what the user can mend, TrainingError when the run cannot go on, InterruptedRunError after
    a signal, once the step is finished and saved.
    """
    recipe = follow_launcher(recipe)
    check_trackers(recipe)
    accelerator = build_accelerator(recipe)
    folder = RunFolder(Path(recipe.output_dir))
    with lost_process_told(accelerator, partial(last_whole, folder)):
        return _train_in(folder, recipe, accelerator)


def _train_in(folder: RunFolder, recipe: Recipe, accelerator: Accelerator) -> Outcome:
    check_optimizer(recipe, accelerator.device)
    check_quantise(recipe.model.quantize, accelerator.device, sharded=sharding_of(accelerator) is not None)
    check_attention(recipe.model.attention)
    check_compile(recipe, accelerator.device)
    damaged = prepare_folder(recipe) if accelerator.is_main_process else []
    accelerator.wait_for_everyone()
    checkpoint = common_checkpoint(accelerator, recipe)
    peak = RunPeak(accelerator.device)
    with peak.watching("start"):
        run = build_run(recipe, accelerator, resumes=checkpoint is not None)
        require_same(accelerator, common_facts(run))
        progress, notices, base = begin(run, checkpoint)
    notices += rest_encoders(run.bundle, run.prepared, run.learner.conditions.trained)
    give_back_freed()
    start_trackers(accelerator, recipe)
    with full_disk_told(folder.root, partial(last_whole, folder)):
        if run.accelerator.is_main_process:
            write_text(folder.root / "recipe.yaml", dump_recipe(recipe))
            write_text(folder.root / "plan.json", json.dumps(progress.plan, indent=1) + "\n")
        with _metrics(run, folder, progress.step) as metrics:
            for notice in [*run.notices, *damaged, *notices]:
                metrics.say(notice)
            try:
                return _train(run, folder, metrics, progress, base, peak)
            finally:
                _list_skipped(run, folder, metrics)
                stop_trackers(accelerator)


def _train(run: Run, folder: RunFolder, metrics: Metrics, progress: Progress, base: Base, peak: RunPeak) -> Outcome:
    recipe = run.recipe
    loader = make_loader(run.data, recipe, run.accelerator, first_step=progress.step, even=run.is_sharded)
    with StopSignals() as signals, Steps(run, folder, metrics, progress.skipped_in_row) as steps:
        link_best(run, folder, progress)  # as the checkpoint knows it, which may be an older one
        # That of step 0, or one that a kill cut off after its checkpoint.
        progress = _validated(run, folder, metrics, progress, base, peak)
        over = _is_over(run, progress)  # also of a run that stopped early before it was resumed
        for batches in loader if not over else ():
            with peak.watching("steps"):
                progress = take_step(steps, batches, progress, stop=signals.number is not None)
            if steps.interrupted and progress.step < recipe.train.max_steps:
                save_now(run, folder, progress)
                raise interrupted(folder, progress.step, signals.number)
            progress = _validated(run, folder, metrics, progress, base, peak)
            over = _is_over(run, progress)
            with peak.watching("checkpoints"):
                if over or is_due(recipe.save.every, progress.step):
                    save_now(run, folder, progress)
                elif is_best(run, progress) and takes_part(run):
                    write_checkpoint(run, folder, progress)
            if over:
                break
    run.accelerator.wait_for_everyone()
    if not takes_part(run):
        return Outcome([], {}, is_main=False)
    link_best(run, folder, progress)
    give_back_freed()
    with peak.watching("result"):
        outcome = finish_run(run, folder, metrics, progress)
    return outcome._replace(peak=peak)


def _validated(
    run: Run, folder: RunFolder, metrics: Metrics, progress: Progress, base: Base, peak: RunPeak
) -> Progress:
    """The progress with the validation of its step, where one is due and was not done before a resume."""
    step = progress.step
    due = step in (0, run.recipe.train.max_steps) or is_due(run.recipe.validation.every, step)
    if not due or progress.validated or not takes_part(run):
        return progress
    give_back_freed()
    with peak.watching("validation"), written_by_main(run, folder) as place:
        found = validate(run, place, metrics, step, base)
    give_back_freed()
    if run.is_sharded:  # what is best is decided once
        found = agreed(run.accelerator, found)
    return with_validation(progress, found)


def _is_over(run: Run, progress: Progress) -> bool:
    """Whether the run ends after this step: its last, or stopped early. All processes come to the same."""
    rule, step = run.recipe.validation.early_stop, progress.step
    if step == run.recipe.train.max_steps or rule is None or not is_due(run.recipe.validation.every, step):
        return step == run.recipe.train.max_steps
    return agreed(run.accelerator, bool(reason_to_stop(progress.history, rule)))  # the main process has validated


def _metrics(run: Run, folder: RunFolder, first_step: int) -> Metrics:
    if not run.accelerator.is_main_process:
        return NoMetrics()
    return Metrics(folder.root, first_step, run.recipe.train.max_steps, run.accelerator)


def _list_skipped(run: Run, folder: RunFolder, metrics: Metrics) -> None:
    skipped = run.skipped
    if not skipped:
        return
    metrics.say(f"skipped {len(skipped)} pictures (data.on_error: skip); also in {folder.skipped}:")
    lines = [f"{name}: {reason}" for name, reason in skipped]
    for line in lines[:20] + ([f"… {len(lines) - 20} more"] if len(lines) > 20 else []):
        metrics.say(f"  {line}")
    if run.accelerator.is_main_process:
        write_text(folder.skipped, "\n".join(lines) + "\n")
