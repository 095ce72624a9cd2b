"""A run that is killed by SIGKILL at any point, and resumed, is the run that was never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {{base: {base}}}
targets:
  - {{match: "unet.**.attn*.to_{{q,k,v,out.0}}", rank: 4, dropout: 0.1}}
  - {{match: "unet.**.resnets.*.conv1", rank: 2, lr_scale: 0.5}}
data: {{sources: [{{path: {pictures}}}], resolution: 16, batch_size: 3, flip: true, caption_dropout: 0.2}}
optimizer: {optimizer}
schedule: {schedule}
train: {{max_steps: {steps}, micro_batch_size: 2, log_every: 1{ema}}}
save: {{every: 2}}
validation: {{every: 5, held_out: {{path: {held_out}}}}}
output_dir: {out}
"""
ADAMW = {"optimizer": "{lr: 3e-3}", "schedule": "{name: cosine, warmup_steps: 4}", "ema": ", ema_decay: 0.9"}
PRODIGY = {"optimizer": "{name: prodigy}", "schedule": "{warmup_steps: 4}", "ema": ", ema_decay: 0.9"}


def killed_run(folder: Path, recipe: dict, points: int, seed: int) -> tuple[dict, str]:
    (folder / "recipe.yaml").write_text(RECIPE.format(out=folder / "run", **recipe))
    command = [sys.executable, str(ROOT / "tests" / "runs" / "kill_chain.py"), str(folder / "recipe.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(points), str(seed)], env=environment, capture_output=True, text=True)
    print(done.stdout)  # shown by pytest -s, and when the test fails
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.parametrize(
    ("points", "steps", "settings"),
    [
        pytest.param(4, 8, ADAMW, id="4 points"),
        pytest.param(24, 48, ADAMW, id="24 points", marks=pytest.mark.slow),
        pytest.param(24, 48, PRODIGY, id="24 points, prodigy", marks=pytest.mark.slow),
        pytest.param(200, 400, ADAMW, id="200 points", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_point_and_resumed_is_the_run_never_stopped(
    tiny_sd1_folder, picture_folder, make_picture_folder, tmp_path, points, steps, settings
):
    held_out = make_picture_folder(tmp_path / "held-out", count=3, size=(48, 40))
    places = {"base": tiny_sd1_folder, "pictures": picture_folder, "held_out": held_out, "steps": steps}
    report, said = killed_run(tmp_path, places | settings, points, seed=points)
    assert len(report["same"]) == 6
    assert all(report["same"].values()), said
    assert report["rows"], "metrics.jsonl differs"
    # The chain is worth its time only if it kills, and in saves too.
    assert report["killed"] >= points * 0.9
    assert report["in a save"] >= 1
    assert not [name for name in report["left"] if name.startswith(".")], report["left"]
