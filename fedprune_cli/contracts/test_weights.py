"""Laws of weightings: weights sum to one and belong to their devices."""

from __future__ import annotations

import numpy as np

from fedprune_cli.allocate.weights import Weights
from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.parts import configured, each, outcome
from fedprune_cli.store.memory import Sizes, Slots
from fedprune_cli.store.state import Array

each_weighting = each("weights")


def weights_of(name: str) -> Weights:
    return build_experiment(configured(f"weights={name}")).weights


def first(weights: Weights, count: int) -> Slots:
    return weights.slots(Sizes(count, 1))


def learned(weights: Weights, slots: Slots, ids: Array, ratio: Array, error: Array) -> Slots:
    return weights.next_slots(slots, outcome(ids, prune_ratio=ratio, pruning_error=error))


def remembered(weights: Weights, count: int, seed: int) -> Slots:
    """What it knows after a round in which every other device was pruned."""
    rng = np.random.Generator(np.random.PCG64(seed))
    ids = np.arange(0, count, 2)
    before, ratio, error = first(weights, count), rng.uniform(0.1, 0.9, len(ids)), rng.uniform(0, 5, len(ids))
    return learned(weights, before, ids, ratio, error)


@each_weighting
def test_weights_sum_to_one_and_follow_their_devices(name: str) -> None:
    weights, samples = weights_of(name), np.array([10.0, 20.0, 30.0, 40.0])
    order = np.array([2, 0, 3, 1])
    for slots in (first(weights, 4), remembered(weights, 4, 0)):
        ids = np.arange(4)
        w = weights.weight(samples, ids, slots)
        assert (w >= 0).all()
        assert np.isclose(w.sum(), 1)
        np.testing.assert_allclose(weights.weight(samples[order], ids[order], slots), w[order])
        np.testing.assert_allclose(weights.weight(1000 * samples, ids, slots), w)
