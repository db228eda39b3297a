"""Reading what a run left in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from fedprune_cli.errors import CheckpointError, one_line
from fedprune_cli.store import folder
from fedprune_cli.store.files import fits, read_json

# a JSON object whose keys and types were checked when it was read, or made by the code below
Record = Mapping[str, Any]
HELD_ROUNDS = 10  # a level counts as held when no test of the last ten is below it

MANIFEST_FORM = {
    "method": str, "seed": int, "fresh_devices": int, "train_samples": [int], "histogram": [[int]],
    "config": {"pruner": {"granularity": str}, "rounds": int, **dict.fromkeys(("data", "partition", "devices", "channel"), dict)},
    "dataset": {"num_classes": int}, "model": dict, "versions": dict,
}  # fmt: skip


class Dataset(TypedDict):
    """What a manifest says of the data."""

    num_classes: int


class Manifest(TypedDict):
    """What a run was made of, as far as reports ask; `MANIFEST_FORM` is what is checked when it is read."""

    method: str
    seed: int
    fresh_devices: int
    train_samples: list[int]
    histogram: list[list[int]]
    config: Record
    dataset: Dataset
    model: Record
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """A run folder's content. summary is None while the run is unfinished."""

    path: Path
    manifest: Manifest
    rounds: tuple[Record, ...]
    summary: Record | None

    @property
    def method(self) -> str:
        return one_line(self.manifest["method"])

    @property
    def seed(self) -> int:
        return self.manifest["seed"]

    @property
    def last_test(self) -> Record:
        """The last round whose models were tested."""
        return tested(self.rounds)[-1]


def read_run(path: Path) -> Run:
    """Returns the run; raises CheckpointError when the folder is not one, or is damaged."""
    folder.check(path, folder.MANIFEST)
    found, summary = read_json(path / folder.MANIFEST, CheckpointError), folder.read_summary(path)
    if not fits(found, MANIFEST_FORM) or len({found["dataset"]["num_classes"], *map(len, found["histogram"])}) > 1:
        raise CheckpointError(f"{path / folder.MANIFEST}: damaged (not the manifest of a run)")
    rounds = tuple(folder.read_records(path))
    if not tested(rounds):
        raise CheckpointError(f"{path}: no round has been tested yet, there is nothing to report")
    return Run(path, cast(Manifest, found), rounds, summary)


def tested(rounds: Sequence[Record]) -> list[Record]:
    """Returns the rounds whose models were tested."""
    return [record for record in rounds if record["accuracy"] is not None]


def held_accuracy(run: Run) -> float:
    """Returns the lowest accuracy of the last ten tests: the level that the run holds (model.md, section 7)."""
    return min(float(record["accuracy"]) for record in tested(run.rounds)[-HELD_ROUNDS:])


def crossing(run: Run, target: float) -> int | None:
    """Returns the index of the first round whose tested accuracy reaches the target, or None."""
    return next((i for i, r in enumerate(run.rounds) if r["accuracy"] is not None and r["accuracy"] >= target), None)
