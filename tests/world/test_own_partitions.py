"""What the built-in partitions promise besides."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedprune_cli.contracts.test_partitions import build, config_of, labels_of, plain
from fedprune_cli.errors import ConfigError
from fedprune_cli.rng import stream
from fedprune_cli.world.partition import PARTITIONS, build_partition

each_partition = pytest.mark.parametrize("name", PARTITIONS)


@pytest.mark.slow
@each_partition
def test_five_hundred_skewed_devices_take_under_a_second(name: str) -> None:
    labels = labels_of(60_000, 10, 0)
    overrides = ["partition.alpha=0.1"] if name in ("dirichlet", "quantity") else []
    started = time.process_time()
    partition = build(name, labels, 500, *overrides)
    assert time.process_time() - started < 1.0  # promised to users; it takes a thirtieth of it
    assert min(map(sum, partition.histogram)) >= 4


@pytest.mark.parametrize("name", [name for name in PARTITIONS if name not in ("drawn", "natural")])
def test_too_many_devices_are_refused_with_the_numbers(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"30 devices with at least 4 samples each need 120 samples, the data has 100"
    ):
        build(name, labels_of(100, 5, 0), 30)
    assert (build(name, labels_of(100, 5, 0), 25).histogram.sum(1) == 4).all()


def test_alpha_sets_the_skew() -> None:
    labels = labels_of(20_000, 10, 0)

    def mean_largest_class(alpha: str) -> float:
        histogram = build("dirichlet", labels, 20, f"partition.alpha={alpha}").histogram
        return float((histogram.max(1) / histogram.sum(1)).mean())

    shares = [mean_largest_class(alpha) for alpha in ("0.0001", "0.1", "1", "100")]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.75
    assert shares[-1] < 0.15


def test_shards_give_each_device_its_number_of_classes() -> None:
    labels = labels_of(20_000, 10, 0)
    for classes in (1, 2, 3, 10):
        histogram = build("shards", labels, 20, f"partition.classes_per_device={classes}").histogram
        assert ((histogram > 0).sum(1) == classes).all()
    with pytest.raises(ConfigError, match="the data has 10 classes"):
        build("shards", labels, 20, "partition.classes_per_device=11")


def test_shards_deal_without_running_out() -> None:
    """Any number of devices, classes and classes a device: whole hands, and every sample owned."""
    rng = np.random.Generator(np.random.PCG64(0))
    for case in range(300):
        classes, devices = (int(n) for n in rng.integers(1, [20, 50]))
        per_device = int(rng.integers(1, classes + 1))
        labels = np.arange(devices * classes * 4) % classes
        owner = PARTITIONS["shards"](name="shards", min_samples=2, classes_per_device=per_device).assign(  # type: ignore[call-arg]
            labels, devices, stream(case, "partition")
        )
        held = np.zeros((devices, classes), dtype=bool)
        held[owner, labels] = True
        if devices * per_device >= classes:
            assert (held.sum(1) == per_device).all()
        assert held.any(0).all()


def test_quantity_skews_sizes_and_not_labels() -> None:
    histogram = build("quantity", labels_of(50_000, 5, 0), 10, "partition.alpha=0.5").histogram
    sizes = histogram.sum(1)
    assert sizes.max() > 5 * sizes.min()
    large = histogram[sizes > 2000]
    np.testing.assert_allclose(large / large.sum(1, keepdims=True), 0.2, atol=0.05)


def test_the_split_stream_is_the_devices_own() -> None:
    """A device's split depends on its own samples and id alone."""
    labels = labels_of(100, 2, 0)
    partition = build("iid", labels, 4)
    own = np.sort(np.concatenate([partition.train[2], partition.test[2]]))
    shuffled = stream(0, "split", 2).permutation(own)
    np.testing.assert_array_equal(partition.test[2], np.sort(shuffled[:5]))


def test_devices_that_draw_their_samples_may_be_more_than_the_data_have() -> None:
    labels = labels_of(2000, 5, 0)
    partition = build("drawn", labels, 3000, "partition.alpha=0.1", test_fraction=0.25)
    assert set(partition.train.sizes) == {15}
    assert set(partition.test.sizes) == {5}
    assert not set(partition.train.flat) & set(partition.test.flat)  # nobody is tested on what anybody trained on
    assert (partition.histogram.sum(1) == 20).all()
    shares = np.sort(partition.histogram / 20, axis=1)
    assert shares[:, -1].mean() > 0.8  # skewed
    even = build("drawn", labels, 500, "partition.alpha=1000", test_fraction=0.25).histogram
    np.testing.assert_allclose(even.sum(0) / even.sum(), 0.2, atol=0.02)
    with pytest.raises(ConfigError, match="class 1 has 1 samples"):
        build("drawn", np.array([0] * 50 + [1]), 5)


def test_a_natural_device_owns_what_the_data_says_and_is_refused_by_name_where_it_cannot_be_tested() -> None:
    labels = labels_of(100, 3, 0)
    whole = plain(labels, 7)
    made = build_partition(config_of("natural"), whole, 7, 0.2, 0)
    owner = whole.source.owner
    assert owner is not None
    for device in range(7):
        assert (owner[np.concatenate([made.train[device], made.test[device]])] == device).all()
    with pytest.raises(
        ConfigError, match=r"of 7 devices, so devices.count and devices.fresh together must be 7, and not 8"
    ):
        build_partition(config_of("natural"), whole, 8, 0.2, 0)
    held_out = np.arange(100) % 2 == 0
    for only, missing in ((True, "training"), (False, "test")):
        held = np.where(owner == 3, only, held_out)
        with pytest.raises(ConfigError, match=rf"device 3 \(d003\) would have no {missing} samples"):
            build_partition(config_of("natural"), plain(labels, 7, held_out=held), 7, 0.2, 0)
    with pytest.raises(ConfigError, match="data=x does not say whose its samples are"):
        build_partition(config_of("natural"), plain(labels), 7, 0.2, 0)
