"""A pruner of my own: what lies furthest from the mean of the shared part is kept.

fedprune train --plugin FILE pruner=mine pruner.granularity=channel
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.store.memory import Forgetful
from fedprune_cli.store.state import Array, State


@dataclass(frozen=True)
class Mine(Forgetful):
    """|u_j - mean(u)|: what is ordinary matters least. Forgetful: it remembers nothing from round to round."""

    name: str
    max_ratio: float = 0.9  # no device drops more of u
    granularity: str = "weight"  # weight: single entries; channel: whole filters and neurons
    derivable: ClassVar[bool] = True  # a device can compute the ranking itself from u and the seed: no mask is sent

    def __post_init__(self) -> None:
        require(0 <= self.max_ratio <= 1, "max_ratio", self.max_ratio, "in [0, 1]")
        require(self.granularity in ("weight", "channel"), "granularity", self.granularity, "'weight' or 'channel'")

    def importance(self, state: State, seed: int) -> Array:
        """Returns how much each shared entry matters, float [U]."""
        return np.abs(state.shared - state.shared.mean())


PRUNERS = {"mine": Mine}
