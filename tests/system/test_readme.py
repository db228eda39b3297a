"""The documentation's figures are those of stored results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedprune_cli import CONF
from fedprune_cli.report.comparison_page import markdown, read_table
from fedprune_cli.report.estimate import BY_KEY

ROOT = Path(__file__).parent.parent.parent
RESULTS = sorted((ROOT / "docs" / "results").glob("*.csv"))
SHOWN = ("latency_s", "time_to_target_s", "time_reduction", "accuracy")  # the README's columns


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_each_stored_result_stands_in_the_documentation_as_it_is(path: Path) -> None:
    table = markdown(read_table(path))
    assert any(table in page.read_text() for page in (ROOT / "docs" / "results").glob("*.md"))
    assert (CONF / "experiment" / f"{path.stem}.yaml").exists()


def test_the_readme_shows_the_headline() -> None:
    (headline,) = [path for path in RESULTS if path.stem == "headline_fmnist"]
    rows = [
        [method, *(BY_KEY[key].cell(cells.get(key)) for key in SHOWN)] for method, cells in read_table(headline).items()
    ]
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"^\| \w.*\|$", readme, re.MULTILINE) == [f"| {' | '.join(row)} |" for row in rows]
