"""Where masks come from, and what becomes of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lora_kit.data import Records, open_records, open_training_set
from lora_kit.data.crops import covering_box
from lora_kit.data.masks import mask_cells
from lora_kit.data.pictures import read_picture
from lora_kit.diffusion import masked_mean
from lora_kit.errors import DataError
from lora_kit.progress import no_progress
from lora_kit.recipe import DataSection


def section(path: Path, **source: Any) -> DataSection:
    whole = {"sources": [{"path": str(path), **source}], "resolution": 16, "on_error": "raise"}
    return DataSection.model_validate(whole)


def save(path: Path, grey: int | tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(grey, int) else "RGB", size, grey).save(path)
    return path


def picture(path: Path) -> None:
    save(path, (200, 100, 50))
    path.with_suffix(".txt").write_text(path.stem)


def greys(records: Records) -> dict[str, int | None]:
    """Each record's mask, by the one level that it has."""
    masks = {record.id: read_picture(record).mask for record in records}
    return {name: None if mask is None else int(np.asarray(mask)[0, 0]) for name, mask in masks.items()}


def test_a_mask_beside_the_picture_is_its_mask_and_no_picture(tmp_path: Path) -> None:
    for name in ("a", "in/b", "c"):
        picture(tmp_path / "set" / f"{name}.png")
    save(tmp_path / "set" / "a-mask.png", 10)
    save(tmp_path / "set" / "in" / "b-mask.webp", 255)
    save(tmp_path / "set" / "d-mask.png", 30)
    records = open_records(section(tmp_path / "set", mask_suffix="-mask"))
    assert greys(records) == {"set/a.png": 10, "set/c.png": None, "set/in/b.png": 255}
    assert any("without a mask, which count everywhere: 1 of 3 (set/c.png)" in notice for notice in records.notices)
    assert any("masks of no picture are left out: 1 (d-mask.png)" in notice for notice in records.notices)


def test_a_folder_of_masks(tmp_path: Path) -> None:
    for name in ("a", "in/b"):
        picture(tmp_path / "set" / f"{name}.png")
    save(tmp_path / "masks" / "a.jpg", 255)
    save(tmp_path / "masks" / "in" / "b.png", 20)
    records = open_records(section(tmp_path / "set", mask_folder=str(tmp_path / "masks")))
    assert greys(records) == {"set/a.png": 255, "set/in/b.png": 20}


def test_masks_that_are_nowhere_are_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png")
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match=r"no picture has a mask, looked for by mask_folder"):
        open_records(section(tmp_path / "set", mask_folder=str(tmp_path / "masks")))
    with pytest.raises(DataError, match=r"mask_folder: there is no folder .*gone"):
        open_records(section(tmp_path / "set", mask_folder=str(tmp_path / "gone")))
    with pytest.raises(DataError, match=r"no picture has a mask, looked for by mask_suffix '-m'"):
        open_records(section(tmp_path / "set", mask_suffix="-m"))
    with pytest.raises(DataError, match=r"mask_column needs columns"):
        open_records(section(tmp_path / "set", mask_column="mask"))


def test_a_column_of_metadata_names_masks(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("a.png", "b.png", "m/a.png"):
        save(folder / name, 77)
    rows = [{"file_name": "a.png", "text": "a", "mask": "m/a.png"}, {"file_name": "b.png", "text": "b", "mask": None}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = open_records(section(folder, mask_column="mask"))
    assert greys(records) == {"set/a.png": 77, "set/b.png": None}
    assert not any("does not name" in notice for notice in records.notices)


def test_a_mask_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "set" / "a.png", 77)
    save(tmp_path / "secret.png", 77)
    row = {"file_name": "a.png", "text": "a", "mask": "../secret.png"}
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"its mask '\.\./secret\.png' leaves the data folder"):
        open_records(section(tmp_path / "set", mask_column="mask"))


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (16, 16), grey).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_column_of_a_data_set_holds_masks(tmp_path: Path) -> None:
    cells = [{"bytes": png(grey), "path": None} for grey in (1, 2)]
    masks = [{"bytes": png(200), "path": None}, None]
    table = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b"], "where": masks})
    table = table.cast_column("image", datasets.Image()).cast_column("where", datasets.Image())
    table.save_to_disk(tmp_path / "set")
    records = open_records(section(tmp_path / "set", mask_column="where"))
    assert greys(records) == {"set/row-0": 200, "set/row-1": None}


@pytest.mark.parametrize(("suffix", "name"), [(".mask", "0.mask.png"), ("-mask", "0-mask.png")])
def test_masks_in_tar_shards(tmp_path: Path, suffix: str, name: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for member, content in {"0.png": png(9), "0.txt": b"a", name: png(90), "1.png": png(9), "1.txt": b"b"}.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    records = open_records(section(tmp_path / "s.tar", mask_suffix=suffix))
    assert greys(records) == {"s.tar/0.png": 90, "s.tar/1.png": None}


def test_a_larger_mask_of_the_same_shape_is_scaled(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png")
    half = np.zeros((64, 64), np.uint8)
    half[:, :32] = 255
    Image.fromarray(half).save(tmp_path / "set" / "a-mask.png")
    (record,) = open_records(section(tmp_path / "set", mask_suffix="-mask"))
    mask = np.asarray(read_picture(record).mask)
    assert mask.shape == (16, 16)
    assert mask[:, :8].min() == 255 and mask[:, 8:].max() == 0


@pytest.mark.parametrize("picture", [(64, 64), (97, 61), (50, 120)])
def test_cells_are_averages_over_their_area(picture: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (picture[1], picture[0])).astype(np.uint8)
    size, factor = (64, 48), 8
    box = covering_box(picture, size)
    mine = mask_cells(Image.fromarray(values), box, size, factor)
    # By the integral over every cell, in float64: pixels are squares of one level.
    edges_x, edges_y = np.linspace(box[0], box[2], 9), np.linspace(box[1], box[3], 7)

    def covered(low: float, high: float, count: int) -> np.ndarray:
        pixels = np.arange(count)
        return np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)

    wanted = np.zeros((6, 8))
    for row in range(6):
        for column in range(8):
            across = covered(edges_x[column], edges_x[column + 1], picture[0])
            down = covered(edges_y[row], edges_y[row + 1], picture[1])
            wanted[row, column] = down @ values.astype(np.float64) @ across / (down.sum() * across.sum()) / 255
    # Two sums of at most 120 fp32 terms in 0..1 whose weights sum to 1.
    assert np.abs(mine.numpy() - wanted).max() <= 2 * 120 * 2**-24


def test_masked_mean_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, masks = torch.rand(3, 4, 5, 6, generator=generator), torch.rand(3, 5, 6, generator=generator)
    masks[1] = 0
    for outside in (0.0, 0.3):
        weights = masks.double() + (1 - masks.double()) * outside
        wanted = [
            float((errors[i].double() * weights[i]).sum() / (4 * weights[i].sum())) if weights[i].sum() else 0.0
            for i in range(3)
        ]
        # 120 terms and 30: two sums and a quotient.
        torch.testing.assert_close(
            masked_mean(errors, masks, outside), torch.tensor(wanted), rtol=(120 + 30 + 2) * 2**-24, atol=0
        )
    assert torch.equal(masked_mean(errors, None), errors.mean(dim=(1, 2, 3)))


def test_masks_are_cut_and_mirrored_with_their_pictures(tmp_path: Path) -> None:
    """A picture that is white where its mask is: after any crop and flip, cells follow the pixels."""
    values = np.zeros((24, 40), np.uint8)
    values[8:16, 16:40] = 255
    (tmp_path / "set").mkdir()
    Image.fromarray(values).convert("RGB").save(tmp_path / "set" / "a.png")
    Image.fromarray(values).save(tmp_path / "set" / "a-mask.png")
    (tmp_path / "set" / "a.txt").write_text("a")
    whole = section(tmp_path / "set", mask_suffix="-mask")
    fields = {"resolution": 24, "flip": True, "crop": "random", "cache": "none", "batch_size": 1}
    data = open_training_set(whole.model_copy(update=fields), 0, bar=no_progress)
    seen = set[bytes]()
    for position in range(12):
        sample = data[position]
        assert sample.pixels is not None and sample.mask is not None
        cells = torch.nn.functional.avg_pool2d((sample.pixels[:1] + 1) / 2, 8)[0]
        # Random crops begin at whole pixels here, as the picture already has the height.
        torch.testing.assert_close(sample.mask, cells, rtol=0, atol=1e-6)
        seen.add(sample.mask.numpy().tobytes())
    assert len(seen) > 3
