"""Weights of P1: what a device's kept fraction counts. Each is a frozen dataclass of its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedprune_cli.store.memory import Forgetful, Memory, Outcome, Sizes, Slots
from fedprune_cli.store.state import Array


class Weights(Memory, Protocol):
    """A weights plug-in."""

    @property
    def name(self) -> str: ...

    def weight(self, samples: Array, ids: Array, slots: Slots) -> Array:
        """Returns w [K], summing to 1, of the devices `ids` with `samples` D_k [K]."""


@dataclass(frozen=True)
class BySamples(Forgetful):
    """w_k = D_k / sum(D)."""

    name: str

    def weight(self, samples: Array, ids: Array, slots: Slots) -> Array:
        return samples / samples.sum()


@dataclass(frozen=True)
class EqualWeights(Forgetful):
    """w_k = 1 / K."""

    name: str

    def weight(self, samples: Array, ids: Array, slots: Slots) -> Array:
        return np.full(len(ids), 1 / len(ids))


@dataclass(frozen=True)
class ByPruningError:
    """w_k in proportion to D_k ||u - u m_k||^2 / rho_k (model.md, section 6), measured when the device was last pruned.

    A device that never was counts with the mean of the others, and all count by D_k before the first measurement.
    """

    name: str

    def weight(self, samples: Array, ids: Array, slots: Slots) -> Array:
        cost = slots["error_per_ratio"][ids]
        known = np.isfinite(cost)
        cost = np.where(known, cost, cost[known].mean() if known.any() else 1.0)
        weight = samples * cost
        return weight / weight.sum() if weight.any() else samples / samples.sum()

    def slots(self, sizes: Sizes) -> Slots:
        return {"error_per_ratio": np.full(sizes.num_devices, np.nan)}

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        cost, pruned = slots["error_per_ratio"].copy(), outcome.prune_ratio > 0
        cost[outcome.devices[pruned]] = outcome.pruning_error[pruned] / outcome.prune_ratio[pruned]
        return {"error_per_ratio": cost}


WEIGHTS: dict[str, type[Weights]] = {"samples": BySamples, "uniform": EqualWeights, "pruning_error": ByPruningError}
