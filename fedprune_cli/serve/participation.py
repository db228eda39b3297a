"""Participation: when a device stops training the shared part, because its loss no longer falls, whose turn it is, and who is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.sections import LATER
from fedprune_cli.store.memory import Outcome, Sizes, Slots
from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class Participation:
    """When a device stops training the shared part, who comes first where not all can take part, and how those are drawn that do.

    freeze_below: the relative fall of a device's training loss over `freeze_window` of its rounds under which it stops for good; None:
    never. The fall is that of the straight line through its last freeze_window + 1 losses: single losses are noisy.
    rotation: of a round in which the allocator must drop devices, those stay that took no part for longest; else the cheapest stay.
    rate: the probability with which each device takes part in a round, whatever the others do (Poisson sampling); None: as
    `devices.per_round` says.
    """

    freeze_below: float | None
    freeze_window: int
    rotation: bool = field(default=False, metadata=LATER)
    rate: float | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        below = self.freeze_below
        require(below is None or 0 < below < 1, "freeze_below", below, "in (0, 1) or null")
        require(1 <= self.freeze_window <= 1000, "freeze_window", self.freeze_window, "in 1..1000")
        require(self.rate is None or 0 < self.rate <= 1, "rate", self.rate, "in (0, 1] or null")

    def slots(self, sizes: Sizes) -> Slots:
        """Returns what is remembered before round 1: who is `frozen`, uint8 [N], and each one's last losses, NaN where not known;

        and the rounds for which each device has `waited`, int64 [N], where they take turns.
        """
        slots: dict[str, Array] = {}
        if self.freeze_below is not None:
            losses = np.full((sizes.num_devices, self.freeze_window + 1), np.nan)
            slots |= {"frozen": np.zeros(sizes.num_devices, dtype=np.uint8), "recent_loss": losses}
        return slots | ({"waited": np.zeros(sizes.num_devices, dtype=np.int64)} if self.rotation else {})

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        """Returns what is remembered after a round, of those that trained the shared part in it and their losses."""
        return {**self._next_frozen(slots, outcome), **self._next_waited(slots, outcome)}

    def _next_waited(self, slots: Slots, outcome: Outcome) -> Slots:
        if not self.rotation:
            return {}
        waited = slots["waited"] + 1
        waited[outcome.devices] = 0
        return {"waited": waited}

    def _next_frozen(self, slots: Slots, outcome: Outcome) -> Slots:
        if self.freeze_below is None:
            return {}
        ids, losses = outcome.devices, np.array(outcome.train_loss, dtype=float)
        frozen, recent = slots["frozen"].copy(), slots["recent_loss"].copy()
        recent[ids] = np.column_stack([recent[ids, 1:], losses])
        time = np.arange(self.freeze_window + 1) - self.freeze_window / 2
        fall = -(recent[ids] * time).sum(1) * self.freeze_window / np.square(time).sum()
        first = recent[ids].mean(1) + fall / 2  # where the line begins
        frozen[ids] = fall <= self.freeze_below * first  # False for NaN
        return {"frozen": frozen, "recent_loss": recent}
