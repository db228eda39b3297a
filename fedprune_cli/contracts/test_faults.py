"""Laws of faults and of late policies: a device's fate is its own, drawn from seed and round, and says what it may say."""

from __future__ import annotations

import dataclasses

import numpy as np

from fedprune_cli.contracts.parts import each, make_experiment
from fedprune_cli.sections import part_of
from fedprune_cli.serve.failsafe import LATE
from fedprune_cli.store.state import Array
from fedprune_cli.world.faults import KINDS, Fates, Fault, Moment

OFTEN = (
    "faults.die=0.3", "faults.lose_enter=0.3", "faults.stale=0.3", "faults.nan_share=0.2", "faults.poisoned_share=0.2",
)  # fmt: skip
ROUNDS, DEVICES = 6, 50
each_fault, each_policy = each("faults"), each("late_policies")


def fault_of(name: str) -> Fault:
    own = name in KINDS.own
    return part_of(make_experiment(*OFTEN, *[] if own else [f"faults.others=[{name}]"]).faults, KINDS[name])


def draw(fault: Fault, number: int, ids: Array) -> Fates:
    none = np.zeros(len(ids), dtype=bool)
    fates = Fates(none, np.ones(len(ids)), none, np.zeros(len(ids), dtype=np.int64), [None] * len(ids))
    return fault.befall(fates, Moment(3, number, ROUNDS, DEVICES, ids))


@each_fault
def test_fates_are_one_for_each_device_and_within_bounds(name: str) -> None:
    fault = fault_of(name)
    for number in range(ROUNDS):
        fates = draw(fault, number, np.arange(DEVICES))
        assert fates.died.shape == fates.lost.shape == fates.work.shape == fates.delay.shape == (DEVICES,)
        assert len(fates.forgers) == DEVICES
        assert fates.died.dtype == fates.lost.dtype == bool, "died and lost must be true or false"
        assert ((fates.work >= 0) & (fates.work <= 1)).all(), "work must be a share in [0, 1]"
        assert (fates.delay >= 0).all(), "a delay is negative"
        assert fault.delays or not fates.delay.any(), (
            "it delays updates and says that it never does: delays must be True"
        )
        assert fault.active or not (fates.died.any() or fates.lost.any() or fates.delay.any() or any(fates.forgers))


@each_fault
def test_who_else_takes_part_changes_no_fate(name: str) -> None:
    fault, some = fault_of(name), np.array([3, 17, 41])
    for number in range(ROUNDS):
        whole, part = draw(fault, number, np.arange(DEVICES)), draw(fault, number, some)
        for field in dataclasses.fields(Fates):
            if field.name != "forgers":
                np.testing.assert_array_equal(getattr(part, field.name), getattr(whole, field.name)[some], field.name)
        assert list(part.forgers) == [whole.forgers[device] for device in some]


@each_fault
def test_a_forgery_is_drawn_the_same_each_time(name: str) -> None:
    values, before = np.linspace(-1, 1, 20, dtype=np.float32), np.zeros(20, np.float32)
    moment = Moment(3, 1, ROUNDS, DEVICES, np.arange(DEVICES))
    for device, forger in enumerate(draw(fault_of(name), 1, moment.ids).forgers):
        if forger is not None:
            sent = [forger.forge(values.copy(), before.copy(), moment, device) for _ in range(2)]
            np.testing.assert_array_equal(sent[0], sent[1])


@each_policy
def test_a_policy_is_about_late_updates_only(name: str) -> None:
    policy = LATE[name]()
    late, delay = np.array([True, False, False, True]), np.array([0, 0, 2, 0])
    rounds, never = policy.decide(late, delay)
    assert rounds.shape == never.shape == late.shape
    assert never.dtype == bool
    assert (rounds[~late] == delay[~late]).all(), "an update that is in time is given another delay"
    assert not never[~late].any(), "an update that is in time is dropped"
    assert (rounds >= 0).all()
    assert policy.defers or not rounds[late & ~never].any(), "it defers updates and says that it never does"
