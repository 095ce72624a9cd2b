"""`lora-kit plan` on a mixed data set: what each source holds, and what an epoch of all of them is."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_kit.cli.main import main
from lora_kit.data import open_training_set
from lora_kit.recipe import load_recipe


def draw(path: Path, size: tuple[int, int], caption: str | None = "a cat") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 80, 40)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def recipe(tiny_sd1_folder: Path, tmp_path: Path) -> Path:
    """Nested folders with sidecars, odd sizes and a broken picture; kohya's folders; two tar shards; a TOML."""
    mixed = tmp_path / "mixed"
    for index, size in enumerate([(40, 24), (25, 41), (33, 33), (17, 19)]):
        draw(mixed / ("deep" if index % 2 else "") / f"{index}.png", size)
    draw(mixed / "uncaptioned.png", (32, 32), None)
    (mixed / "broken.png").write_bytes(b"no picture at all")
    (mixed / "broken.txt").write_text("a cat")
    (mixed / "stray.heic").write_bytes(b"")
    draw(tmp_path / "kohya" / "img" / "3_cat" / "a.png", (32, 32))
    draw(tmp_path / "kohya" / "img" / "1_dog" / "b.png", (64, 32), None)
    draw(tmp_path / "kohya" / "reg" / "1_animal" / "c.png", (32, 64), None)
    for shard in range(2):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as archive:
            draw(tmp_path / "tarred" / f"{shard}.png", (48, 48))
            archive.add(tmp_path / "tarred" / f"{shard}.png", f"{shard}.png")
            archive.add(tmp_path / "tarred" / f"{shard}.txt", f"{shard}.txt")
    draw(tmp_path / "fine" / "d.png", (80, 80))
    (tmp_path / "set.toml").write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'fine'\n")
    data: dict[str, Any] = {
        "sources": [
            {"path": "mixed", "loss_weight": 0.5},
            {"path": "kohya"},
            {"path": "part-{0..1}.tar", "repeats": 2, "alpha": "mask", "target": "base"},
            {"path": "set.toml"},
        ],
        "resolution": 32,
        "batch_size": 2,
        "buckets": {"step": 8},
        "on_error": "skip",
    }
    path = tmp_path / "recipe.yaml"
    sections = {"model": {"base": str(tiny_sd1_folder)}, "targets": {"preset": "attention", "rank": 2}, "data": data}
    path.write_text(json.dumps(sections | {"train": {"max_steps": 12}}))  # JSON is YAML
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_row_for_each_source(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed, kohya, shards, fine = document(capsys, str(recipe))["data"]["sources"]
    assert (mixed["kind"], mixed["pictures"], mixed["unusable"], mixed["loss_weight"]) == ("caption files", 5, 1, 0.5)
    assert (kohya["kind"], kohya["pictures"], kohya["repeats"]) == ("N_name folders", 3, [1, 5 + 4 + 4 + 1])
    assert (kohya["regularisation"], mixed["regularisation"]) == (1, 0)
    assert (shards["kind"], shards["pictures"], shards["samples"]) == ("2 tar shards", 2, 4)
    assert (shards["alpha"], shards["from_base"]) == ("mask", True)
    assert (fine["resolutions"], mixed["resolutions"], fine["pictures"]) == ([64], [32], 1)


def test_regularisation_is_repeated_to_the_other_samples(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = document(capsys, str(recipe))["data"]["sources"]
    others = sum(source["samples"] for source in sources) - sources[1]["repeats"][1]
    assert sources[1]["repeats"][1] == others
    assert sum(source["share"] for source in sources) == pytest.approx(1)


def test_the_plan_is_what_training_makes_of_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(recipe))
    section = load_recipe(recipe).data
    data = open_training_set(section, 0)
    assert found["steps"]["samples_per_epoch"] == len(data)
    assert found["buckets"]["steps"] == data.order.steps_per_epoch
    sizes = {(bucket["width"], bucket["height"]): bucket["pictures"] for bucket in found["buckets"]["buckets"]}
    assert sizes == {size: int((data.places.bucket == index).sum()) for index, size in enumerate(data.places.sizes)}
    assert (64, 64) in sizes
    drawn = [data.records[record].source for record in data.places.record[data._samples]]
    assert [source["samples"] for source in found["data"]["sources"]] == [drawn.count(index) for index in range(4)]


def test_what_cannot_be_used_is_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(recipe))
    assert [flaw["id"] for flaw in found["data"]["unusable"]] == ["mixed/uncaptioned.png"]
    assert (found["buckets"]["unreadable"], found["buckets"]["unreadable_ids"]) == (1, ["mixed/broken.png"])
    assert run(str(recipe)) == 0
    shown = capsys.readouterr().out
    assert "cannot be used and will be left out: 1" in shown
    assert "mixed/uncaptioned.png: no caption" in shown
    assert "pictures that cannot be read, counted as squares: 1 (mixed/broken.png)" in shown
    assert "files that Pillow does not read are left out: 1 .heic" in shown
    assert "read as N_name folders" in shown


def test_the_table(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run(str(recipe)) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert "loss × 0.5, 1 unusable" in rows["mixed"]
    assert "1-14" in rows["kohya"]
    assert "target: the base's prediction, alpha as mask" in rows["part-{0..1}.tar"]
    assert rows["fine"].split()[-1] == "64"


def test_weights_are_shown_as_what_they_come_to(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = '[{path: mixed, weight: 1}, {path: "part-*.tar", weight: 3}]'
    sources = document(
        capsys,
        str(recipe),
        f"data.sources={two.replace('mixed', str(recipe.parent / 'mixed'))}".replace("part-", f"{recipe.parent}/part-"),
    )["data"]["sources"]
    assert [source["share"] for source in sources] == pytest.approx([0.25, 0.75], rel=0.01)
    assert [source["weight"] for source in sources] == [1, 3]


def test_a_source_on_the_hub_is_said_not_counted(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = f"data.sources=[{{path: owner/set}}, {{path: {recipe.parent / 'mixed'}}}]"
    found = document(capsys, str(recipe), sources)
    hub, mixed = found["data"]["sources"]
    assert (hub["kind"], hub["pictures"], hub["share"]) == ("hub data set", None, None)
    assert mixed["pictures"] == 5
    assert (found["steps"]["samples_per_epoch"], found["steps"]["epochs"], found["buckets"]) == (None, None, None)
    assert run(str(recipe), sources) == 0
    assert "not counted" in capsys.readouterr().out


def test_a_local_data_set_of_rows_is_counted(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (32, 32))] * 3
    table = datasets.Dataset.from_dict({"image": pictures, "text": ["a", "b", "c"]})
    table.save_to_disk(str(recipe.parent / "saved"))
    table.to_parquet(str(recipe.parent / "rows.parquet"))
    named = ", ".join(f"{{path: {recipe.parent / name}}}" for name in ("saved", "rows.parquet"))
    sources = document(capsys, str(recipe), f"data.sources=[{named}]")["data"]["sources"]
    assert [(source["kind"], source["pictures"]) for source in sources] == [("saved data set", 3), ("parquet file", 3)]
