"""What a process imports before it trains, told by processes of their own: never by the clock."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit.cli.quick_imports import quick_imports, uses_bitsandbytes
from lora_kit.recipe import Recipe

ROOT = Path(__file__).parents[2]
TORCH_AND_ON = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "PIL")
NOT_NEEDED = (
    "datasets",
    "pandas",
    "matplotlib",
    "scipy",
    "sklearn",
    "torchvision",
    "xformers",
    "deepspeed",
    "tensorflow",
    "wandb",
    "prodigyopt",
    "schedulefree",
    "lycoris",
    "torch._inductor.compile_fx",
    "diffusers.training_utils",
    "lora_kit.algebra",
)
"""What no plain LoRA run needs. bitsandbytes is not among it: diffusers and PEFT import it wherever it is installed."""
LISTS = "import sys, json\ndef listed(names): print(json.dumps([name for name in names if name in sys.modules]))\n"


def told(code: str, *arguments: str) -> tuple[list[str], str]:
    """The names that the code lists last, and its stderr."""
    command = [sys.executable, "-c", LISTS + code, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate({"model": {"base": "tiny"}, "data": {"sources": [{"path": "x"}]}, **sections})


@pytest.mark.parametrize("entry", ["script", "command"])
def test_a_wrong_recipe_fails_before_torch_is_imported(tmp_path: Path, entry: str) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: {base: tiny}\ndata: {sources: [{path: x}]}\nsead: 0\n")
    runs = {
        "script": "import runpy\nsys.argv = ['train_lora.py', sys.argv[1]]\n"
        "try: runpy.run_path('scripts/train_lora.py', run_name='__main__')\n",
        "command": "from lora_kit.cli.main import main\ntry: main(['train', sys.argv[1]])\n",
    }
    found, said = told(
        f"{runs[entry]}except SystemExit as end: print('status', end.code, file=sys.stderr)\nlisted({TORCH_AND_ON!r})",
        str(wrong),
    )
    assert "sead" in said
    assert "status 2" in said
    assert found == []


@pytest.fixture(scope="module")
def after_a_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str, dict[str, object]]:
    """What one plain run of one step has imported, what it said, and what it left of the process."""
    folder = tmp_path_factory.mktemp("plain")
    source = ROOT / "recipes" / "data" / "openmoji-line"
    text = (
        f"model: {{base: tiny}}\ntargets: {{preset: attention, rank: 2}}\n"
        f"data: {{sources: [{{path: {source}}}], resolution: 64, batch_size: 1, cache: none}}\n"
        f"train: {{max_steps: 1}}\noutput_dir: {folder / 'out'}\n"
    )
    (folder / "plain.yaml").write_text(text)
    code = (
        "import gc, os\nfrom lora_kit.cli.main import main\n"
        "try: main(['train', sys.argv[1]])\nexcept SystemExit: pass\n"
        "import torch\nmore = torch.compile(lambda x: x + 1, backend='eager')\n"
        "print(json.dumps({'collects': gc.isenabled(), 'frozen': gc.get_freeze_count(),\n"
        "'switch': os.environ.get('TORCHDYNAMO_DISABLE'), 'compiles': hasattr(more, '_torchdynamo_orig_callable')}),\n"
        "file=sys.stderr)\n"
        f"listed({(*NOT_NEEDED, 'diffusers', 'peft')!r})"
    )
    found, said = told(code, str(folder / "plain.yaml"))
    assert (folder / "out" / "adapter.safetensors").is_file()
    return found, said, json.loads(said.splitlines()[-1])


def test_a_plain_run_imports_nothing_that_it_does_not_need(after_a_run) -> None:
    assert after_a_run[0] == ["diffusers", "peft"]  # the two show that the list can hold something


def test_a_plain_run_says_nothing_of_bitsandbytes(after_a_run) -> None:
    assert "gemm_4bit" not in after_a_run[1]
    assert "bitsandbytes" not in after_a_run[1]


def test_the_process_collects_and_compiles_as_ever_afterwards(after_a_run) -> None:
    left = after_a_run[2]
    assert left["collects"] is True
    assert left["switch"] is None
    assert left["compiles"] is True
    assert left["frozen"] > 100_000  # objects of 3,000 modules, which no later collection looks through


@pytest.mark.parametrize(("compiles", "own", "inside"), [(False, None, "1"), (True, None, None), (False, "0", "0")])
def test_the_compilers_switch_is_set_only_inside(
    monkeypatch: pytest.MonkeyPatch, compiles: bool, own: str | None, inside: str | None
) -> None:
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)  # as in a fresh process
    monkeypatch.setattr(gc, "freeze", lambda: None)  # this process goes on, with other tests' garbage
    if own is None:
        monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    else:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", own)
    with pytest.raises(KeyError), quick_imports(compiles=compiles):
        assert os.environ.get("TORCHDYNAMO_DISABLE") == inside
        assert not gc.isenabled()
        raise KeyError
    assert os.environ.get("TORCHDYNAMO_DISABLE") == own
    assert gc.isenabled()


def test_nothing_is_done_where_the_libraries_are_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", sys)  # any module
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    before = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
        assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert gc.get_freeze_count() == before


@pytest.mark.parametrize(
    ("sections", "asked"),
    [
        ({}, False),
        ({"optimizer": {"name": "prodigy", "lr": 1.0}}, False),
        ({"optimizer": {"name": "adamw8bit"}}, True),
        ({"optimizer": {"name": "paged_adamw"}}, True),
        ({"optimizer": {"name": "bitsandbytes.optim.AdEMAMix8bit", "lr": 1e-4}}, True),
        ({"optimizer": {"name": "torch.optim.RAdam", "lr": 1e-4}}, False),
        ({"model": {"base": "tiny", "quantize": "nf4"}}, True),
        ({"model": {"base": "tiny", "quantize": "int8"}}, True),
    ],
)
def test_whether_a_recipe_calls_bitsandbytes(sections: dict[str, object], asked: bool) -> None:
    assert uses_bitsandbytes(recipe(**sections)) is asked
