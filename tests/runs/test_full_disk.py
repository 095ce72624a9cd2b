"""A disk that is full while a run writes. RLIMIT_FSIZE stands for it: every write past it fails, as on a full disk."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit.training.checkpoints.folders import damage, find_checkpoints

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {{base: {base}}}
targets: {{preset: attention, rank: 16}}
data: {{sources: [{{path: {pictures}}}], resolution: 16, batch_size: 2}}
optimizer: {{lr: 1e-3}}
train: {{max_steps: 4, log_every: 1}}
save: {{every: 2}}
validation: {{every: 0}}
output_dir: {out}
"""


def launch(recipe: Path, *overrides: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command line, in a process that can write no file longer than `limit` bytes."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, str(ROOT / "scripts" / "train_lora.py"), str(recipe), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=limited, timeout=300)


@pytest.mark.skipif(os.name != "posix", reason="no RLIMIT_FSIZE")
def test_a_full_disk_stops_the_run_with_its_message_and_the_last_checkpoint_whole(
    tiny_sd1_folder, picture_folder, tmp_path
):
    recipe = tmp_path / "recipe.yaml"
    run = tmp_path / "run"
    recipe.write_text(RECIPE.format(base=tiny_sd1_folder, pictures=picture_folder, out=run))
    assert launch(recipe, "train.max_steps=2").returncode == 0
    (checkpoint,) = find_checkpoints(run / "checkpoints")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    # Enough for the logs and the trained weights, too little for the optimizer's two moments of them.
    limit = len(before["trainable.safetensors"]) + 4096
    assert limit < len(before["optimizer.safetensors"])
    stopped = launch(recipe, "train.resume=latest", limit=limit)
    assert stopped.returncode == 1, stopped.stderr[-2000:]
    assert "Traceback" not in stopped.stderr
    (said,) = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert f"{run / 'checkpoints' / 'step-000004'} could not be written: File too large." in said
    assert f"Last good checkpoint: {checkpoint}; go on from it with train.resume=latest. Free some space" in said
    assert [path.name for path in (run / "checkpoints").iterdir()] == [checkpoint.name]
    assert damage(checkpoint) == ""
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert launch(recipe, "train.resume=latest").returncode == 0  # and goes on, once there is room
