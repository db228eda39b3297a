"""Fixed point and keepers: what is sent fits, is no longer than it was, and is of enough devices."""

from __future__ import annotations

import numpy as np
import pytest

from fedprune_cli.errors import ConfigError
from fedprune_cli.privacy.fixed import FixedPoint, point_of, widest
from fedprune_cli.privacy.keepers import capped, fewest_keepers, keepers_by_rank
from fedprune_cli.privacy.settings import Privacy


def test_sums_of_the_largest_values_fit_a_word() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        samples = rng.integers(1, 5000, rng.integers(1, 60))
        point = point_of(Privacy(secure=True), samples.tolist(), None)
        total = (samples * point.whole(np.full(len(samples), 9.0))).sum()
        assert total < 2**31
        assert point.bits == 18 or total * 2 + 2 * samples.sum() >= 2**31 - 1  # one bit more would not fit


def test_whole_numbers_are_near_and_towards_zero_never_longer() -> None:
    rng, point = np.random.default_rng(1), FixedPoint(1.0, 12)
    values = rng.normal(0, 0.3, 10_000)
    inside = np.abs(values) < 1
    assert np.abs(point.whole(values) * point.step - values)[inside].max() <= point.step / 2 + 1e-12
    shorter = point.towards_zero(values) * point.step
    assert (np.abs(shorter) <= np.abs(values)).all()
    assert (np.abs(shorter - values)[inside] < point.step).all()
    assert np.abs(point.whole(values)).max() == point.most


def test_a_mean_is_off_by_at_most_half_a_step() -> None:
    """Of values that count D_k each: the sum by at most sum D_k / 2 steps, also after it went around modulo 2^32 under way."""
    rng = np.random.default_rng(4)
    for _ in range(100):
        samples = rng.integers(1, 3000, rng.integers(1, 40))
        point = point_of(Privacy(secure=True, bits=int(rng.integers(8, 25))), samples.tolist(), None)
        values = rng.uniform(-1, 1, (len(samples), 50))
        masks = rng.integers(0, 2**32, values.shape, dtype=np.uint32)
        sent = (samples[:, None] * point.whole(values)).astype(np.uint32) + masks
        total = (sent.sum(0, dtype=np.uint32) - masks.sum(0, dtype=np.uint32)).astype(np.int32) * point.step
        apart = np.abs(total - samples @ values) / samples.sum()
        assert apart.max() <= point.step / 2 * (1 + 1e-9)
        assert len(samples) > 1 or apart.max() > point.step / 5  # and a single value nearly is


def test_too_little_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="fewer devices"):
        widest(1.0, 18, 2**26)
    with pytest.raises(ConfigError, match="steps wide"):
        point_of(Privacy(secure=True, dp="client", epsilon=1.0, delta=0.1, clip=1.0, bits=8), [10] * 100, 0.2)


def test_noise_has_room_beside_the_sum() -> None:
    private = Privacy(secure=True, dp="client", epsilon=1.0, delta=0.1, clip=0.5, bits=24)
    point = point_of(private, [10] * 50, 5.0)
    assert point.largest == 0.5
    assert point.most * (50 + 8 * 5.0 * np.sqrt(50 / 5)) < 2**31


def test_after_capping_no_entry_has_too_few_keepers() -> None:
    """And no device drops more than it has to: the others, and the one that sets the cap, are as they were."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        ratios, least = rng.choice([0.0, 0.2, 0.2, 0.5, 0.9], rng.integers(3, 12)), int(rng.integers(3, 8))
        cut = capped(ratios, least)
        if len(ratios) < least:
            assert (cut == ratios).all()
            continue
        counts = np.rint((1 - cut) * 1000).astype(int)
        assert fewest_keepers(counts.tolist()) >= least
        assert (cut >= ratios).all()
        assert (cut == ratios).sum() >= len(ratios) - least + 1


def test_keepers_are_those_of_each_entry() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        counts = rng.integers(0, 6, 8)
        each = [(counts > at).sum() for at in range(counts.max())]
        assert keepers_by_rank(counts.tolist()).tolist() == each
        assert fewest_keepers(counts.tolist()) == min(each, default=0)
