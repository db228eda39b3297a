"""Laws of aggregators: what each needs to see of the devices is what it says."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.contracts.parts import each, make_experiment
from fedprune_cli.sections import part_of
from fedprune_cli.serve.aggregate import Aggregator, Contribution
from fedprune_cli.serve.failsafe import AGGREGATION
from fedprune_cli.store.state import Array

SIZE = 6
each_aggregator = each("aggregators")


@functools.cache
def aggregator_of(name: str) -> Aggregator:
    return part_of(make_experiment("failsafe.trim=0.25").failsafe, AGGREGATION[name])


def contributions(rng: np.random.Generator, count: int) -> list[Contribution]:
    """Returns what devices send that keep different entries and count differently; nobody keeps the last one."""
    masks = (rng.random((count, SIZE)) < 0.7) & (np.arange(SIZE) < SIZE - 1)
    return [
        Contribution(mask, rng.normal(size=mask.sum()).astype(np.float32), rng.uniform(1, 9), rng.uniform(0.1, 1))
        for mask in masks
    ]


def close(one: tuple[Array, Array], other: tuple[Array, Array]) -> bool:
    return all(np.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(one, other, strict=True))


def halves(one: Contribution) -> list[Contribution]:
    """Returns two devices that send the same, each with half the weight."""
    return [replace(one, weight=one.weight / 2)] * 2


@each_aggregator
def test_it_says_what_it_needs(name: str) -> None:
    assert aggregator_of(name).needs in ("sum", "each"), "`needs` must be 'sum' or 'each'"


@each_aggregator
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6))
def test_where_sums_suffice_only_sums_count(name: str, seed: int, count: int) -> None:
    """Neither the order of the devices nor how a weight is spread over those that send the same; nor who sent what of a sum."""
    if aggregator_of(name).needs != "sum":
        return
    rng, aggregator = np.random.Generator(np.random.PCG64(seed)), aggregator_of(name)
    old, sent = rng.normal(size=SIZE).astype(np.float32), contributions(rng, count)
    whole = aggregator.combine(old, sent)
    assert close(whole, aggregator.combine(old, [sent[at] for at in rng.permutation(count)]))
    assert close(whole, aggregator.combine(old, [half for one in sent for half in halves(one)]))
    first = sent[0]
    change = rng.normal(size=first.values.size).astype(
        np.float32
    )  # two halves that are off by as much, one up, one down
    apart = [
        replace(half, values=first.values + sign * change) for half, sign in zip(halves(first), (1, -1), strict=True)
    ]
    assert close(whole, aggregator.combine(old, [*apart, *sent[1:]]))
    assert whole[0][-1] == old[-1]
    assert whole[1][-1] == 0


@each_aggregator
def test_where_each_is_needed_sums_do_not_suffice(name: str) -> None:
    if aggregator_of(name).needs != "each":
        pytest.skip("it needs sums only")
    aggregator, everything = aggregator_of(name), np.ones(1, bool)
    old = np.zeros(1, np.float32)
    sent = [Contribution(everything, np.array([value], np.float32), 1.0, 1.0) for value in (0, 1, 2, 3, 9)]
    whole, _ = aggregator.combine(old, sent)
    assert close((whole, old), (aggregator.combine(old, sent[::-1])[0], old))
    assert not np.allclose(whole, aggregator.combine(old, [*sent[:-1], *halves(sent[-1])])[0], rtol=0.05)


@each_aggregator
@given(seed=st.integers(0, 2**32 - 1))
def test_everybody_agreeing_is_the_result_and_nobody_is_what_was(name: str, seed: int) -> None:
    rng, aggregator = np.random.Generator(np.random.PCG64(seed)), aggregator_of(name)
    old, agreed = rng.normal(size=(2, SIZE)).astype(np.float32)
    masks = rng.random((4, SIZE)) < 0.6
    sent: Sequence[Contribution] = [Contribution(mask, agreed[mask], 1.0 + at, 0.5) for at, mask in enumerate(masks)]
    new, gradient = aggregator.combine(old, sent)
    kept = masks.any(0)
    np.testing.assert_allclose(new, np.where(kept, agreed, old), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.where(kept, (old - agreed) / 0.5, 0), rtol=1e-5, atol=1e-6)
    for same, slope in (aggregator.combine(old, []),):
        np.testing.assert_array_equal(same, old)
        np.testing.assert_array_equal(slope, np.zeros(SIZE))
        assert same.dtype == slope.dtype == old.dtype
