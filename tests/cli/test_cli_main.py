from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer

from lora_kit.cli.main import COMMANDS, main, silence_libraries
from lora_kit.errors import RecipeError, TrainingError
from lora_kit.recipe import recipe_schema

Install = Callable[[Callable[..., None]], None]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    before = os.environ.copy()
    yield
    os.environ.clear()
    os.environ.update(before)


def exit_status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a function in the place of `lora-kit inspect`."""

    def install(function: Callable[..., None]) -> None:
        module = ModuleType("lora_kit.cli.inspect")
        module.command = function  # type: ignore[attr-defined]  # what a command's module is
        monkeypatch.setitem(sys.modules, "lora_kit.cli.inspect", module)

    return install


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("--help") == 0
    out = capsys.readouterr().out
    for name, line in COMMANDS.items():
        assert f"  {name} " in out
        assert line in out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lora_kit.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'yaml', 'rich', 'PIL') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("arguments", [["schema"], ["plan", "recipes/quickstart.yaml"]], ids=lambda words: words[0])
def test_what_needs_no_torch_does_not_import_it(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom lora_kit.cli.main import main\n"
        f"try: main({arguments})\nexcept SystemExit as done: print(done.code, file=sys.stderr)\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["0", "False"]


def test_python_m_prints_the_schema_alone_on_stdout() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_kit", "schema"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    assert json.loads(done.stdout) == recipe_schema()
    assert done.stderr == ""


def test_what_is_imported_is_out_of_the_collectors_way_at_exit() -> None:
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(len(gc.get_objects())))\n"  # the first one runs last
        "from lora_kit.cli.main import main\n"
        "main(['--version'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 100  # thousands without it


def test_a_commands_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("schema", "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: lora-kit schema")
    assert "Print the recipe's JSON schema" in out


def test_arguments_reach_the_command(command: Install, capsys: pytest.CaptureFixture[str]) -> None:
    def run(file: Path, deep: Annotated[bool, typer.Option("--deep")] = False) -> None:
        typer.echo(f"{file} {deep}")

    command(run)
    assert exit_status("inspect", "a.safetensors", "--deep") == 0
    assert capsys.readouterr().out == "a.safetensors True\n"


@pytest.mark.parametrize(("error", "status"), [(RecipeError("no"), 2), (TrainingError("no"), 1)])
def test_a_users_mistake_is_one_message(
    command: Install,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
) -> None:
    def fail() -> None:
        raise error

    command(fail)
    assert exit_status("inspect") == status
    assert capsys.readouterr() == ("", "error: no\n")


def test_ctrl_c_exits_130(command: Install) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    command(interrupt)
    assert exit_status("inspect") == 130


def test_a_command_may_exit_with_a_status_of_its_own(command: Install) -> None:
    def stop() -> None:
        raise typer.Exit(143)

    command(stop)
    assert exit_status("inspect") == 143


def test_anything_else_keeps_its_traceback(command: Install) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    command(fail)
    with pytest.raises(ZeroDivisionError):
        main(["inspect"])


def test_an_unexpected_error_exits_1_with_a_traceback() -> None:
    code = (
        "import sys, types\nfrom lora_kit.cli.main import main\n"
        "module = types.ModuleType('lora_kit.cli.inspect')\n"
        "def command() -> None: raise ZeroDivisionError\n"
        "module.command = command\nsys.modules['lora_kit.cli.inspect'] = module\nmain(['inspect'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shema"], "No such command 'shema'. Did you mean 'schema'?"),
        (["schema", "--deep"], "No such option: --deep"),
        (["schema", "extra"], "unexpected extra argument"),
        (["--deep"], "No such option: --deep"),
    ],
)
def test_a_wrong_usage_exits_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(*arguments) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("--version") == 0
    assert capsys.readouterr().out.startswith("lora-kit ")


def test_a_users_own_verbosity_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    monkeypatch.setattr(logging.getLogger("bitsandbytes.backends.cpu.ops"), "level", logging.NOTSET)

    silence_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["DIFFUSERS_VERBOSITY"] == "error"
