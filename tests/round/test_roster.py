"""The roster of a round: who is asked, who only trains its own part, and who is away."""

from __future__ import annotations

import numpy as np
from conftest import make_setup

from fedprune_cli.round.roster import choose_roster


def test_a_roster_ascends_and_holds_as_many_as_are_wanted_of_those_that_can() -> None:
    setup = make_setup(
        "devices.count=12", "devices.per_round=5", "rounds=20", "channel.outage_enter=0.4", "channel.outage_leave=0.4",
        "participation.freeze_below=0.3", "failsafe.quarantine_after=1",
    )  # fmt: skip
    frozen, until = np.arange(12) % 4 == 0, np.where(np.arange(12) % 4 == 1, 9, 0)
    slots = {**setup.initial.slots, "frozen": frozen.astype(np.uint8), "quarantined_until": until}
    drawn = set()
    for number in range(20):
        roster, here = choose_roster(setup, number, slots), setup.scenario.at(number).available[:12]
        able = np.flatnonzero(here & ~frozen & (until <= number))
        for ids in (roster.here, roster.quarantined, roster.training, roster.frozen):
            assert (np.diff(ids) > 0).all()
        np.testing.assert_array_equal(roster.here, np.flatnonzero(here))
        np.testing.assert_array_equal(roster.quarantined, np.flatnonzero(until > number))
        np.testing.assert_array_equal(roster.frozen, np.flatnonzero(here & frozen))
        assert {*roster.training.tolist()} <= {*able.tolist()}
        assert len(roster.training) == min(5, len(able))
        drawn.add(tuple(roster.training.tolist()))
    assert len(drawn) > 10
