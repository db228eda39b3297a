"""Memories: what a run knows from one round to the next, each under slots of its own. One class and one entry make another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedprune_cli.config.experiment import Experiment
from fedprune_cli.serve.deliver import UnderWay
from fedprune_cli.store.memory import Memory, Outcome, Sizes, Slots


@dataclass(frozen=True)
class Clock:
    """The simulated time, `simulated_s` []."""

    def slots(self, sizes: Sizes) -> Slots:
        return {"simulated_s": np.array(0.0)}

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        return {"simulated_s": np.array(outcome.simulated_s)}


@dataclass(frozen=True)
class LastRatios:
    """What each device dropped when it last trained the shared part, `prune_ratio` [N]."""

    def slots(self, sizes: Sizes) -> Slots:
        return {"prune_ratio": np.zeros(sizes.num_devices)}

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        ratio = slots["prune_ratio"].copy()
        ratio[outcome.devices] = outcome.prune_ratio
        return {"prune_ratio": ratio}


def _under_way(experiment: Experiment) -> Memory:
    return UnderWay(experiment.faults.delays or experiment.failsafe.policy.defers)


MEMORIES: dict[str, Callable[[Experiment], Memory]] = {
    "clock": lambda experiment: Clock(),
    "ratios": lambda experiment: LastRatios(),
    "pruner": lambda experiment: experiment.pruner,
    "weights": lambda experiment: experiment.weights,
    "participation": lambda experiment: experiment.participation,
    "failsafe": lambda experiment: experiment.failsafe,
    "under_way": _under_way,
    "payload": lambda experiment: experiment.payload,
    "privacy": lambda experiment: experiment.privacy,
}


def first_slots(experiment: Experiment, sizes: Sizes) -> Slots:
    """Returns what all memories of an experiment hold before round 1."""
    return {name: slot for memory in MEMORIES.values() for name, slot in memory(experiment).slots(sizes).items()}


def next_slots(experiment: Experiment, slots: Slots, outcome: Outcome) -> Slots:
    """Returns what they hold after a round, each of what all held before it."""
    learned = (memory(experiment).next_slots(slots, outcome) for memory in MEMORIES.values())
    return {**slots, **{name: slot for new in learned for name, slot in new.items()}}
