"""Partitions: which device owns which sample, and each device's own train and test share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedprune_cli.errors import ConfigError, require
from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array, Ragged, ragged
from fedprune_cli.world.datasets import Dataset

MAX_DRAWN = 10**9  # samples of all devices


class PartitionConfig(Protocol):
    """A partition plug-in: a frozen dataclass whose fields are its configuration."""

    @property
    def name(self) -> str: ...

    def split(self, dataset: Dataset, num_devices: int, test_fraction: float, seed: int) -> tuple[Ragged, Ragged]:
        """Returns every device's train and test samples; raises ConfigError when there are too few."""


@dataclass(frozen=True)
class Cover(ABC):
    """A disjoint cover of the data: every sample belongs to exactly one device, near-duplicates (a group) to the same one.

    min_samples: that every device has at least, in groups where the data has them; who would have fewer is filled up with random ones
    of the largest devices.
    """

    name: str
    min_samples: int

    @abstractmethod
    def assign(self, labels: Array, num_devices: int, rng: np.random.Generator) -> Array:
        """Returns the owner of every sample, int64 [N] in 0..num_devices-1."""

    def split(self, dataset: Dataset, num_devices: int, test_fraction: float, seed: int) -> tuple[Ragged, Ragged]:
        labels, unit = _units(dataset)
        if num_devices * self.min_samples > len(labels):
            raise ConfigError(
                f"{num_devices} devices with at least {self.min_samples} samples each need {num_devices * self.min_samples} samples, the "
                f"data has {len(labels)}: lower devices.count, devices.fresh or partition.min_samples, or take partition=drawn"
            )
        rng = stream(seed, "partition")
        owner = self.assign(labels, num_devices, rng)
        _fill_up(owner, num_devices, self.min_samples, rng)
        return _divide(dataset, owner[unit], num_devices, test_fraction, seed)


def _units(dataset: Dataset) -> tuple[Array, Array]:
    """Returns the labels of what is dealt as a whole, [M], and the unit of every sample, [N]: groups, or the samples themselves.

    A group has the label of its first sample.
    """
    group = dataset.source.group
    if group is None:
        return dataset.labels, np.arange(len(dataset.labels))
    _, first, unit = np.unique(group, return_index=True, return_inverse=True)
    return dataset.labels[first], unit


def _divide(dataset: Dataset, owner: Array, num_devices: int, test_fraction: float, seed: int) -> tuple[Ragged, Ragged]:
    """Returns every device's train and test samples: as the data says, or at random, groups as a whole; ConfigError where one has none."""
    source = dataset.source
    train, test = [], []
    order = np.argsort(owner, kind="stable")
    for device, owned in enumerate(np.split(order, np.cumsum(np.bincount(owner, minlength=num_devices))[:-1])):
        if source.held_out is not None:
            held = source.held_out[owned]
        elif source.group is not None:
            held = _held_groups(source.group[owned], test_fraction, stream(seed, "split", device))
        else:
            shuffled = stream(seed, "split", device).permutation(len(owned))
            cut = min(max(round(test_fraction * len(owned)), 1), len(owned) - 1)
            held = np.zeros(len(owned), dtype=bool)
            held[shuffled[:cut]] = True
        if not held.any() or held.all():
            raise _one_sided(dataset, device, owned, all_held=bool(len(owned)) and bool(held.all()))
        test.append(np.sort(owned[held]))
        train.append(np.sort(owned[~held]))
    return ragged(train), ragged(test)


def _held_groups(group: Array, test_fraction: float, rng: np.random.Generator) -> Array:
    """Returns whether each of a device's samples is for testing, bool [n]: whole groups, in random order until the fraction is reached."""
    kinds, member, sizes = np.unique(group, return_inverse=True, return_counts=True)
    order = rng.permutation(len(kinds))
    filled = np.cumsum(sizes[order])
    cut = int(np.argmin(np.abs(filled - test_fraction * len(group)))) + 1
    held = np.zeros(len(kinds), dtype=bool)
    held[order[: min(cut, len(kinds) - 1)]] = True
    return held[member]


def _one_sided(dataset: Dataset, device: int, owned: Array, *, all_held: bool) -> ConfigError:
    """Returns the error for a device with nothing to test on, or nothing to train on."""
    missing, names = "training" if all_held else "test", dataset.source.owner_names
    who = f"device {device}"
    if dataset.source.owner is not None and len(owned) and len(set(dataset.source.owner[owned])) == 1:
        who += f" ({names[dataset.source.owner[owned[0]]]})"
    why = "two are the least"
    if dataset.source.held_out is not None:
        why = "the data itself says which samples are for testing"
    elif len(owned) > 1:
        why = "they are near-duplicates of each other"
    return ConfigError(
        f"{who} would have no {missing} samples among its {len(owned)}: {why}; leave it out, or take another partition"
    )


def _check_least(partition: Cover) -> None:
    least = partition.min_samples
    require(2 <= least <= 10**9, "min_samples", least, ">= 2 (one to train on, one to test on)")


def _check_alpha(alpha: float) -> None:
    require(1e-4 <= alpha <= 1e6, "alpha", alpha, "in [0.0001, 1000000]")


@dataclass(frozen=True)
class Iid(Cover):
    """Samples dealt at random, equally many to every device."""

    def __post_init__(self) -> None:
        _check_least(self)

    def assign(self, labels: Array, num_devices: int, rng: np.random.Generator) -> Array:
        owner = np.empty(len(labels), dtype=np.int64)
        owner[rng.permutation(len(labels))] = np.arange(len(labels)) % num_devices
        return owner


@dataclass(frozen=True)
class Dirichlet(Cover):
    """Each class is spread over the devices by its own draw from Dirichlet(alpha): the smaller alpha, the more skewed."""

    alpha: float

    def __post_init__(self) -> None:
        _check_least(self)
        _check_alpha(self.alpha)

    def assign(self, labels: Array, num_devices: int, rng: np.random.Generator) -> Array:
        owner = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            of_class = rng.permutation(np.flatnonzero(labels == label))
            counts = _apportion(_dirichlet(rng, self.alpha, num_devices), len(of_class))
            owner[of_class] = np.repeat(np.arange(num_devices), counts)
        return owner


@dataclass(frozen=True)
class QuantitySkew(Cover):
    """Device sizes are one draw from Dirichlet(alpha), labels are mixed at random."""

    alpha: float

    def __post_init__(self) -> None:
        _check_least(self)
        _check_alpha(self.alpha)

    def assign(self, labels: Array, num_devices: int, rng: np.random.Generator) -> Array:
        sizes = _apportion(_dirichlet(rng, self.alpha, num_devices), len(labels))
        owner = np.empty(len(labels), dtype=np.int64)
        owner[rng.permutation(len(labels))] = np.repeat(np.arange(num_devices), sizes)
        return owner


@dataclass(frozen=True)
class Shards(Cover):
    """Pathological skew (McMahan et al. 2017): every device holds `classes_per_device` classes, each class in equal parts."""

    classes_per_device: int

    def __post_init__(self) -> None:
        _check_least(self)
        require(1 <= self.classes_per_device <= 10**6, "classes_per_device", self.classes_per_device, "in 1..1000000")

    def assign(self, labels: Array, num_devices: int, rng: np.random.Generator) -> Array:
        classes = np.unique(labels)
        if self.classes_per_device > len(classes):
            raise ConfigError(
                f"{self.classes_per_device} is not allowed: the data has {len(classes)} classes",
                key="classes_per_device",
            )
        # deal the classes like cards, so that no device holds one twice and every class is held as long as there are cards for it
        deck = np.concatenate(
            [
                rng.permutation(classes)
                for _ in range(math.ceil(num_devices * self.classes_per_device / len(classes)) + 1)
            ]
        )
        hands: list[list[int]] = []
        cards = list(deck[::-1])
        for _ in range(num_devices):
            hand: list[int] = []
            skipped: list[int] = []
            while len(hand) < self.classes_per_device:
                card = cards.pop()
                (skipped if card in hand else hand).append(card)
            cards.extend(reversed(skipped))
            hands.append(hand)
        owner = np.empty(len(labels), dtype=np.int64)
        for label in classes:
            of_class = rng.permutation(np.flatnonzero(labels == label))
            holders = np.array([device for device, hand in enumerate(hands) if label in hand])
            if not len(holders):  # fewer cards than classes: the class goes to the device with the nearest ones
                holders = np.array([int(rng.integers(num_devices))])
            owner[of_class] = holders[np.arange(len(of_class)) * len(holders) // len(of_class)]
        return owner


@dataclass(frozen=True)
class Drawn:
    """Any number of devices, each with `samples` drawn with repetition from the whole data, its classes mixed by Dirichlet(alpha).

    What devices train on and what they are tested on come from two disjoint pools of the data.
    """

    name: str
    samples: int
    alpha: float

    def __post_init__(self) -> None:
        require(2 <= self.samples <= 10**6, "samples", self.samples, "in 2..1000000 (one to train on, one to test on)")
        _check_alpha(self.alpha)

    def split(self, dataset: Dataset, num_devices: int, test_fraction: float, seed: int) -> tuple[Ragged, Ragged]:
        if num_devices * self.samples > MAX_DRAWN:
            raise ConfigError(
                f"{num_devices} devices of {self.samples} samples are {num_devices * self.samples}: must be at most {MAX_DRAWN}; "
                "lower devices.count, devices.fresh or partition.samples"
            )
        rng = stream(seed, "partition")
        labels, unit = _units(dataset)
        classes = np.unique(labels)
        mix = rng.standard_gamma(self.alpha, (num_devices, len(classes)))
        empty = ~(mix.sum(1) > 0)  # a tiny alpha makes all draws underflow: one class gets everything
        mix[empty, rng.integers(len(classes), size=int(empty.sum()))] = 1.0
        mix /= mix.sum(1, keepdims=True)
        cut = min(max(round(test_fraction * self.samples), 1), self.samples - 1)
        pools = []
        for label in classes:
            of_class = rng.permutation(np.flatnonzero(labels == label))
            pools.append(_pools(dataset, unit, of_class, test_fraction))
            if not all(map(len, pools[-1])):
                raise ConfigError(
                    f"class {label} has {len(of_class)} samples: at least 2 are needed, one to train on and one to test on"
                )
        counts = [self.samples - cut, cut]
        train, test = (self._draw([pool[part] for pool in pools], mix, count, rng) for part, count in enumerate(counts))
        return train, test

    def _draw(self, pools: Sequence[Array], mix: Array, count: int, rng: np.random.Generator) -> Ragged:
        """Returns `count` samples of every device, as many of each class as its mix says."""
        of_class = rng.multinomial(count, mix)
        device = np.concatenate([np.repeat(np.arange(len(mix)), column) for column in of_class.T])
        drawn = np.concatenate(
            [pool[rng.integers(len(pool), size=n)] for pool, n in zip(pools, of_class.sum(0), strict=True)]
        )
        order = np.lexsort((drawn, device))
        return Ragged(drawn[order], np.arange(len(mix) + 1) * count)


def _pools(dataset: Dataset, unit: Array, of_class: Array, test_fraction: float) -> tuple[Array, Array]:
    """Returns a class's samples to train on and to test on, from its units [M] in random order: as the data says, or by the fraction."""
    source = dataset.source
    edge = min(max(round(test_fraction * len(of_class)), 1), len(of_class) - 1)
    train, test = of_class[edge:], of_class[:edge]
    if source.group is not None or source.held_out is not None:
        whole = [np.flatnonzero(np.isin(unit, part)) for part in (train, test)]
        if source.held_out is None:
            return whole[0], whole[1]
        every = np.concatenate(whole)
        return every[~source.held_out[every]], every[source.held_out[every]]
    return train, test


@dataclass(frozen=True)
class Natural:
    """Whose the samples really are: one device for each person, machine or role that the data names, in the order of their names."""

    name: str

    def split(self, dataset: Dataset, num_devices: int, test_fraction: float, seed: int) -> tuple[Ragged, Ragged]:
        owner, names = dataset.source.owner, dataset.source.owner_names
        if owner is None:
            raise ConfigError(
                f"partition=natural: data={dataset.name} does not say whose its samples are; take a column of yours for it "
                "(data.device=COLUMN), or partition=dirichlet"
            )
        if num_devices != len(names):
            raise ConfigError(
                f"partition=natural: the samples of data={dataset.name} are of {len(names)} devices, so devices.count and devices.fresh "
                f"together must be {len(names)}, and not {num_devices}"
            )
        return _divide(dataset, owner, num_devices, test_fraction, seed)


PARTITIONS: dict[str, type[PartitionConfig]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "shards": Shards,
    "quantity": QuantitySkew,
    "drawn": Drawn,
    "natural": Natural,
}


def _dirichlet(rng: np.random.Generator, alpha: float, size: int) -> Array:
    """Returns one Dirichlet(alpha) draw [size]; where a tiny alpha makes all gamma draws underflow, one entry gets everything."""
    draw = rng.dirichlet(np.full(size, alpha))
    if not np.isfinite(draw).all() or draw.sum() <= 0:
        draw = np.zeros(size)
        draw[rng.integers(size)] = 1.0
    return draw


def _apportion(shares: Array, count: int) -> Array:
    """Returns whole numbers [K] in proportion to `shares` [K] that sum to `count`."""
    edges = np.rint(np.cumsum(shares) / shares.sum() * count).astype(np.int64)
    edges[-1] = count
    return np.diff(edges, prepend=0)


@dataclass(frozen=True)
class Partition:
    """train, test: sample indices of every device, int64; histogram: samples of each class, int64 [devices, classes]."""

    train: Ragged
    test: Ragged
    histogram: Array


def build_partition(
    config: PartitionConfig, dataset: Dataset, num_devices: int, test_fraction: float, seed: int
) -> Partition:
    """Returns every device's train and test samples, at least one of each; raises ConfigError when there are too few for all."""
    train, test = config.split(dataset, num_devices, test_fraction, seed)
    histogram = np.zeros((num_devices, dataset.num_classes), dtype=np.int64)
    for part in (train, test):
        np.add.at(histogram, (np.repeat(np.arange(num_devices), part.sizes), dataset.labels[part.flat]), 1)
    return Partition(train, test, histogram)


def _fill_up(owner: Array, num_devices: int, least: int, rng: np.random.Generator) -> None:
    """Moves samples in place from the largest devices to those with fewer than `least`."""
    sizes = np.bincount(owner, minlength=num_devices)
    missing = np.maximum(least - sizes, 0)
    if not missing.any():
        return
    low, high = least, int(sizes.max())  # the largest level that gives enough when everything above it is given away
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= missing.sum() else (low, level - 1)
    give = np.maximum(sizes - low, 0)
    surplus = int(give.sum() - missing.sum())
    give[np.flatnonzero(give)[:surplus]] -= 1
    given = np.concatenate(
        [rng.permutation(np.flatnonzero(owner == device))[: give[device]] for device in np.flatnonzero(give)]
    )
    owner[rng.permutation(given)] = np.repeat(np.arange(num_devices), missing)
