"""The benchmark of families builds what was published, and runs; its figures are not looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from real_configs import PUBLISHED
from small_super_resolution import REAL_UNET

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def families(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("families", "merge", "plan"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import families

    yield families
    for name in ("families", "merge", "plan"):
        sys.modules.pop(name, None)


def unet_of(families, monkeypatch, name: str) -> dict:
    """The config that the family's UNet is built from."""
    seen: dict[str, dict] = {}

    def note(network_class, config):
        seen[network_class.__name__] = dict(config) if isinstance(config, dict) else config.to_dict()

    import diffusers

    monkeypatch.setattr(families, "filled", note)
    for kind in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LDMSuperResolutionPipeline"):
        monkeypatch.setattr(diffusers, kind, lambda **parts: None)
    families.FAMILIES[name].build(False)
    return next(config for kind, config in seen.items() if kind.startswith("UNet"))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("SD 1.5", PUBLISHED["sd1"].unet),
        ("SD 1.5 inpainting", PUBLISHED["sd1-inpainting"].unet),
        ("SD 2.1 base", PUBLISHED["sd2-base"].unet),
        ("SD 2 inpainting", PUBLISHED["sd2-inpainting"].unet),
        ("SD 2.1 (v)", PUBLISHED["sd2-v"].unet),
        ("LDM super-resolution", REAL_UNET),
    ],
)
def test_a_family_is_built_from_its_published_config(families, monkeypatch, name, published):
    built = unet_of(families, monkeypatch, name)
    shared = built.keys() & published.keys()
    assert {key: built[key] for key in shared} == {key: published[key] for key in shared}
    assert {"in_channels", "block_out_channels", "attention_head_dim", "sample_size"} <= shared


@pytest.mark.slow
def test_every_family_trains_and_merges(tmp_path):
    command = [sys.executable, str(BENCH / "families.py"), "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert [row[1].strip() for row in rows[2:]][:2] == ["SD 1.5", "SD 1.5 inpainting"]
    assert list(tmp_path.iterdir()) == []
