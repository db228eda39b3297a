"""What a node has on its disk: its own samples, and its own v_k by round. Neither ever leaves it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedprune_cli.errors import CheckpointError, DataError
from fedprune_cli.store.files import MAX_BYTES, Plain, read_bytes
from fedprune_cli.store.sealed import Sealed, unseal
from fedprune_cli.store.state import Array, Ragged
from fedprune_cli.store.write import write_whole, writing
from fedprune_cli.world.datasets import Dataset
from fedprune_cli.world.datasets.roster import Card
from fedprune_cli.world.partition import Partition

SAMPLES = "samples.safetensors"
RUN = re.compile(r"[0-9a-f]{12}-s[0-9]{1,19}")
PART = "personal-{}.safetensors"


@dataclass(frozen=True)
class Samples:
    """A node's own samples, those to train on first. inputs: [n, C, H, W]; the network sees (inputs / scale - mean) / std."""

    inputs: Array
    labels: Array
    training: int
    classes: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def card(self, *, labels: bool) -> Card:
        """Returns what the server is told of them; `labels`: how many of each class as well."""
        counts = np.bincount(self.labels, minlength=self.classes).tolist() if labels else None
        return Card(
            self.training, len(self.labels) - self.training, tuple(self.inputs.shape[1:]), str(self.inputs.dtype), self.scale,
            self.classes, None if counts is None else tuple(counts),
        )  # fmt: skip

    @property
    def sha256(self) -> str:
        """The SHA-256 of all of it."""
        head = self.training, self.classes, self.scale, self.mean, self.std, self.inputs.shape, str(self.inputs.dtype)
        digest = hashlib.sha256(repr((*head, str(self.labels.dtype))).encode())
        for array in (self.inputs, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def owned_by(self, device: int) -> tuple[Ragged, Ragged]:
        """Returns who trains and who is tested on which of them: this device on its own."""
        order, before = np.arange(len(self.labels)), [0] * (device + 1)
        train, test = order[: self.training], order[self.training :]
        return Ragged(train, np.array([*before, len(train)])), Ragged(test, np.array([*before, len(test)]))


def samples_of(dataset: Dataset, partition: Partition, device: int) -> Samples:
    """Returns the samples of one device of a split dataset."""
    train, test = partition.train[device], partition.test[device]
    own = np.concatenate([train, test])
    return Samples(
        dataset.inputs[own],
        dataset.labels[own],
        len(train),
        dataset.num_classes,
        dataset.scale,
        dataset.mean,
        dataset.std,
    )


def write_samples(folder: Path, samples: Samples) -> None:
    """Writes a node's samples to its folder."""
    header: dict[str, Plain] = {
        "training": samples.training, "classes": samples.classes, "scale": samples.scale, "mean": [*samples.mean], "std": [*samples.std]
    }  # fmt: skip
    arrays = {"inputs": samples.inputs, "labels": samples.labels}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SAMPLES, Sealed(header, arrays).encode())


def read_samples(folder: Path) -> Samples:
    """Returns a node's samples; raises DataError."""
    path = folder / SAMPLES
    data = read_bytes(path, MAX_BYTES, DataError)
    try:
        sealed = unseal(data)
        head, arrays = sealed.header, sealed.arrays
        mean, std = (tuple(map(float, head[key])) for key in ("mean", "std"))  # type: ignore[arg-type]
        return Samples(
            arrays["inputs"],
            arrays["labels"],
            int(str(head["training"])),
            int(str(head["classes"])),
            float(str(head["scale"])),
            mean,
            std,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {error}; remove it, and join again with the data") from None


@dataclass(frozen=True)
class Place:
    """Where a node is: its device's number, its folder, and its samples."""

    device: int
    folder: Path
    samples: Samples


@dataclass(frozen=True)
class Versions:
    """A node's v_k of one run, one file a round, so that work done again begins where it began before. initial: that of round 0."""

    folder: Path
    initial: Array

    def read(self, number: int) -> Array:
        """Returns v_k as it was after a round, float32 [V]; raises CheckpointError when it is not here."""
        if number == 0:
            return self.initial.copy()
        path = self.folder / PART.format(number)
        values = _unsealed(path).arrays.get("personal", np.zeros(0))
        if values.shape != self.initial.shape or values.dtype != np.float32:
            raise CheckpointError(f"{path}: of another model")
        return values

    def origin(self, number: int) -> str:
        """Returns what v_k came of after a round, as `write` was told, empty for that of round 0; raises as `read` does."""
        if number == 0:
            return ""
        return str(_unsealed(self.folder / PART.format(number)).header.get("origin", ""))

    def write(self, number: int, values: Array, origin: str = "") -> None:
        """Writes v_k as it is after a round. origin: the SHA-256 of all that it was asked to become it, which a server knows."""
        header: dict[str, Plain] = {"round": number, "origin": origin}
        write_whole(self.folder / PART.format(number), Sealed(header, {"personal": values}).encode())

    def keep(self, numbers: Iterable[int]) -> None:
        """Removes those of all other rounds: the server has accepted what came of the one that it takes for its base."""
        kept = {PART.format(number) for number in numbers}
        with writing(self.folder):
            for path in self.folder.glob(PART.format("*")):
                if path.name not in kept:
                    path.unlink(missing_ok=True)


def _unsealed(path: Path) -> Sealed:
    data = read_bytes(path, MAX_BYTES, CheckpointError)
    try:
        return unseal(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def versions_of(folder: Path, run: str, initial: Array) -> Versions:
    """Returns a node's parts of a run; raises CheckpointError for a run of an impossible name."""
    if not RUN.fullmatch(run):
        raise CheckpointError(f"{run[:50]!r} is not the name of a run")
    with writing(folder):
        (folder / run).mkdir(parents=True, exist_ok=True)
    return Versions(folder / run, initial)
