"""Weights in runs, and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_setup, run_to_end

from fedprune_cli.allocate.weights import WEIGHTS
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.contracts.test_weights import first, learned, weights_of
from fedprune_cli.runs.life import reopen


def test_the_pruning_error_raises_the_weight_of_whom_it_costs_most() -> None:
    weights, samples, ids = weights_of("pruning_error"), np.ones(3), np.arange(3)
    np.testing.assert_allclose(weights.weight(samples, ids, first(weights, 3)), 1 / 3)
    slots = learned(weights, first(weights, 3), ids, np.array([0.5, 0.5, 0.0]), np.array([1.0, 3.0, 0.0]))
    np.testing.assert_allclose(weights.weight(samples, ids, slots), np.array([2, 6, 4]) / 12)  # the third: as the mean
    later = learned(weights, slots, np.array([2]), np.array([0.25]), np.array([0.5]))
    np.testing.assert_allclose(weights.weight(samples, ids, later), np.array([2, 6, 2]) / 10)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "pruning_error")) for name in WEIGHTS]
)
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
