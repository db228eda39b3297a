"""Participation: when a device stops training the shared part, because its loss no longer falls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.store.memory import Outcome, Sizes, Slots


@dataclass(frozen=True)
class Participation:
    """When a device stops training the shared part.

    freeze_below: the relative fall of a device's training loss over `freeze_window` of its rounds under which it stops for good; None:
    never. The fall is that of the straight line through its last freeze_window + 1 losses: single losses are noisy.
    """

    freeze_below: float | None
    freeze_window: int

    def __post_init__(self) -> None:
        below = self.freeze_below
        require(below is None or 0 < below < 1, "freeze_below", below, "in (0, 1) or null")
        require(1 <= self.freeze_window <= 1000, "freeze_window", self.freeze_window, "in 1..1000")

    def slots(self, sizes: Sizes) -> Slots:
        """Returns what is remembered before round 1: who is `frozen`, uint8 [N], and each one's last losses, NaN where not known."""
        if self.freeze_below is None:
            return {}
        losses = np.full((sizes.num_devices, self.freeze_window + 1), np.nan)
        return {"frozen": np.zeros(sizes.num_devices, dtype=np.uint8), "recent_loss": losses}

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        """Returns what is remembered after a round, of the losses of those that trained the shared part in it."""
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
