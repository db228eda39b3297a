"""Laws over every registered weighting of devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_setup, outcome, run_to_end

from fedprune_cli.allocate.weights import WEIGHTS, Weights
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.runs.life import reopen
from fedprune_cli.store.memory import Sizes, Slots
from fedprune_cli.store.state import Array

each_weighting = pytest.mark.parametrize("name", WEIGHTS)


def weights_of(name: str) -> Weights:
    return build_experiment(compose_config([f"weights={name}"])).weights


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


def test_the_pruning_error_raises_the_weight_of_whom_it_costs_most() -> None:
    weights, samples, ids = weights_of("pruning_error"), np.ones(3), np.arange(3)
    np.testing.assert_allclose(weights.weight(samples, ids, first(weights, 3)), 1 / 3)
    slots = learned(weights, first(weights, 3), ids, np.array([0.5, 0.5, 0.0]), np.array([1.0, 3.0, 0.0]))
    np.testing.assert_allclose(weights.weight(samples, ids, slots), np.array([2, 6, 4]) / 12)  # the third: as the mean
    later = learned(weights, slots, np.array([2]), np.array([0.25]), np.array([0.5]))
    np.testing.assert_allclose(weights.weight(samples, ids, later), np.array([2, 6, 2]) / 10)


@each_weighting
def test_a_run_follows_its_weights_and_is_verified(name: str, tmp_path: Path) -> None:
    records = run_to_end(tmp_path / "run", f"weights={name}")
    findings = verify_run(reopen(tmp_path / "run"), tmp_path / "run", every=2)
    assert findings.failures == ()
    plain = run_to_end(tmp_path / "plain")
    same = [a["devices"]["prune_ratio"] == b["devices"]["prune_ratio"] for a, b in zip(records, plain, strict=True)]
    if name == "pruning_error":
        assert same[0]
        assert not all(same)  # from the second round on it knows something
    if name == "samples":
        assert all(same)
    assert make_setup(f"weights={name}").experiment.weights.name == name
