"""Validation during a run, and the figures at its end."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lora_kit.files import write_text
from lora_kit.inference import compose_grid
from lora_kit.training.checkpoints.state import Progress
from lora_kit.training.folder import RunFolder
from lora_kit.training.metrics import Metrics
from lora_kit.training.objects import Run
from lora_kit.training.prepared import visiting
from lora_kit.training.validation.drawing import draw_at, draw_final, draw_step, save_picture
from lora_kit.training.validation.figures import mean_saturation, retrieval
from lora_kit.training.validation.filling import draw_filled
from lora_kit.training.validation.measuring import Base, Measured, measure
from lora_kit.training.validation.restoring import final_restoring, restores, restoring_figures
from lora_kit.training.validation.verdict import reason_to_stop, verdict


def validate(run: Run, folder: RunFolder, metrics: Metrics, step: int, base: Base) -> Measured:
    """Draw the prompts into samples/step-….png, and measure and log what is to be measured."""
    with run.average.applied(), encoders_if_drawing(run):
        if run.recipe.validation.prompts:
            draw_step(run, folder, metrics, step)
        draw_filled(run, folder, metrics, step)
        measured = measure(run, base, is_base=step == 0 and run.start is None)
        if restores(run):
            found = restoring_figures(run, folder, metrics, step)
            measured = measured._replace(figures=measured.figures | found)
    if measured.figures:
        metrics.log(step, measured.figures)
    metrics.restart_clock(step)
    return measured


def finish(run: Run, folder: RunFolder, metrics: Metrics, progress: Progress, step: int) -> dict[str, Any]:
    """The final sheets and result.json; returns what result.json holds.

    step: whose weights are in the networks, and are the result: the last, or the best.
    """
    section = run.recipe.validation
    result: dict[str, Any] = {"weights": run.average.describe()}
    own = next((entry for entry in progress.history if entry["step"] == step), {})
    result |= {name: value for name, value in own.items() if name != "step"}
    result |= verdict(progress)
    stopped = reason_to_stop(progress.history, section.early_stop)
    result |= {"stopped": stopped} if stopped and progress.step < run.recipe.train.max_steps else {}
    with run.average.applied(), encoders_if_drawing(run):
        if section.prompts:
            draw_final(run, folder, metrics, [int(entry["step"]) for entry in progress.history])
        if restores(run):
            result |= final_restoring(run, folder, metrics, step)
        draw_filled(run, folder, metrics, step, final=True)
        if section.retrieval:
            result |= _style_and_subject(run, folder)
    write_text(folder.root / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def encoders_if_drawing(run: Run) -> AbstractContextManager[None]:
    """The encoders at hand for a whole round, so that they are read once in it, however often it draws."""
    section, family = run.recipe.validation, run.bundle.family
    draws = section.prompts or section.retrieval or restores(run) or (family.sees_mask and run.held_out is not None)
    return visiting(run.bundle) if draws else nullcontext()


def _style_and_subject(run: Run, folder: RunFolder) -> dict[str, Any]:
    """Draw every held-out caption at strength 0 and 1; how like the held-out pictures they are."""
    assert run.held_out is not None
    captions, references = run.held_out.pictures.captions(), run.held_out.pictures.pictures()
    side = run.recipe.data.resolution
    references = [picture.resize((side, side)) for picture in references]
    figures: dict[str, Any] = {"held_out_pictures": len(captions), "chance_top1": 1 / len(captions)}
    for strength in [0.0, 1.0] if run.has_adapter else [1.0]:
        drawn = draw_at(run, captions, strength)
        found = retrieval(drawn, references)
        figures[f"saturation_at_{strength:g}"] = round(mean_saturation(drawn), 3)
        figures[f"top1_at_{strength:g}"] = round(found.top1, 4)
        figures[f"top5_at_{strength:g}"] = round(found.top5, 4)
        shown = range(0, min(len(drawn), 64))
        rows = [[references[i], drawn[i]] for i in shown]
        sheet = compose_grid(rows, [captions[i] for i in shown], ["held-out picture", f"drawn at {strength:g}"])
        save_picture(sheet, folder.samples / f"held_out_at_{strength:g}.png")
    return figures
