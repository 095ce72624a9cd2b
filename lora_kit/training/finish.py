"""The end of a run: which weights are its result, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from lora_kit.training.checkpoints.resume import state_of
from lora_kit.training.checkpoints.state import Progress, checkpoint_name, load_checkpoint
from lora_kit.training.folder import RunFolder
from lora_kit.training.metrics import Metrics
from lora_kit.training.objects import Run
from lora_kit.training.peak_memory import RunPeak
from lora_kit.training.processes.shares import written_by_main
from lora_kit.training.result import write_result
from lora_kit.training.validation.restoring import restoring_lines
from lora_kit.training.validation.rounds import finish
from lora_kit.training.validation.verdict import verdict_line


class Outcome(NamedTuple):
    """What a finished run left."""

    paths: list[Path]
    """adapter.safetensors and learned tokens' files, or the model folder of a full fine-tune; after them the moving
    averages of these, if there are any."""
    figures: dict[str, Any]
    """What result.json holds."""
    is_main: bool
    """Whether this process wrote it."""
    best_paths: tuple[Path, ...] = ()
    """Those of the best step, beside the last's (`save.result: both`)."""
    averages: int = 0
    """How many of `paths` are moving averages."""
    peak: RunPeak | None = None
    """The most memory that each stage held."""

    @property
    def path(self) -> Path:
        """The weights as trained."""
        return self.paths[0]

    def lines(self) -> list[str]:
        """The figures for a reader, a line each."""
        f = self.figures
        trained = len(self.paths) - self.averages
        as_trained = ": the weights as trained" if self.averages else ""
        lines = [f"wrote {path}{as_trained}" for path in self.paths[:trained]]
        averaged = f": their {f['weights']}; validation measured and drew these"
        lines += [f"wrote {path}{averaged}" for path in self.paths[trained:]]
        lines += [f"wrote {path}: the weights of step {f['best_step']}, the best" for path in self.best_paths]
        if "stopped" in f:
            lines.append(f["stopped"])
        if "held_out_loss" in f:
            lines.append(
                f"held-out loss {f['held_out_loss']:.4f}, base {f['held_out_base_loss']:.4f}, paired difference "
                f"{told(f, 'held_out_difference')}"
            )
        bands = [name for name in f if name.startswith("held_out_difference_t") and name[-1].isdigit()]
        lines += [f"  {name.rpartition('_')[2]}: {told(f, name)}" for name in bands]
        if "gap" in f:
            lines.append(
                f"training pictures: difference to the base {told(f, 'train_subset_difference')}; "
                f"gap to the held-out ones {told(f, 'gap')}"
            )
        if "drift" in f:
            lines.append(f"drift on unrelated prompts: {f['drift']:.2%} of the base's own loss")
        if "best_step" in f:
            lines.append(verdict_line(f))
        lines += restoring_lines(f)
        for strength in ("0", "1"):
            if f"top1_at_{strength}" in f:
                lines.append(
                    f"strength {strength}: mean saturation {f[f'saturation_at_{strength}']:.2f}; nearest of "
                    f"{f['held_out_pictures']} held-out pictures is the own one for {f[f'top1_at_{strength}']:.1%}, "
                    f"among the nearest five for {f[f'top5_at_{strength}']:.1%} (chance {f['chance_top1']:.1%})"
                )
        return [*lines, *(self.peak.line() if self.peak is not None else [])]


def finish_run(run: Run, folder: RunFolder, metrics: Metrics, progress: Progress) -> Outcome:
    """Write the result that `save.result` names, the sheets and result.json. Nothing is trained after this: the best
    checkpoint's weights take the place of the last's."""
    wanted, best = run.recipe.save.result, _best_checkpoint(run, folder, metrics, progress)
    step = progress.step
    if wanted == "best" and best is not None:
        step = _put_in(run, best)
    paths = write_result(run, folder, step)
    averages = len(paths) // 2 if run.average.is_moving else 0
    with written_by_main(run, folder) as place:
        figures = finish(run, place, metrics, progress, step)
    if wanted != "both" or best is None:
        return Outcome(paths, figures, is_main=run.accelerator.is_main_process, averages=averages)
    beside = write_result(run, folder, _put_in(run, best), beside=True)
    is_main = run.accelerator.is_main_process
    return Outcome(paths, figures, is_main=is_main, best_paths=tuple(beside), averages=averages)


def told(figures: dict[str, Any], name: str) -> str:
    """`-0.0123 (95 %: -0.0200 to -0.0046)`."""
    low, high = figures.get(f"{name}_low", math.nan), figures.get(f"{name}_high", math.nan)
    ends = "one picture, no interval" if math.isnan(low) else f"95 %: {low:+.4f} to {high:+.4f}"
    return f"{figures[name]:+.4f} ({ends})"


def _best_checkpoint(run: Run, folder: RunFolder, metrics: Metrics, progress: Progress) -> Path | None:
    """The checkpoint of the best step, where the result is to hold its weights; None, and said, if there is none."""
    section = run.recipe.save
    if section.result == "last" or not section.best or progress.best is None:
        return None
    step = int(progress.best["step"])
    if step == progress.step and section.result == "both":
        return None  # one file says it
    path = folder.checkpoints / checkpoint_name(step)
    if path.is_dir():
        return path
    why = "that is the base itself" if step == 0 else f"{path} is not there"
    metrics.say(f"save.result: the best step is {step}, but {why}; the result is the last step's alone.")
    return None


def _put_in(run: Run, checkpoint: Path) -> int:
    """Let the checkpoint's weights stand in the run; its step."""
    return load_checkpoint(checkpoint, run.plan_document, run.base_hash, state_of(run)).step
