"""Small experiments on real digits, built the way the command line builds them."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

from fedprune_cli import folder, run
from fedprune_cli.config import Experiment, build_experiment, compose_config
from fedprune_cli.state import State, encode

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

TINY = (
    "rounds=3", "devices.count=4", "devices.fresh=1", "model.hidden=[16]", "training.batch_size=8",
    "training.shared_steps=3", "training.personal_steps=2", "evaluation.fresh_steps=2", "execution.kind=serial",
)  # fmt: skip


def make_experiment(*overrides: str) -> Experiment:
    """Returns a tiny experiment with some values changed."""
    return build_experiment(compose_config([*TINY, *overrides]))


@functools.cache
def make_setup(*overrides: str) -> run.Setup:
    """Returns the setup of a tiny experiment, built once."""
    return run.prepare(make_experiment(*overrides))


def run_to_end(run_dir: Path, *overrides: str) -> list[run.Record]:
    """Returns the records of a tiny run in its own folder."""
    setup = make_setup(*overrides)
    run.create(setup, compose_config([*TINY, *overrides]), run_dir)
    return list(run.run(setup, run_dir))


def resign(run_dir: Path) -> None:
    """Writes the checksums anew, as somebody would who wants a changed folder to be taken for sound."""
    names = [line.split()[1] for line in (run_dir / folder.SUMS).read_text().splitlines()]
    sums = [f"{hashlib.sha256((run_dir / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (run_dir / folder.SUMS).write_text("".join(sums))


def forge(
    run_dir: Path,
    records: list[run.Record] | None = None,
    state: State | None = None,
    summary: run.Record | None = None,
) -> None:
    """Replaces a finished run's records, state or summary, with every checksum as it would be."""
    records = folder.read_records(run_dir) if records is None else records
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    saved = folder.read_state(run_dir)
    saved = replace(saved, state=state or saved.state, records=functools.reduce(folder.link, lines, ""))
    (run_dir / folder.RECORDS).write_bytes(b"".join(lines))
    (run_dir / folder.STATE).write_bytes(encode(saved))
    sha256 = hashlib.sha256((run_dir / folder.STATE).read_bytes()).hexdigest()
    summary = json.loads((run_dir / folder.SUMMARY).read_text()) | {"state_sha256": sha256} | (summary or {})
    (run_dir / folder.SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    resign(run_dir)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test writes by a relative path lands in its own folder."""
    monkeypatch.chdir(tmp_path)
