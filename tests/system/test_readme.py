"""The documentation's figures are those of stored results."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprune_cli import CONF
from fedprune_cli.report.comparison_page import markdown, read_table

ROOT = Path(__file__).parent.parent.parent
RESULTS = sorted((ROOT / "docs" / "results").glob("*.csv"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_each_stored_result_stands_in_the_documentation_as_it_is(path: Path) -> None:
    table = markdown(read_table(path))
    assert table in (ROOT / "docs" / "results.md").read_text()
    assert (CONF / "experiment" / f"{path.stem}.yaml").exists()


def test_the_readme_shows_the_headline() -> None:
    (headline,) = [path for path in RESULTS if path.stem == "headline_fmnist"]
    assert markdown(read_table(headline)) in (ROOT / "README.md").read_text()
