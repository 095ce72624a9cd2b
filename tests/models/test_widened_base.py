"""scripts/tiny_base/inpainting.py: a base with five more input channels draws what it drew."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from adapter_samples import bundle_of

from lora_kit.errors import ModelError

SCRIPT = Path(__file__).parents[2] / "scripts" / "tiny_base" / "inpainting.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("widen", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_predicts_as_its_base_whatever_goes_beside(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    script.inpainting_variant(str(folder)).save_pretrained(tmp_path / "wide")
    plain, wide = bundle_of(folder), bundle_of(tmp_path / "wide")
    assert wide.family.name == f"{plain.family.name}-inpainting"
    generator = torch.Generator().manual_seed(0)
    noisy, beside = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, 8, generator=generator)
    times = torch.tensor([1, 900])
    with torch.no_grad():
        condition = plain.family.condition(plain, ["red apple", ""])
        got = wide.family.predict(wide, noisy, times, condition, beside)
        wanted = plain.family.predict(plain, noisy, times, condition)
    # The first convolution may add its products in another order.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_an_inpainting_base_is_not_widened_again(script: ModuleType, tiny_inpainting_folder: Path) -> None:
    with pytest.raises(ModelError, match="is an inpainting base already"):
        script.inpainting_variant(str(tiny_inpainting_folder))
