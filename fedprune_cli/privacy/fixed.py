"""Whole numbers in the place of a device's changes, so that sums modulo 2^32 are exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import ConfigError
from fedprune_cli.privacy.settings import Privacy
from fedprune_cli.store.state import Array

WORD = 2**31 - 1  # the largest sum
FEWEST_BITS = 8
SIGMAS = 8  # of a sum's noise that must fit beside the sum: more comes once in 10^15 entries, and would change the sign
LEAST_NOISE = 4.0  # steps of a device's noise from which on a sum of rounded Gaussians cannot be told from a Gaussian


@dataclass(frozen=True)
class FixedPoint:
    """Values in [-largest, largest] as whole numbers of `bits` bits; larger ones are cut there.

    >>> fixed = FixedPoint(largest=1.0, bits=8)
    >>> fixed.whole(np.array([0.5, -3.0, 0.0119])).tolist(), round(fixed.step, 6)
    ([64, -127, 2], 0.007874)
    """

    largest: float
    bits: int

    @property
    def most(self) -> int:
        """The largest whole number."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def step(self) -> float:
        """What one is worth."""
        return self.largest / self.most

    def whole(self, values: Array) -> Array:
        """Returns the nearest whole numbers, int64 [n]."""
        return np.rint(np.clip(values / self.step, -self.most, self.most)).astype(np.int64)

    def towards_zero(self, values: Array) -> Array:
        """Returns the next whole numbers towards zero, int64 [n]: no vector becomes longer by it than it was."""
        return np.trunc(np.clip(values / self.step, -self.most, self.most)).astype(np.int64)


def widest(largest: float, bits: int, total_weight: float) -> FixedPoint:
    """Returns the fixed point of at most so many bits of which values that count `total_weight` in all have sums that fit a word.

    Raises ConfigError below 8 bits.

    >>> widest(1.0, 18, 1438).bits, widest(1.0, 18, 48_000).bits
    (18, 16)
    """
    while (2 ** (bits - 1) - 1) * total_weight > WORD:
        bits -= 1
    if bits < FEWEST_BITS:
        left = f"values that count {total_weight:g} in all leave {bits} bits of 32, the fewest are {FEWEST_BITS}"
        raise ConfigError(f"privacy.secure=true: {left}; let fewer devices take part")
    return FixedPoint(largest, bits)


def point_of(privacy: Privacy, samples: Sequence[int], noise: float | None) -> FixedPoint:
    """Returns the fixed point in which the changes of devices with `samples` D_k have sums that fit a word.

    noise: the standard deviation of the sum's noise over clip, at the least, of which the devices that keep an entry have a share each;
    None where they add none. Raises ConfigError where no fixed point is fine enough for the sum, or for whole numbers to be as good as
    a Gaussian's.
    """
    if privacy.dp != "client" or noise is None or privacy.clip is None:
        return widest(privacy.max_change, privacy.bits, sum(privacy.weight(size) for size in samples))
    count = len(samples)
    point = widest(
        privacy.clip, privacy.bits, count + SIGMAS * noise * math.sqrt(count / (privacy.least - privacy.curious))
    )
    share = point.most * noise / math.sqrt(count)
    if share < LEAST_NOISE:
        why = (
            f"a device's share of the noise is {share:.2g} steps wide, must be at least {LEAST_NOISE:g}; take more bits"
        )
        raise ConfigError(f"privacy.bits={privacy.bits}: {why}")
    return point
