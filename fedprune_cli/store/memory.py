"""What outlives a round: memories, and the facts of a finished round that they learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedprune_cli.store.record import FaultLog
from fedprune_cli.store.state import Array

Slots = Mapping[str, Array]


@dataclass(frozen=True)
class Sizes:
    """What a memory is as large as: training devices N, and entries U of the shared part."""

    num_devices: int
    shared_params: int


@dataclass(frozen=True)
class Outcome:
    """The facts of a finished round that memories learn from. An audit builds it again from the round's record.

    number: of the round, from 0; simulated_s: the clock after it; bits, rounding_error: of a value on the uplink, and the mean
    relative square of what rounding changed, None where nothing was rounded; device_bits: int [K] where each device has bits of its own,
    and bits is 0; devices: those that trained the shared part, int [K],
    with their prune_ratio, pruning_error ||u - u m_k||^2 and latency_s, float64 [K], and train_loss; deadline_s: T. eligible: where who
    trained is a secret, those that would have if they had been drawn, int.
    gradient [U] and under_way, the slots of updates that are still travelling, are known to who was there and to no audit: None.
    """

    number: int
    simulated_s: float
    bits: int
    rounding_error: float | None
    devices: Array
    prune_ratio: Array
    pruning_error: Array
    latency_s: Array
    train_loss: Sequence[float | None]
    deadline_s: float
    log: FaultLog
    device_bits: Array | None = None
    gradient: Array | None = None
    under_way: Slots | None = None
    eligible: Array | None = None


class Memory(Protocol):
    """Something that remembers: what it knows stands in `State.slots` under names of its own, and nowhere else."""

    def slots(self, sizes: Sizes) -> Slots:
        """Returns what it remembers before round 1."""

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        """Returns what it remembers after a round, of what all remembered before it."""


class Forgetful:
    """A part that remembers nothing."""

    def slots(self, sizes: Sizes) -> Slots:
        """Returns nothing."""
        return {}

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        """Returns nothing."""
        return {}
