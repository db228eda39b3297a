"""A secure sum that nodes are to make themselves: what they are told before they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedprune_cli.privacy.fixed import FixedPoint
from fedprune_cli.privacy.secure import Terms
from fedprune_cli.store.state import Array

# from what each survivor handed in, uint32 [n_k], to the sum, int64; raises RefusedSumError where it cannot be made
TotalOf = Callable[[Mapping[int, Array]], Array]


@dataclass(frozen=True)
class SumOrder:
    """number: the round, from 0; terms: of all devices that are to send; point: in what their changes are summed.

    levels: of each shared entry, [U]: devices keep the entries in the order of their level, and of one level by index. noise: of the sum,
    its standard deviation over the clip, of which each device adds a share; None: none.
    """

    number: int
    terms: Terms
    point: FixedPoint
    levels: Array
    noise: float | None = None


class Summing(Protocol):
    """An executor whose nodes make secure sums."""

    def agree(self, order: SumOrder) -> TotalOf:
        """Has the devices agree on keys before they train; returns what makes the sum of what they hand in then."""
