"""The roster of a round: who trains the shared part, who only the personalized one, and who is away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprune_cli.rng import stream
from fedprune_cli.round.setup import Setup
from fedprune_cli.serve.failsafe import quarantined
from fedprune_cli.store.memory import Slots
from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class Roster:
    """Who does what in a round.

    number: of the round, from 0; gain_linear: every device's channel gain, float64 [N]; here: the training devices that are not in
    outage; quarantined: those that the server shuts out; able: those that can train the shared part; training: those of them that are
    drawn to, whom the allocation may still turn away; asked: whom the allocation is made for, which is `training`, or `able` where it may
    not tell who was drawn; frozen: those that train their personalized part only. All ids ascend, int64. block_gain: every device's gain
    in each block relative to its own, float64 [N, blocks], where blocks differ.
    """

    number: int
    gain_linear: Array
    here: Array
    quarantined: Array
    able: Array
    training: Array
    asked: Array
    frozen: Array
    block_gain: Array | None = None


def choose_roster(setup: Setup, number: int, slots: Slots) -> Roster:
    """Returns the roster of round `number`, given what the run remembers in `slots`.

    All devices that can train u do so, or `devices.per_round` drawn of them, or each with probability `participation.rate`. Those cannot
    that are in outage, frozen or in quarantine, or have spent their privacy budget.
    """
    conditions = setup.scenario.at(number)
    here = np.flatnonzero(conditions.available[: setup.scenario.num_devices])
    away = quarantined(slots, number)
    able = np.setdiff1d(here, away)
    if "frozen" in slots:
        able = able[slots["frozen"][able] == 0]
    able = np.setdiff1d(able, spent(setup, slots))
    training = _drawn(setup, number, able)
    asked = able if setup.experiment.secret_draw else training
    frozen = _frozen(setup, here, slots)
    return Roster(number, conditions.gain_linear, here, away, able, training, asked, frozen, conditions.block_gain)


def _drawn(setup: Setup, number: int, able: Array) -> Array:
    """Returns those of the devices in `able` that are drawn in round `number`: all, a fixed number, or each by itself."""
    seed, wanted, rate = setup.experiment.seed, setup.experiment.devices.per_round, setup.experiment.participation.rate
    if rate is not None:
        return able[stream(seed, "takes_part", number).random(setup.scenario.num_devices)[able] < rate]
    if wanted is not None and wanted < len(able):
        return np.sort(stream(seed, "participants", number).choice(able, wanted, replace=False))
    return able


def spent(setup: Setup, slots: Slots) -> Array:
    """Returns the devices whose privacy budget is spent: one more round would be too many."""
    if setup.budget is None:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(slots["privacy_rounds"] >= setup.budget.rounds)


def _frozen(setup: Setup, here: Array, slots: Slots) -> Array:
    """Returns those who no longer train u but have personal steps to take."""
    idle = "frozen" not in slots or not setup.blueprint.cost.personal_params
    if idle or not sum(phase.steps for phase in setup.personal_schedule(0)):
        return np.zeros(0, dtype=np.int64)
    return here[slots["frozen"][here] > 0]
