"""What a smartwatch felt: ten people at seven shoulder exercises, six axes at 50 Hz, inside pip's package seglearn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.dataset import Dataset, Source, number_dataset
from fedprune_cli.world.datasets.packages import Package, packaged_files
from fedprune_cli.world.datasets.pickled import read_pickled_object
from fedprune_cli.world.datasets.stretches import cut

SEGLEARN = Package(
    name="seglearn",
    version="1.2.5",
    archive="seglearn-1.2.5-py3-none-any.whl",
    pattern="*seglearn/data/watch_dataset.npy",
    sha256="eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537",
    extra=True,
)


@dataclass(frozen=True)
class Watch:
    """seglearn's smartwatch data (Burns et al. 2018): windows of `length` samples, whose class is the exercise, whose owner the person.

    140 recordings, one for each person, exercise and arm, of 947 to 2,618 samples, about twenty repetitions each. A window has the three
    axes of acceleration and the three of rotation. Windows overlap where `stride` is shorter than `length`; each recording is laid out in
    stretches of `stretch` samples, and only a whole stretch is trained on or tested on.
    """

    name: str
    root: str | None
    length: int
    stride: int
    stretch: int

    def __post_init__(self) -> None:
        require(2 <= self.length <= 900, "length", self.length, "in 2..900 (the shortest recording has 947 samples)")
        require(1 <= self.stride <= 10**4, "stride", self.stride, "in 1..10000")
        allowed = f"in {self.length}..10000 (a window at least)"
        require(self.length <= self.stretch <= 10**4, "stretch", self.stretch, allowed)

    def load(self) -> Dataset:
        content = packaged_files(self.name, SEGLEARN, self.root)["watch_dataset.npy"]
        watch = read_pickled_object(content, f"{SEGLEARN.name}'s watch_dataset.npy")
        recordings: list[Array] = watch["X"]
        series, first, group = cut([len(one) for one in recordings], self.length, self.stride, self.stretch)
        inputs = np.stack(
            [recordings[at][start : start + self.length].T for at, start in zip(series, first, strict=True)]
        )
        people = np.asarray(watch["subject"], dtype=np.int64)
        numbers = np.unique(people)
        source = Source(
            owner=np.searchsorted(numbers, people)[series],
            owner_names=tuple(f"person {number:02}" for number in numbers),
            group=group,
            label_names=tuple(watch["y_labels"]),
            encoding={"axes": list(watch["X_labels"]), "hz": 50, "length": self.length},
        )
        labels = np.asarray(watch["y"])[series]
        return number_dataset(self.name, inputs[:, :, None, :], labels, len(source.label_names), source)
