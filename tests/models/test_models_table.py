"""docs/models.md names a test in each cell of its table: they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_table_names_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "models.md").read_text())
    assert len(named) > 20
    for file, test in named:
        (path,) = ROOT.glob(f"tests/**/{file}")
        assert f"\ndef {test}(" in path.read_text(), f"{file} has no {test}"


def test_every_family_has_its_page_and_recipes_of_the_readme() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    pages = set(re.findall(r"\(models/(\w+\.md)\)", text))
    assert pages == {path.name for path in (ROOT / "docs" / "models").glob("*.md")}
