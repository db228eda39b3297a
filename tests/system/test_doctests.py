"""Examples in docstrings are what the code gives."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import fedprune_cli

ROOT = Path(fedprune_cli.__file__).parent
SHOWN = sorted(
    ".".join(("fedprune_cli", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", SHOWN)
def test_the_examples_of_a_module_are_right(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert result.failed == 0


def test_the_rules_that_are_easiest_to_show_have_an_example() -> None:
    rooms = (
        "rng",
        "sections",
        "store.state",
        "wire.masks",
        "wire.quantize",
        "learn.parts",
        "learn.prune",
        "serve.aggregate",
    )
    assert {f"fedprune_cli.{room}" for room in rooms} <= {*SHOWN}
