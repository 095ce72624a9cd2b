"""`lora-kit cache`: fill, verify, prune."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_kit.cli.main import main

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, tiny_sd1_folder: Path, make_picture_folder: Callable[..., Path]) -> Run:
    """A function (arguments, …) → exit status of `lora-kit cache` in a folder with recipe.yaml and other.yaml."""
    make_picture_folder(tmp_path / "pictures", count=3)
    for name, side in (("recipe", 16), ("other", 24)):
        (tmp_path / f"{name}.yaml").write_text(
            f"model: {{base: {tiny_sd1_folder}}}\n"
            f"data: {{sources: [{{path: pictures}}], resolution: {side}, cache: disk, cache_dir: cache}}\n"
        )

    def call(*arguments: str) -> int:
        paths = [str(tmp_path / word) if word.endswith(".yaml") else word for word in arguments]
        with pytest.raises(SystemExit) as caught:
            main(["cache", *paths])
        assert isinstance(caught.value.code, int)
        return caught.value.code

    return call


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, "error"))


def shards(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "shards").glob("*.safetensors"))


def test_filling_twice_encodes_once(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("recipe.yaml") == 0
    assert "pictures: 3 of 3 encoded; captions: 3 of 3 encoded" in capsys.readouterr().out
    assert run("recipe.yaml") == 0
    assert "pictures: 0 of 3 encoded; captions: 0 of 3 encoded" in capsys.readouterr().out
    assert run("recipe.yaml", "data.flip=true") == 0
    assert "pictures: 3 of 6 encoded; captions: 0 of 3 encoded" in capsys.readouterr().out


def test_verifying_tells_by_its_exit_status(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("recipe.yaml") == 0
    capsys.readouterr()
    assert run("recipe.yaml", "--verify") == 0
    assert "6 entries in 2 shards are whole (0.0 MiB); 0 damaged" in capsys.readouterr().out
    path = shards(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run("recipe.yaml", "--verify") == 1
    out, err = capsys.readouterr()
    assert "5 entries in 2 shards are whole (0.0 MiB); 1 damaged" in out
    assert "is not what was written; noted in" in err
    assert run("recipe.yaml") == 0
    assert "1 of 3 encoded" in capsys.readouterr().out
    assert run("recipe.yaml", "--verify") == 0


def test_pruning_deletes_only_when_told_to(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("recipe.yaml", "other.yaml") == 0
    before = shards(tmp_path)
    capsys.readouterr()
    assert run("recipe.yaml", "other.yaml", "--prune") == 0
    assert "0 entries would go" in capsys.readouterr().out
    assert run("recipe.yaml", "--prune") == 0
    out = capsys.readouterr().out
    assert "9 entries, of which this recipe needs 6" in out
    assert "3 entries would go" in out
    assert "Nothing was deleted. Add --yes" in out
    assert shards(tmp_path) == before
    assert run("recipe.yaml", "--prune", "--yes") == 0
    assert "3 entries removed" in capsys.readouterr().out
    assert run("recipe.yaml") == 0
    assert "pictures: 0 of 3 encoded; captions: 0 of 3 encoded" in capsys.readouterr().out
    assert run("other.yaml") == 0
    assert "pictures: 3 of 3 encoded; captions: 0 of 3 encoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe.yaml", "data.cache=memory"], "data.cache: got memory"),
        (["recipe.yaml", "--yes"], "--yes: allowed only with --prune"),
        (["recipe.yaml", "--verify", "--prune"], "--verify and --prune: got both"),
        (["data.flip=true"], "got only overrides (data.flip=true); name a recipe"),
        (["missing.yaml"], "no such recipe"),
    ],
)
def test_a_users_mistake_is_one_message(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and said in err


def test_recipes_with_other_folders_are_not_pruned_together(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(other.read_text().replace("cache_dir: cache", "cache_dir: elsewhere"))
    assert run("recipe.yaml", "other.yaml", "--prune") == 2
    assert "prune one folder at a time" in capsys.readouterr().err
