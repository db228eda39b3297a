"""Reading what a run left in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, cast

from fedprune_cli.errors import CheckpointError, one_line
from fedprune_cli.runs.inputs import check_inputs
from fedprune_cli.store import folder
from fedprune_cli.store.files import Plain, fits, read_json
from fedprune_cli.store.record import RoundRecord

HELD_ROUNDS = 10  # a level counts as held when no test of the last ten rounds is below it

MANIFEST_FORM = {
    "method": str, "seed": int, "fresh_devices": int, "train_samples": [int], "histogram": [[int]],
    "config": {"pruner": {"granularity": str}, "rounds": int, **dict.fromkeys(("data", "partition", "devices", "channel"), dict)},
    "dataset": {"num_classes": int}, "model": dict, "versions": dict,
}  # fmt: skip


class Dataset(TypedDict):
    """What a manifest says of the data."""

    num_classes: int


class PrunerConfig(TypedDict):
    """What a configuration says of its pruner."""

    granularity: str


class BranchConfig(TypedDict):
    """The run that a branch comes from, and the last round that they share."""

    run: str
    round: int


class FailsafeConfig(TypedDict):
    """What a configuration says of fail-safes."""

    late: Literal["wait", "drop", "defer"]
    wait_factor: float
    max_staleness: int
    aggregation: str
    clip_norm: float | None
    safe_ratio: bool
    quarantine_after: int | None
    quarantine_rounds: int | None


class Config(TypedDict):
    """A run's configuration; what has been a key only since a later version is not required."""

    data: Mapping[str, Plain]
    partition: Mapping[str, Plain]
    devices: Mapping[str, Plain]
    channel: Mapping[str, Plain]
    pruner: PrunerConfig
    rounds: int
    branch: NotRequired[BranchConfig | None]
    failsafe: NotRequired[FailsafeConfig | None]
    participation: NotRequired[Mapping[str, Plain] | None]


class Summary(TypedDict):
    """What came of a finished run, as far as reports ask."""

    time_to_target_s: float | None
    state_sha256: str


class Manifest(TypedDict):
    """What a run was made of, as far as reports ask; `MANIFEST_FORM` is what is checked when it is read."""

    method: str
    seed: int
    fresh_devices: int
    device_names: NotRequired[list[str]]
    train_samples: list[int]
    histogram: list[list[int]]
    config: Config
    dataset: Dataset
    model: Mapping[str, Plain]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Accuracies:
    """What a test of the models found, and the clock then: over devices weighted by samples, unweighted and their 10th percentile,
    and of devices that never trained, None where there are none.
    """

    simulated_s: float
    accuracy: float
    accuracy_mean: float
    accuracy_p10: float
    fresh_accuracy: float | None


@dataclass(frozen=True)
class Run:
    """A run folder's content. summary is None while the run is unfinished."""

    path: Path
    manifest: Manifest
    rounds: tuple[RoundRecord, ...]
    summary: Summary | None

    def called(self, device: int) -> str:
        """Returns what a table of devices calls a device, else its number."""
        names = self.manifest.get("device_names")
        return one_line(names[device]) if names else str(device)

    @property
    def method(self) -> str:
        return one_line(self.manifest["method"])

    @property
    def seed(self) -> int:
        return self.manifest["seed"]

    @property
    def final(self) -> Accuracies:
        """The last accuracies, which are not the best ones."""
        return accuracies(self.rounds)[-1]


def read_run(path: Path) -> Run:
    """Returns the run; raises CheckpointError when the folder is not one, is damaged, or its run read what was edited since."""
    folder.check(path, folder.MANIFEST)
    check_inputs(path)
    found, summary = read_json(path / folder.MANIFEST, CheckpointError), folder.read_summary(path)
    named = fits(found.get("device_names", []), [str]) and len(found.get("device_names", [])) in (
        0,
        len(found.get("histogram", [])),
    )
    if (
        not named
        or not fits(found, MANIFEST_FORM)
        or len({found["dataset"]["num_classes"], *map(len, found["histogram"])}) > 1
    ):
        raise CheckpointError(f"{path / folder.MANIFEST}: damaged (not the manifest of a run)")
    rounds = tuple(folder.read_records(path))
    if not accuracies(rounds):
        raise CheckpointError(f"{path}: no round has been tested yet, there is nothing to report")
    return Run(path, cast(Manifest, found), rounds, cast("Summary | None", summary))


def accuracies(rounds: Sequence[RoundRecord]) -> list[Accuracies]:
    """Returns the accuracies of the rounds whose models were tested."""
    return [
        Accuracies(r.simulated_s, r.accuracy, r.accuracy_mean, r.accuracy_p10, r.fresh_accuracy)
        for r in rounds
        if r.accuracy is not None and r.accuracy_mean is not None and r.accuracy_p10 is not None
    ]


def held_accuracy(run: Run) -> float:
    """Returns the lowest accuracy of the last ten rounds, or of the last test: the level that the run holds (model.md, section 7)."""
    lately = accuracies(run.rounds[-HELD_ROUNDS:]) or accuracies(run.rounds)[-1:]
    return min(test.accuracy for test in lately)


def crossing(run: Run, target: float) -> int | None:
    """Returns the index of the first round whose tested accuracy reaches the target, or None."""
    return next((i for i, r in enumerate(run.rounds) if r.accuracy is not None and r.accuracy >= target), None)
