"""The two jobs of whole_job.py, who runs them, and the files that each is started with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from lora_kit.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
TINY = ROOT / "lora_kit" / "assets" / "tiny_base"
PLAIN, BARE = (Path(__file__).with_name(name) for name in ("plain.py", "bare.py"))
BUILD = """
import sys
import torch
from families import stable_diffusion
torch.manual_seed(0)
stable_diffusion("SD 1.5", {}, {}, sys.argv[2] == "True").save_pretrained(sys.argv[1])
"""


class Job(NamedTuple):
    """Pictures, base and settings that all contenders share."""

    name: str
    recipe: Recipe
    """As lora_kit runs it; the others get its values."""
    base: Path
    """A diffusers folder."""
    has_pretrained: bool
    """So that held-out pictures can show what was learnt."""


class Contender(NamedTuple):
    """Who runs a job, and how."""

    name: str
    targets: str
    """attention | all"""
    method: str
    """lora_kit | peft | lycoris"""
    autocast: str
    """no | bf16"""
    frozen: str = "fp32"
    """What the plain loop holds the frozen networks in. lora_kit: the precision of autocast."""
    overrides: tuple[str, ...] = ("validation={every: 0}", "save.every=0")
    """Beyond the job's recipe, of lora_kit: nothing but training, as the plain loop does."""
    is_reference: bool = False
    """Whether the others with its targets are compared with this one."""


def quickstart(steps: int, quick: bool) -> Job:
    """recipes/quickstart.yaml, with another number of steps."""
    changes = [f"train.max_steps={steps}", f"schedule.warmup_steps={min(20, steps // 2)}"]
    return Job("quickstart", load_recipe(RECIPE, changes), TINY, has_pretrained=not quick)


def sd15(steps: int, work: Path, quick: bool, precision: str = "bf16") -> Job:
    """SD 1.5's size with random weights at 256 px, batch 1, on the quickstart's pictures. The base is built once.
    precision: as train.mixed_precision."""
    base = work / ("sd15-quick" if quick else "sd15")
    if not (base / "model_index.json").is_file():
        subprocess.run([sys.executable, "-c", BUILD, base, str(quick)], check=True, cwd=Path(__file__).parents[1])
    values = {
        "model.base": base,
        "targets.preset": "attention",
        "data.resolution": 64 if quick else 256,
        "data.batch_size": 1,
        "data.caption_dropout": 0,
        "optimizer.lr": 1e-4,
        "schedule": "{name: constant}",
        "train.mixed_precision": precision,
        "train.max_steps": steps,
    }
    recipe = load_recipe(RECIPE, [f"{key}={value}" for key, value in values.items()])
    return Job("SD 1.5 size", recipe, base, has_pretrained=False)


def contenders(job: Job, autocast: str = "bf16") -> list[Contender]:
    """In the order in which they take turns. autocast: of the plain loop, bf16 | no."""
    precision = job.recipe.train.mixed_precision
    found: list[Contender] = []
    plain = "diffusers + PEFT, autocast over fp32" if autocast == "bf16" else "diffusers + PEFT, fp32 throughout"
    for targets in ("attention", "all"):
        found += [
            Contender("lora_kit", targets, "lora_kit", precision),
            Contender(plain, targets, "peft", autocast, is_reference=True),
            Contender("LyCORIS in that loop", targets, "lycoris", autocast),
        ]
        if precision == "bf16":
            found.append(Contender("diffusers + PEFT, frozen networks in bf16", targets, "peft", "bf16", "bf16"))
        elif autocast == "bf16":
            found.append(Contender("diffusers + PEFT, fp32 throughout", targets, "peft", "no"))
    if job.has_pretrained:
        found.append(Contender("lora_kit, with the recipe's validation", "all", "lora_kit", precision, overrides=()))
    return found


def command(job: Job, contender: Contender, out: Path) -> list[str]:
    """What starts it; writes the file that it is started with. out: its folder, to be made by it or here."""
    if contender.method == "lora_kit":
        path = out.with_name(f"{out.name}.yaml")
        path.write_text(json.dumps(job.recipe.model_dump(mode="json")))  # JSON is YAML
        own = [f"targets.preset={contender.targets}", "train.log_every=1", f"output_dir={out}", *contender.overrides]
        return [sys.executable, "-m", "lora_kit", "train", str(path), *own]
    out.mkdir()
    path = out / "settings.json"
    path.write_text(json.dumps(settings(job, contender, out)))
    return [sys.executable, str(PLAIN), str(path)]


def settings(job: Job, contender: Contender, out: Path) -> dict[str, Any]:
    """The recipe's values, for the plain loop."""
    recipe = job.recipe
    (source,) = recipe.data.sources
    targets: Any = recipe.targets
    return {
        "base": str(job.base),
        "pictures": source.path,
        "out": str(out),
        "method": contender.method,
        "targets": contender.targets,
        "autocast": contender.autocast,
        "frozen": contender.frozen,
        "rank": targets.rank,
        "resolution": recipe.data.resolution,
        "batch_size": recipe.data.batch_size,
        "caption_dropout": recipe.data.caption_dropout,
        "lr": recipe.optimizer.lr,
        "max_grad_norm": recipe.optimizer.max_grad_norm,
        "schedule": recipe.schedule.name,
        "warmup": recipe.schedule.warmup_steps,
        "steps": recipe.train.max_steps,
        "seed": recipe.seed,
    }
