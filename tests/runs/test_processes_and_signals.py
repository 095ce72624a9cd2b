"""Real processes: two of them under accelerate launch, and one that is asked to stop."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "train_lora.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RECIPE = """
model: {{base: {base}}}
targets: {{preset: attention, rank: 4}}
data: {{sources: [{{path: {pictures}}}], resolution: 16, batch_size: 5}}
optimizer: {{lr: 1e-4}}
train: {{max_steps: {steps}, log_every: 1}}
save: {{every: 0}}
validation: {{every: 0}}
output_dir: {out}
"""


def write_recipe(folder: Path, base: Path, pictures: Path, steps: int) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(base=base, pictures=pictures, steps=steps, out=folder / "run"))
    return path


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def launch(
    processes: int, recipe: Path, out: Path, flags: tuple[str, ...] = (), overrides: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    flags = flags or (("--multi_gpu",) if processes > 1 else ())
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return subprocess.run(
        [*command, SCRIPT, str(recipe), f"output_dir={out}", *overrides],
        env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_two_processes_learn_what_one_does(tiny_sd1_folder, make_picture_folder, tmp_path, cache):
    # Five pictures over two processes: three and two, so a mean of the processes' means would be wrong.
    # On disk, each run has a cache of its own; two processes fill theirs together, and both leave out what is broken.
    pictures = make_picture_folder(tmp_path / "pictures", count=9)
    (pictures / "004.png").write_bytes(b"no picture")
    recipe = write_recipe(tmp_path, tiny_sd1_folder, pictures, 4)
    for processes in (1, 2):
        kept = (f"data.cache={cache}", f"data.cache_dir={tmp_path / f'cache{processes}'}")
        done = launch(processes, recipe, tmp_path / f"run{processes}", overrides=kept)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("2 processes share each step's pictures" in done.stderr) == (processes == 2)
        assert "pictures/004.png: not a readable picture" in (tmp_path / f"run{processes}" / "skipped.txt").read_text()
    one, two = losses(tmp_path / "run1"), losses(tmp_path / "run2")
    assert len(one) == 4
    # The same samples, noise and sums in another order: as for micro-batches.
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-5, atol=0)


def test_a_launch_that_starts_one_process_instead_of_two_is_refused(tiny_sd1_folder, picture_folder, tmp_path):
    recipe = write_recipe(tmp_path, tiny_sd1_folder, picture_folder, 4)
    done = launch(2, recipe, tmp_path / "run", ("--cpu",))
    assert done.returncode != 0
    assert "accelerate launch --multi_gpu --num_processes N" in done.stderr
    assert not (tmp_path / "run").exists()


def started(command: list[str], run: Path) -> subprocess.Popen[str]:
    """The run's process, once it has logged three more steps."""
    before = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= before + 3):
        assert process.poll() is None, "ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_stopped_and_resumed_again_and_again_a_run_equals_one_never_stopped(tiny_sd1_folder, picture_folder, tmp_path):
    recipe = str(write_recipe(tmp_path, tiny_sd1_folder, picture_folder, 40))
    command = [sys.executable, SCRIPT, recipe]
    subprocess.run([*command, f"output_dir={tmp_path / 'whole'}"], env=ENVIRONMENT, check=True, timeout=300)
    first = True
    for number, status in [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]:
        process = started([*command, *([] if first else ["train.resume=latest"])], tmp_path / "run")
        first = False
        process.send_signal(number)
        if number == signal.SIGUSR1:
            process.send_signal(signal.SIGTERM)  # as clusters do when the time is up: it is stopping already
        _, said = process.communicate(timeout=120)
        assert process.returncode == status, said[-2000:]
        assert "Traceback" not in said
        assert f"{number.name}: finishing the step, then saving." in said
        assert f"Stopped by {number.name} after step" in said
        assert "train.resume=latest" in said
        assert not (tmp_path / "run" / "adapter.safetensors").exists()
    subprocess.run([*command, "train.resume=latest"], env=ENVIRONMENT, check=True, timeout=300)
    names = [tmp_path / folder / "adapter.safetensors" for folder in ("whole", "run")]
    tensors = [path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :] for path in names]
    assert hashlib.sha256(tensors[0]).digest() == hashlib.sha256(tensors[1]).digest()
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once_without_harm(tiny_sd1_folder, picture_folder, tmp_path):
    # Steps of a thousand pictures, so that the first Ctrl-C has a long step to finish.
    recipe = str(write_recipe(tmp_path, tiny_sd1_folder, picture_folder, 40))
    long = ["data.batch_size=4000", "train.micro_batch_size=5"]
    subprocess.run([sys.executable, SCRIPT, recipe, "train.max_steps=1"], env=ENVIRONMENT, check=True, timeout=300)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    command = [sys.executable, SCRIPT, recipe, *long, "train.resume=latest"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    said = ""
    while "resumed from" not in said:  # said just before the first step
        said += process.stderr.readline()
        assert process.poll() is None, said
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    while "finishing the step" not in said:
        said += process.stderr.readline()
    process.send_signal(signal.SIGINT)  # the same press, passed on by a launcher: nothing happens
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Left at once." in rest
    assert "Traceback" not in said + rest
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [checkpoint.name]
