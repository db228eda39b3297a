"""The laws run anywhere: in an empty folder, the same examples each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fedprune", deadline=None, derandomize=True, database=None)
settings.load_profile("fedprune")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a law writes by a relative path lands in its own folder."""
    monkeypatch.chdir(tmp_path)
