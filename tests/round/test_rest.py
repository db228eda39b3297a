"""Rounds at rest: nobody trains the shared part, and the record says why, who is shut out, and what the frozen cost."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_setup, steps_of

from fedprune_cli.learn.prune import build_masks

FREEZE = ("rounds=6", "participation.freeze_below=0.9", "participation.freeze_window=1", "training.lr=0.001")


def test_the_frozen_at_rest_are_all_that_a_round_costs() -> None:
    setup = make_setup(*FREEZE)
    resting = [step for step in steps_of(setup, 6) if step.record.status == "frozen"]
    assert resting
    for step in resting:
        record, rows, state = step.record, step.record.devices, step.before
        assert rows.id == [0, 1, 2, 3]
        masks = build_masks(setup.experiment.pruner, state, state.slots["prune_ratio"], 0, setup.blueprint.layout)
        dropped = [float(np.square(state.shared[~masks[device]].astype(float)).sum()) for device in rows.id]
        assert max(dropped) > 0
        np.testing.assert_allclose(rows.pruning_error, dropped)
        assert record.latency_s == record.dense_latency_s == record.equal_dense_latency_s == max(rows.latency_s)
        assert record.joules == pytest.approx(sum(rows.joules))
        assert (record.bytes_up, record.bytes_down) == (0, 4 * setup.blueprint.cost.shared_params)
        assert float(step.after.slots["simulated_s"]) == float(state.slots["simulated_s"]) + record.latency_s
        same = step.after.slots.keys() - {"simulated_s"}
        assert all(np.array_equal(step.after.slots[name], state.slots[name], equal_nan=True) for name in same)
        for device in rows.id:
            assert (step.after.personal[device] != state.personal[device]).any()


def test_a_round_with_everybody_shut_out_says_who() -> None:
    setup = make_setup("faults.nan_share=1", "failsafe.quarantine_after=1", "failsafe.quarantine_rounds=1")
    first, second, third = steps_of(setup, 3)
    assert first.record.faults is not None
    assert first.record.faults.refused == [0, 1, 2, 3]
    assert second.record.status == "idle"
    assert "in quarantine" in second.record.message
    assert second.record.faults is not None
    assert second.record.faults.quarantined == [0, 1, 2, 3]
    assert second.record.devices.id == ()
    np.testing.assert_array_equal(second.after.shared, second.before.shared)
    assert third.record.status != "idle"
