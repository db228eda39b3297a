"""Laws of partitions: every sample has one owner, both sides of a split have some, and the seed alone decides."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.parts import configured, each
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.dataset import Dataset, Source, number_dataset
from fedprune_cli.world.partition import Partition, PartitionConfig, build_partition

each_partition = each("partitions")
each_cover = each("partitions", without=["drawn"])  # which repeats samples


@functools.cache
def config_of(name: str, *overrides: str) -> PartitionConfig:
    return build_experiment(configured(f"partition={name}", *overrides)).partition


def build(
    name: str, labels: Array, devices: int, *overrides: str, seed: int = 0, test_fraction: float = 0.2
) -> Partition:
    dataset = plain(labels, devices, seed) if name == "natural" else plain(labels)
    return build_partition(config_of(name, *overrides), dataset, devices, test_fraction, seed)


def plain(labels: Array, devices: int = 0, seed: int = 0, **source: Any) -> Dataset:
    """Returns a dataset of which only the labels matter, and of so many natural devices, each with four samples or more."""
    known = Source(**source)
    if devices:
        owner = np.arange(len(labels)) % devices
        owner[4 * devices :] = np.random.Generator(np.random.PCG64(seed)).integers(devices, size=len(labels))[
            4 * devices :
        ]
        known = dataclasses.replace(known, owner=owner, owner_names=tuple(f"d{at:03}" for at in range(devices)))
    inputs = np.zeros((len(labels), 1, 1, 1))
    return number_dataset("x", inputs, labels, int(labels.max()) + 1, known)


def labels_of(size: int, classes: int, seed: int) -> Array:
    labels = np.random.Generator(np.random.PCG64(seed)).integers(classes, size=size)
    labels[0] = classes - 1
    return labels


@each_cover
@given(
    size=st.integers(40, 400),
    classes=st.integers(2, 12),
    devices=st.integers(1, 10),
    seed=st.integers(0, 5),
    fraction=st.floats(0.01, 0.99),
)
def test_a_partition_is_a_disjoint_cover(
    name: str, size: int, classes: int, devices: int, seed: int, fraction: float
) -> None:
    labels = labels_of(size, classes, seed)
    partition = build(name, labels, devices, seed=seed, test_fraction=fraction)
    together = np.concatenate([partition.train.flat, partition.test.flat])
    assert sorted(together) == list(range(size)), "a sample has no owner, or two"
    for device in range(devices):
        train, test = partition.train[device], partition.test[device]
        assert len(train) >= 1, f"device {device} has nothing to train on"
        assert len(test) >= 1, f"device {device} has nothing to be tested on"
        assert len(train) + len(test) >= 4
        np.testing.assert_array_equal(
            np.bincount(labels[np.concatenate([train, test])], minlength=classes), partition.histogram[device]
        )


@each_partition
def test_the_seed_alone_decides(name: str) -> None:
    labels = labels_of(500, 10, 0)
    a, b, c = build(name, labels, 7, seed=1), build(name, labels, 7, seed=1), build(name, labels, 7, seed=2)
    np.testing.assert_array_equal(a.histogram, b.histogram)
    assert all((x == y).all() for x, y in zip(a.train, b.train, strict=True))
    assert any(not np.array_equal(x, y) for x, y in zip(a.train, c.train, strict=True))


@each_partition
def test_near_duplicates_stand_on_one_side_and_the_data_decides_who_is_tested(name: str) -> None:
    """Whatever the partition: no group is on both sides, or with two devices; what the data holds out, and nothing else, is tested on."""
    labels, size, devices = labels_of(600, 4, 0), 600, 5
    group = np.arange(size) // 6
    labels = labels[group * 6]
    natural = {"devices": devices} if name == "natural" else {}
    together = plain(labels, group=group, **natural)
    if natural:
        source = dataclasses.replace(together.source, owner=group % devices)
        together = dataclasses.replace(together, source=source)
    made = build_partition(config_of(name), together, devices, 0.25, 0)
    for device in range(devices):
        assert not set(group[made.train[device]]) & set(group[made.test[device]])
        for other in range(device):
            if name != "drawn":
                assert not set(group[made.train[device]]) & set(group[made.train[other]])
    assert not set(group[made.train.flat]) & set(group[made.test.flat])
    share = made.test.sizes / (made.test.sizes + made.train.sizes)
    assert abs(share - 0.25).max() < 0.15
    held_out = np.arange(size) % 3 == 0
    made = build_partition(config_of(name), plain(labels, held_out=held_out, **natural), devices, 0.25, 0)
    assert held_out[made.test.flat].all()
    assert not held_out[made.train.flat].any()
