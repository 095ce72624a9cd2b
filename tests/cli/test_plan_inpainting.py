"""`lora-kit plan` refuses what the run would: a section that does nothing, and masks whose meaning is not said."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lora_kit.cli.main import main


def plan(folder: Path, base: Path, source: str, *overrides: str) -> int:
    (folder / "r.yaml").write_text(
        f"model: {{base: {base}}}\ndata: {{sources: [{source}], resolution: 16}}\noutput_dir: {folder / 'run'}\n"
    )
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(folder / "r.yaml"), *overrides])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    Image.new("L", (16, 16), 255).save(folder / "a-mask.png")
    (folder / "a.txt").write_text("a picture")
    return folder


def test_an_inpainting_base_is_planned(
    tmp_path: Path, tiny_inpainting_folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{{path: {pictures}, mask_suffix: -mask}}"
    assert plan(tmp_path, tiny_inpainting_folder, source, "inpainting.masks=data") == 0
    assert plan(tmp_path, tiny_inpainting_folder, source) == 2
    assert "fills masks, and the data has masks" in capsys.readouterr().err


def test_the_section_is_refused_for_another_base(
    tmp_path: Path, tiny_sd1_folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path, tiny_sd1_folder, f"{{path: {pictures}, mask_suffix: -mask}}", "inpainting={}") == 2
    assert "whose UNet sees no mask" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
