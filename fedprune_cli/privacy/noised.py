"""What a device does to its change before others see their sum: it is clipped, and has the device's share of the noise."""

from __future__ import annotations

import numpy as np

from fedprune_cli.privacy.fixed import FixedPoint
from fedprune_cli.privacy.keepers import keepers_by_rank
from fedprune_cli.privacy.secure import Terms
from fedprune_cli.rng import Draws
from fedprune_cli.store.state import Array


def clipped(change: Array, bound: float | None) -> Array:
    """Returns the change, shortened to the norm `bound` where it is longer."""
    norm = float(np.linalg.norm(change))
    return change if bound is None or norm <= bound else change * (bound / norm)


def noise_steps(told: Terms, point: FixedPoint, noise: float) -> Array:
    """Returns how wide a device's share of a sum's noise is, in steps of the fixed point, float64 [the most that any keeps].

    The shares of those who are sure to be left have `noise` times the clip together, without those of the curious, who know theirs.
    """
    gone = len(told.devices) - told.threshold
    sure = np.maximum(keepers_by_rank(told.counts) - gone, told.least)
    steps: Array = noise * point.most / np.sqrt(sure - told.curious)  # clip is `most` steps
    return steps


def with_share(point: FixedPoint, change: Array, steps: Array, draws: Draws) -> Array:
    """Returns a clipped change [n_k] as whole numbers with the device's share of the noise, int64 [n_k]."""
    share = draws.standard_normal(len(change), np.float64) * steps[: len(change)]
    noised: Array = point.towards_zero(change) + np.rint(share).astype(np.int64)
    return noised
