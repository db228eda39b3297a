"""Small experiments on real digits, built the way the command line builds them."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import multiprocessing
import multiprocessing.forkserver
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import warm  # noqa: F401  # makes this process quicker as well
from forked import PRELOADED, fedprune
from hypothesis import settings

from fedprune_cli.contracts.inputs import MODEL_CASES, model_inputs
from fedprune_cli.contracts.parts import (
    TINY,
    Step,
    composed,
    configured,
    make_experiment,
    make_setup,
    outcome,
    sent_by,
    steps_of,
)
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.store.state import State, encode, encode_masks

__all__ = [  # what tests share with contracts
    "MODEL_CASES", "TINY", "Step", "composed", "configured", "fedprune", "make_experiment", "make_setup", "model_inputs",
    "outcome", "sent_by", "steps_of",
]  # fmt: skip

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

Line = dict[str, Any]  # of rounds.jsonl, as JSON has it


RESULTS = ("state.safetensors", "rounds.jsonl", "summary.json", "manifest.json")


def results(run_dir: Path) -> dict[str, bytes]:
    """Returns the files of a run that must be the same wherever and however it ran."""
    beside = sorted(path.name for kind in ("personal-*.f32", "masks-*.safetensors") for path in run_dir.glob(kind))
    return {name: (run_dir / name).read_bytes() for name in (*RESULTS, *beside)}


def run_to_end(run_dir: Path, *overrides: str) -> list[Line]:
    """Returns the lines of rounds.jsonl of a tiny run in its own folder."""
    setup = make_setup(*overrides)
    life.create(setup, composed(*overrides), run_dir)
    return [record.as_json() for record in life.run(setup, run_dir)]


def run_in_parts(run_dir: Path, *overrides: str, stops: int) -> None:
    """Runs a tiny run in its own folder, which is left after each of its first rounds and gone on with."""
    setup = make_setup(*overrides)
    life.create(setup, composed(*overrides), run_dir)
    for _ in range(stops):
        rounds = life.run(setup, run_dir)
        next(rounds)
        rounds.close()  # type: ignore[attr-defined]
    list(life.run(setup, run_dir))


def read_lines(run_dir: Path) -> list[Line]:
    """Returns the lines of a run's rounds.jsonl, checked."""
    return [record.as_json() for record in folder.read_records(run_dir)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives slow proofs two hours in place of ten minutes: a machine that does other work too is no failure."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(7200))


def pytest_collection_finish() -> None:
    """Takes what collecting the tests has left out of every later search for garbage."""
    gc.collect()
    gc.freeze()


def extra(name: str) -> list[str]:
    """Returns the requirements of one of the package's extras."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"][name])


@pytest.fixture(scope="session")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes environments: what this one has, with further `packages` on top of it; returns the Python of one."""

    @functools.cache
    def make(*packages: str) -> Path:
        home = tmp_path_factory.mktemp("overlay")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
        own = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
        source = Path(life.__file__).parent.parent.parent  # an editable installation is not seen through a .pth file
        (Path(own) / "base.pth").write_text(f"{sysconfig.get_path('purelib')}\n{source}\n")
        python = home / "bin" / "python"
        install = [str(python), "-m", "pip", "install", "--quiet", *packages]
        installed = subprocess.run(install, capture_output=True, text=True, timeout=500)
        assert installed.returncode == 0, installed.stderr
        return python

    return make


def resign(run_dir: Path) -> None:
    """Writes the checksums anew, as somebody would who wants a changed folder to be taken for sound."""
    names = [line.split()[1] for line in (run_dir / folder.SUMS).read_text().splitlines()]
    sums = [f"{hashlib.sha256((run_dir / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (run_dir / folder.SUMS).write_text("".join(sums))


def forge(
    run_dir: Path,
    records: list[Line] | None = None,
    state: State | None = None,
    summary: Line | None = None,
) -> None:
    """Replaces a finished run's records, state or summary, with every checksum as it would be."""
    records = read_lines(run_dir) if records is None else records
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    saved = folder.read_state(run_dir)
    saved = replace(saved, state=state or saved.state, records=functools.reduce(folder.chained_record, lines, ""))
    (run_dir / folder.RECORDS).write_bytes(b"".join(lines))
    (run_dir / folder.STATE).write_bytes(encode(saved))
    for path in run_dir.glob("masks-*.safetensors"):
        masks = safetensors.numpy.load_file(path)
        path.write_bytes(encode_masks(replace(saved, state=replace(saved.state, masks=masks))))
    sha256 = hashlib.sha256((run_dir / folder.STATE).read_bytes()).hexdigest()
    summary = json.loads((run_dir / folder.SUMMARY).read_text()) | {"state_sha256": sha256} | (summary or {})
    (run_dir / folder.SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    resign(run_dir)


@pytest.fixture(scope="session", autouse=True)
def _everything_imported_once() -> None:
    """Starts the server that commands, workers and members are forked from before the program itself would, with other things in it."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, "forked", "warm"])
    with contextlib.chdir(Path(__file__).parent):  # where it finds the last two
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test writes by a relative path lands in its own folder."""
    monkeypatch.chdir(tmp_path)
