"""Pictures and held-out loss during a run, and the figures at its end."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import Image

from lora_kit.adapters import set_scale
from lora_kit.files import write_atomically, write_text
from lora_kit.inference import SamplingSettings, compose_grid, draw
from lora_kit.inference.sampling import vae_factor
from lora_kit.training.build import ADAPTER, Run, set_training
from lora_kit.training.checkpoints import Progress
from lora_kit.training.drift import drift, traces
from lora_kit.training.figures import mean_saturation, retrieval
from lora_kit.training.folder import RunFolder
from lora_kit.training.held_out import held_out_losses
from lora_kit.training.measures import Measured, figures, means, paired
from lora_kit.training.metrics import Metrics
from lora_kit.training.prepared import visiting


def measure_base(run: Run) -> Measured:
    """Losses before the first step: an untrained adapter is the base."""
    return _measured(run)


class Validated(NamedTuple):
    """What one validation found."""

    figures: dict[str, float]
    losses: list[float]
    """Of each held-out picture."""


def validate(run: Run, folder: RunFolder, metrics: Metrics, step: int, base: Measured) -> Validated:
    """Draw the prompts into samples/step-….png and log the held-out figures; what was logged."""
    found = Validated({}, [])
    with run.average.applied():
        if run.recipe.validation.prompts:
            sheet = _sheet(run, [1.0])
            save_picture(sheet, folder.samples / f"step-{step:06d}.png")
            metrics.picture("samples", sheet, step)
        if run.held_out is not None:
            now = _measured(run)
            found = Validated(figures(now, base), means(now.held_out))
        found.figures.update(_drift(run))
        if found.figures:
            metrics.log(step, found.figures)
    metrics.restart_clock(step)
    return found


def finish(run: Run, folder: RunFolder, metrics: Metrics, progress: Progress) -> dict[str, Any]:
    """samples/final_grid.png and result.json; returns what result.json holds."""
    section = run.recipe.validation
    result: dict[str, Any] = {"weights": run.average.describe()}
    with run.average.applied():
        if section.prompts:
            strengths = [1.0] if run.is_full else list(section.strengths)
            sheet = _sheet(run, strengths)
            save_picture(sheet, folder.samples / "final_grid.png")
            metrics.picture("final_grid", sheet, run.recipe.train.max_steps)
        if run.held_out is not None:
            now = _measured(run)
            result |= figures(now, Measured(progress.base_losses, progress.base_trained))
            result |= _against_best(progress, means(now.held_out))
        result |= _drift(run)
        if section.retrieval:
            result |= _style_and_subject(run, folder)
    write_text(folder.root / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def settings_of(run: Run) -> SamplingSettings:
    """The validation section's sampler settings at the training resolution."""
    section, side = run.recipe.validation, run.recipe.data.resolution
    return SamplingSettings(
        steps=section.steps,
        guidance=section.guidance,
        negative_prompt=section.negative_prompt,
        width=side,
        height=side,
        long_prompts=run.recipe.data.captions.long,
    )


def save_picture(picture: Image.Image, path: Path) -> None:
    """A PNG, whole or not there."""
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def _sheet(run: Run, strengths: list[float]) -> Image.Image:
    prompts = run.recipe.validation.prompts
    columns = [_draw(run, prompts, strength) for strength in strengths]
    rows = [list(row) for row in zip(*columns, strict=True)]
    labels = [f"strength {strength:g}" for strength in strengths]
    return compose_grid(rows, prompts, ["trained weights"] if run.is_full else labels)


def _draw(run: Run, prompts: list[str], strength: float) -> list[Image.Image]:
    seed = run.recipe.validation.seed
    with at_strength(run, strength), visiting(run.bundle.device, run.bundle.vae, run.bundle.text_encoder):
        return draw(run.bundle, prompts, [seed] * len(prompts), settings=settings_of(run))


@contextmanager
def at_strength(run: Run, strength: float) -> Generator[None]:
    """The adapter at this strength, and evaluation mode, while inside."""
    if not run.is_full:
        set_scale(run.bundle.components, {ADAPTER: strength})
    set_training(run.bundle, False)
    try:
        yield
    finally:
        set_training(run.bundle, True)
        if not run.is_full:
            set_scale(run.bundle.components, {ADAPTER: 1.0})


def _measured(run: Run) -> Measured:
    parts = (run.held_out, run.measured_training)
    with at_strength(run, 1.0), run.accelerator.autocast():
        found = [
            held_out_losses(part, run.learner.objective, run.bundle, run.learner.conditions) if part is not None else []
            for part in parts
        ]
    return Measured(*found)


def _drift(run: Run) -> dict[str, float]:
    """How far predictions for unrelated prompts moved from the base's. The base's are made anew each time: they cost as
    much as looking at them, and nothing has to be kept through a resume."""
    section, bundle = run.recipe.validation, run.bundle
    if not section.drift_prompts:
        return {}
    side = run.recipe.data.resolution // vae_factor(bundle)
    shape = (int(cast(Any, bundle.unet.config).in_channels), side, side)
    conditions = run.learner.conditions
    with visiting(bundle.device, bundle.text_encoder), run.accelerator.autocast():
        with at_strength(run, 0.0):
            known = traces(bundle, conditions, section.drift_prompts, shape, section.seed)
        with at_strength(run, 1.0):
            return {"drift": drift(bundle, conditions, known)}


def _against_best(progress: Progress, losses: list[float]) -> dict[str, Any]:
    """The best validation before this, the last one; nothing if there was none."""
    best = progress.best
    if best is None or not progress.best_losses or best["step"] == 0:
        return {"best_step": progress.step}
    if sum(losses) / len(losses) <= best["held_out_loss"]:
        return {"best_step": progress.step}
    against = paired(losses, progress.best_losses)
    return {
        "best_step": int(best["step"]),
        "last_minus_best": against.mean,
        "last_minus_best_interval": against.half_width,
    }


def _style_and_subject(run: Run, folder: RunFolder) -> dict[str, Any]:
    """Draw every held-out caption at strength 0 and 1; how like the held-out pictures they are."""
    assert run.held_out is not None
    captions, references = run.held_out.pictures.captions(), run.held_out.pictures.pictures()
    side = run.recipe.data.resolution
    references = [picture.resize((side, side)) for picture in references]
    told: dict[str, Any] = {"held_out_pictures": len(captions), "chance_top1": 1 / len(captions)}
    for strength in [1.0] if run.is_full else [0.0, 1.0]:
        drawn = _draw(run, captions, strength)
        found = retrieval(drawn, references)
        told[f"saturation_at_{strength:g}"] = round(mean_saturation(drawn), 3)
        told[f"top1_at_{strength:g}"] = round(found.top1, 4)
        told[f"top5_at_{strength:g}"] = round(found.top5, 4)
        shown = range(0, min(len(drawn), 64))
        rows = [[references[i], drawn[i]] for i in shown]
        sheet = compose_grid(rows, [captions[i] for i in shown], ["held-out picture", f"drawn at {strength:g}"])
        save_picture(sheet, folder.samples / f"held_out_at_{strength:g}.png")
    return told
