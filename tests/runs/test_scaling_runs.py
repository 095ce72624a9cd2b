"""Several processes under accelerate launch, with whole and with sharded networks (FSDP), against one process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_kit.training.checkpoints.folders import damage, find_checkpoints, newest_whole

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "train_lora.py")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONFAULTHANDLER": "1",  # a process that a signal ends says where it was
}
# Three and two of a step's pictures, two at a time: the processes have two micro-batches and one.
RECIPE = """
model: {{base: {base}}}
targets: {targets}
data: {{sources: [{{path: {pictures}}}], resolution: 16, batch_size: 5}}
optimizer: {{name: sgd, lr: 0.05, args: {{momentum: 0.9}}}}
train: {{max_steps: 10, micro_batch_size: 2, log_every: 1, ema_decay: 0.9}}
save: {{every: 5, dtype: fp32, best: false}}
validation: {{every: 0, steps: 1, prompts: [a], held_out: {{path: {held_out}}}}}
output_dir: {out}
"""
LORA = "[{match: 'unet.**.attn*.to_{q,k,v,out.0}', rank: 4, alpha: 40}, {match: 'text_encoder.**.q_proj', rank: 2}]"
FULL = "[{match: 'unet.**', method: full}, {match: 'text_encoder.**', method: full}]"
FSDP = ("--use_fsdp", "--fsdp_version", "2")
ROUNDING = 10 * 100 * torch.finfo(torch.float32).eps
"""Ten steps through about a hundred layers there and back, each of which rounds: relative to how far weights moved."""


def launch(processes: int, recipe: Path, *overrides: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return finished(command(processes, recipe, *overrides, flags=flags))


def finished(line: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def command(processes: int, recipe: Path, *overrides: str, flags: tuple[str, ...] = ()) -> list[str]:
    """One process is started without the launcher, which would have it take every core."""
    run = [SCRIPT, str(recipe), *overrides]
    if processes == 1:
        return [sys.executable, *run]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *(flags or ("--multi_gpu",))]
    launcher += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    return [*launcher, "--dynamo_backend", "no", "--main_process_port", "0", *run]


def well(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def tensors(run: Path, step: int, name: str = "trainable") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / f"{name}.safetensors")


def weights_of(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The result's files: an adapter and its average, or two model folders."""
    paths = [path for path in run.rglob("*.safetensors") if "checkpoints" not in path.parts]
    return {str(path.relative_to(run)): load_file(path) for path in paths}


def norm(values: dict[str, torch.Tensor]) -> float:
    return float(sum(value.double().square().sum() for value in values.values()).sqrt())


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert one.keys() == two.keys()
    return {name: one[name].double() - two[name].double() for name in one}


def assert_same_run(one: Path, two: Path) -> None:
    """The weights, their average and the momentum after ten steps, but for rounding."""
    moved = norm(difference(tensors(one, 10), tensors(one, 5)))
    assert moved > 0.01
    assert norm(difference(tensors(one, 10), tensors(two, 10))) < ROUNDING * moved
    assert norm(difference(tensors(one, 10, "ema"), tensors(two, 10, "ema"))) < ROUNDING * moved
    momentum = tensors(one, 10, "optimizer")
    assert norm(difference(momentum, tensors(two, 10, "optimizer"))) < ROUNDING * norm(momentum)


@pytest.fixture(scope="module")
def recipes(tiny_sd1_folder, picture_folder, make_picture_folder, tmp_path_factory):
    """Of a method: its recipe, and the folder of a run of it in one process, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("scaling")
    held_out = make_picture_folder(folder / "held-out", count=3)

    @cache
    def made(method: str) -> tuple[Path, Path]:
        path, out = folder / f"{method}.yaml", folder / method
        places = {"base": tiny_sd1_folder, "pictures": picture_folder, "held_out": held_out}
        path.write_text(RECIPE.format(targets={"lora": LORA, "full": FULL}[method], out=out, **places))
        well(launch(1, path))
        return path, out

    return made


PIVOTAL = [
    "targets=[{match: 'unet.**.to_q', rank: 2}]",
    "tokens=[{token: <toy>, initializer: cat, vectors: 2, until: 7}]",
    "data.trigger=<toy>",
    "optimizer.token_lr=0.05",
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), FSDP], ids=["whole", "sharded"])
def test_tokens_are_learned_by_two_processes_as_by_one(recipes, tmp_path, flags):
    recipe, _ = recipes("lora")
    well(launch(1, recipe, f"output_dir={tmp_path / 'one'}", *PIVOTAL))
    well(launch(2, recipe, f"output_dir={tmp_path / 'two'}", *PIVOTAL, flags=flags))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    rows = [next(one for key, one in tensors(tmp_path / "two", step).items() if ".rows." in key) for step in (5, 10)]
    assert not torch.equal(*rows)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("lora", ()),
        pytest.param("lora", FSDP, marks=pytest.mark.slow),
        pytest.param("full", FSDP, marks=pytest.mark.slow),
    ],
)
def test_ten_steps_of_two_processes_are_those_of_one(recipes, tmp_path, method, flags):
    recipe, one = recipes(method)
    said = well(launch(2, recipe, f"output_dir={tmp_path / 'two'}", flags=flags))
    assert "2 processes share each step's pictures" in said
    assert_same_run(one, tmp_path / "two")
    results = [weights_of(run) for run in (one, tmp_path / "two")]
    assert results[0].keys() == results[1].keys()
    for name, weights in results[0].items():
        assert norm(difference(weights, results[1][name])) < ROUNDING * norm(weights), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        "method: dora, rank: 2",
        "method: loha, rank: 2",
        "method: lokr, rank: 2",
        "method: oft, block_size: 4",
        "method: boft, block_size: 4, stages: 2",
        "method: diff",
        "rank: 2, init: pissa",
        "rank: 2, init: orthogonal, max_norm: 0.05",
    ],
)
def test_every_method_trains_over_sharded_networks_as_in_one_process(recipes, tmp_path, rule):
    recipe, _ = recipes("lora")
    own = [f"targets=[{{match: 'unet.**.attn*.to_q', {rule}}}]", "optimizer.lr=0.01"]
    well(launch(1, recipe, f"output_dir={tmp_path / 'one'}", *own))
    well(launch(2, recipe, f"output_dir={tmp_path / 'two'}", *own, flags=FSDP))
    one, two = tmp_path / "one", tmp_path / "two"
    moved = norm(difference(tensors(one, 10), tensors(one, 5)))
    assert moved > 0
    # Beside the steps' own rounding, that of the weights as they begin: PiSSA's and DoRA's are as large as W.
    allowed = ROUNDING * moved + 10 * torch.finfo(torch.float32).eps * norm(tensors(one, 5))
    assert norm(difference(tensors(one, 10), tensors(two, 10))) < allowed


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_another_number_of_processes(recipes, tmp_path):
    recipe, one = recipes("full")
    out = f"output_dir={tmp_path / 'run'}"
    well(launch(2, recipe, out, "train.max_steps=5", flags=FSDP))
    said = well(launch(1, recipe, out, "train.resume=latest"))
    assert "step-000005, after step 5" in said
    assert_same_run(one, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rate", "flags"), [("lora", 2.0, ()), ("lora", 2.0, FSDP), ("full", 0.2, FSDP)])
def test_several_processes_validate_stop_early_and_keep_the_best_as_one_does(recipes, tmp_path, method, rate, flags):
    # Rates at which the loss soon rises: the best is not the last, and the run ends early.
    recipe, _ = recipes(method)
    rising = [f"optimizer.lr={rate}", "train.max_steps=30", "validation.every=1", "validation.early_stop={patience: 2}"]
    rising += ["save.best=true", "save.every=4"]
    for processes in (1, 2):
        well(launch(processes, recipe, f"output_dir={tmp_path / str(processes)}", *rising, flags=flags))
    figures = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("1", "2")]
    assert figures[0].keys() == figures[1].keys()
    steps = [[path.name for path in find_checkpoints(tmp_path / name / "checkpoints")] for name in ("1", "2")]
    assert steps[0] == steps[1]
    assert figures[0]["best_step"] == figures[1]["best_step"]
    assert figures[0]["held_out_base_loss"] == pytest.approx(figures[1]["held_out_base_loss"], rel=ROUNDING)
    results = [weights_of(tmp_path / name) for name in ("1", "2")]
    assert results[0].keys() == results[1].keys()
    assert any("best" in name for name in results[0])


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_by_all_processes_alike(recipes, tmp_path):
    # A rate at which weights, and so losses, overflow within a step or two.
    recipe, _ = recipes("lora")
    wild = ["optimizer.lr=1e30", "optimizer.max_grad_norm=0", "train.non_finite=skip", "train.max_non_finite=99"]
    wild += ["validation.prompts=[]", "validation.held_out=null", "train.ema_decay=null"]
    for processes in (1, 2):
        well(launch(processes, recipe, f"output_dir={tmp_path / str(processes)}", *wild))
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("1", "2")]
    told = [[json.loads(line) for line in text.splitlines()] for text in texts]
    skipped = [[line["step"] for line in lines if "skipped" in line] for lines in told]
    assert skipped[0] == skipped[1] != []
    assert set(skipped[0]) < set(range(1, 11))


STEPS = 4000  # far more than are done before the run is stopped


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), FSDP], ids=["whole", "sharded"])
def test_a_rank_that_is_killed_ends_the_run_with_its_message_and_a_whole_checkpoint(recipes, tmp_path, flags):
    recipe, _ = recipes("lora")
    run = tmp_path / "run"
    overrides = [f"output_dir={run}", f"train.max_steps={STEPS}", "save.every=2", "validation.prompts=[]"]
    process = subprocess.Popen(
        command(2, recipe, *overrides, flags=flags), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while newest_whole(run / "checkpoints") is None:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in said
    assert re.search(r"rank +: 1 ", said), said[-3000:]
    assert "Another process of this launch ended" in said
    last = newest_whole(run / "checkpoints")
    assert f"Last good checkpoint: {last}; go on from it with train.resume=latest" in said
    assert "Traceback" not in said.partition("torch.distributed.elastic")[0].partition("closing signal")[0]
    assert all(damage(path) == "" for path in find_checkpoints(run / "checkpoints"))
    step = int(last.name.removeprefix("step-"))
    told = well(launch(1, recipe, *overrides, f"train.max_steps={step + 1}", "train.resume=latest"))
    assert f"resumed from {last}" in told


@pytest.mark.parametrize("flags", [(), pytest.param(FSDP, marks=pytest.mark.slow)], ids=["whole", "sharded"])
def test_a_signal_to_one_rank_stops_all_of_them_after_one_step_and_saves_it(recipes, tmp_path, flags):
    recipe, _ = recipes("lora")
    run = tmp_path / "run"
    overrides = [f"output_dir={run}", f"train.max_steps={STEPS}", "save.every=0", "validation.prompts=[]"]
    process = started(command(2, recipe, *overrides, flags=flags), run / "metrics.jsonl")
    os.kill(rank_of(process.pid, 1), signal.SIGUSR1)
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "SIGUSR1: finishing the step, then saving." in said
    last = newest_whole(run / "checkpoints")
    assert f"saved {last}. Go on with train.resume=latest." in said
    assert "Another process of this launch ended" not in said


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", "error: The processes of this launch do not see the same:\n  recipe: process 1 has another"),
        pytest.param("data.sources.0.path=nowhere", "error: process 1 of 2: ", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_sees_something_else_ends_the_run_before_its_first_step(recipes, tmp_path, override, expected):
    recipe, _ = recipes("lora")
    line = command(2, recipe, f"output_dir={tmp_path / 'run'}")
    at = line.index(SCRIPT)
    done = finished([*line[:at], str(ROOT / "tests" / "runs" / "one_rank.py"), "1", override, *line[at + 1 :]])
    assert done.returncode != 0
    assert expected in done.stderr, done.stderr[-5000:]
    assert not list((tmp_path / "run").glob("**/*.safetensors"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "flags"), [("lora", ("--multi_gpu",)), ("full", FSDP)])
def test_two_machines_of_one_process_each_learn_what_one_process_does(recipes, tmp_path, method, flags):
    recipe, one = recipes(method)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    lines = []
    for rank in ("0", "1"):
        line = command(2, recipe, f"output_dir={tmp_path / 'two'}", flags=flags)
        line[line.index("--num_machines") + 1] = "2"
        line[line.index("--main_process_port") + 1] = port
        at = line.index(SCRIPT)
        lines.append([*line[:at], "--machine_rank", rank, "--main_process_ip", "127.0.0.1", *line[at:]])
    both = [subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for line in lines]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-5000:]
    assert_same_run(one, tmp_path / "two")


def started(line: list[str], metrics: Path) -> subprocess.Popen[str]:
    """The launch, once its first steps are done."""
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def rank_of(launcher: int, rank: int) -> int:
    """The process of that rank among the launcher's children."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")
