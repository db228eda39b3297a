"""What a run remembers can be told again from its records: one rule for the round and for its audit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import Step, make_setup, steps_of

from fedprune_cli.audit.verify import UNTOLD
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.round.memory import MEMORIES, first_slots, next_slots
from fedprune_cli.round.record import outcome_of_record
from fedprune_cli.store.memory import Sizes
from fedprune_cli.store.record import RoundRecord, parse_record

EVERYTHING = (
    "devices=sampled", "rounds=8", "faults=flaky", "faults.die=0.2", "faults.nan_share=0.25", "faults.stale=0.3", "faults.clock_error=0.3",
    "failsafe.late=defer", "failsafe.safe_ratio=true", "failsafe.quarantine_after=2", "failsafe.quarantine_rounds=2",
    "failsafe.clip_norm=1", "participation.freeze_below=0.2", "participation.freeze_window=1", "training.lr=0.02",
    "participation.rotation=true",
    "weights=pruning_error", "pruner=taylor", "payload.bits=[4,8]", "channel.outage_enter=0.2", "devices.count=6",
)  # fmt: skip


def read_back(record: RoundRecord) -> RoundRecord:
    """Returns the record as an audit reads it."""
    back = parse_record(json.loads(json.dumps(record.as_json())))
    assert back is not None
    return back


def worked(steps: list[Step]) -> list[Step]:
    """Returns the rounds in which somebody trained the shared part: memories learn from no other."""
    return [step for step in steps if not step.record.rested]


STRETCHED = ("deadline.fraction=0.01", "pruner.max_ratio=0.3", "failsafe.safe_ratio=true", "faults.clock_error=0.5")
PRIVATE = (
    "privacy.dp=client", "privacy.epsilon=9", "privacy.delta=1e-3", "privacy.clip=1", "privacy.public_scores=true", "weights=uniform",
)  # fmt: skip
NOBODY = ("allocator.on_infeasible=drop", "deadline.seconds=1e-9")


@pytest.mark.parametrize("options", [(), EVERYTHING, STRETCHED, NOBODY, PRIVATE])
def test_what_a_record_tells_is_what_the_run_learned(options: tuple[str, ...]) -> None:
    setup = make_setup(*options)
    steps = worked(steps_of(setup, setup.experiment.rounds))
    assert steps
    for step in steps:
        told = next_slots(
            setup.experiment, step.before.slots, outcome_of_record(read_back(step.record), step.before.slots)
        )
        for name in step.after.slots.keys() - {*UNTOLD}:
            np.testing.assert_array_equal(
                told[name], step.after.slots[name], err_msg=f"{name}, round {step.record.round}"
            )
            assert told[name].dtype == step.after.slots[name].dtype, name


def test_every_memory_is_among_those_compared_and_each_learns_something() -> None:
    setup = make_setup(*EVERYTHING)
    steps, last = worked(steps_of(setup, 8)), setup.initial
    silent = {name for name in setup.initial.slots if all(_same(step, name) for step in steps)}
    assert silent == set()
    for name, memory in MEMORIES.items():
        if name != "privacy":  # which goes with little of this, and is among those compared by itself
            assert memory(setup.experiment).slots(Sizes(6, 10)), f"{name} remembers nothing in this run"
    assert {*UNTOLD} <= last.slots.keys()


def _same(step: Step, name: str) -> bool:
    return np.array_equal(step.before.slots[name], step.after.slots[name], equal_nan=True)


def test_no_two_memories_share_a_slot() -> None:
    experiment: Experiment = make_setup(*EVERYTHING).experiment
    sizes = Sizes(6, 10)
    names = [name for memory in MEMORIES.values() for name in memory(experiment).slots(sizes)]
    assert sorted(names) == sorted(first_slots(experiment, sizes))
