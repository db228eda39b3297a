"""The runs that lie in a folder: what each is and how far, and the space that can be had back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedprune_cli.errors import CheckpointError
from fedprune_cli.report.page import percent, seconds
from fedprune_cli.store import folder, lock
from fedprune_cli.store.files import read_json
from fedprune_cli.terminal import Table

Status = Literal["finished", "pruned", "running", "interrupted", "damaged"]


@dataclass(frozen=True)
class Listed:
    """A run as the list shows it. accuracy and simulated_s are of its last round, None before there is one; size_bytes: on disk."""

    path: str
    status: Status
    method: str
    seed: int | None
    rounds: int
    wanted_rounds: int | None
    accuracy: float | None
    simulated_s: float | None
    size_bytes: int


def find_runs(root: Path) -> list[Listed]:
    """Returns the runs under a folder, by path; raises CheckpointError when it is not there."""
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder")
    return [_look(path) for path in sorted(_run_dirs(root))]


def _run_dirs(root: Path) -> Iterator[Path]:
    for at, folders, files in os.walk(root):
        if folder.MANIFEST in files:
            folders.clear()
            yield Path(at)
        folders[:] = [name for name in folders if not folder.made_by(name)]


def _look(path: Path) -> Listed:
    size = sum(file.lstat().st_size for file in path.rglob("*"))
    try:
        folder.check(path, folder.MANIFEST)
        manifest, records = read_json(path / folder.MANIFEST, CheckpointError), folder.read_records(path)
        accuracies = [record.accuracy for record in records if record.accuracy is not None]
        return Listed(
            str(path), _status(path), manifest["method"], manifest["seed"], len(records), manifest["config"]["rounds"],
            accuracies[-1] if accuracies else None, records[-1].simulated_s if records else None, size,
        )  # fmt: skip
    except (CheckpointError, KeyError, TypeError):
        return Listed(str(path), "damaged", "", None, 0, None, None, None, size)


def _status(path: Path) -> Status:
    if lock.is_held(path):
        return "running"
    if not folder.is_finished(path):
        return "interrupted"
    return "pruned" if folder.is_pruned(path) else "finished"


def runs_table(runs: Sequence[Listed]) -> Table:
    """Returns the list for the terminal."""
    rows = [
        [
            run.path,
            run.status if run.status != "interrupted" else f"round {run.rounds} of {run.wanted_rounds}",
            percent(run.accuracy),
            "-" if run.simulated_s is None else seconds(run.simulated_s),
            run.method,
            f"{run.size_bytes / 1e6:.1f} MB",
        ]
        for run in runs
    ]
    headers = ["run", "status", "accuracy", "simulated", "method", "size"]
    return Table.of("runs", headers, rows, folding=["status", "method"], elsewhere="in --json")


# --- space ----------------------------------------------------------------------------------------------------------


def prunable(root: Path) -> dict[Path, int]:
    """Returns what can go, with its bytes: checkpoints of finished runs, which nothing but more rounds would need, and the folders that
    killed processes left half made. Records, configurations, summaries and reports stay.
    """
    found = {}
    for run in find_runs(root):
        if run.status == "finished":
            for file in folder.checkpoint_files(Path(run.path)):
                found[file] = file.lstat().st_size
    for at, folders, _ in os.walk(root):
        for name in folders:
            if (pid := folder.made_by(name)) and not folder.alive(pid):
                found[Path(at) / name] = sum(file.lstat().st_size for file in (Path(at) / name).rglob("*"))
        folders[:] = [name for name in folders if not folder.made_by(name)]
    return found


def prune(paths: Sequence[Path]) -> None:
    """Removes what `prunable` found, each checkpoint while no other process has its run."""
    for path in paths:
        if path.is_dir():
            with folder.writing(path):
                shutil.rmtree(path)
    for run_dir in dict.fromkeys(path.parent for path in paths if path.name == folder.STATE):
        with lock.locked(run_dir):
            folder.drop_checkpoint(run_dir)
