"""Weights of P1: what a device's kept fraction counts. Each is a frozen dataclass of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedprune_cli.store.state import Array


class Weights(Protocol):
    """A weights plug-in."""

    @property
    def name(self) -> str: ...

    def weight(self, samples: Array, ids: Array, slots: Mapping[str, Array]) -> Array:
        """Returns w [K], summing to 1, of the devices `ids` with `samples` D_k [K]."""

    def slots(self, num_devices: int) -> dict[str, Array]:
        """Returns what it remembers before round 1."""

    def next_slots(self, slots: Mapping[str, Array], ids: Array, prune_ratio: Array, error: Array) -> dict[str, Array]:
        """Returns what it remembers after a round that pruned the devices `ids` [K] with the errors ||u - u m_k||^2 [K]."""


@dataclass(frozen=True)
class _Memoryless:
    """A weighting that remembers nothing."""

    name: str

    def slots(self, num_devices: int) -> dict[str, Array]:
        return {}

    def next_slots(self, slots: Mapping[str, Array], ids: Array, prune_ratio: Array, error: Array) -> dict[str, Array]:
        return {}


@dataclass(frozen=True)
class BySamples(_Memoryless):
    """w_k = D_k / sum(D)."""

    def weight(self, samples: Array, ids: Array, slots: Mapping[str, Array]) -> Array:
        return samples / samples.sum()


@dataclass(frozen=True)
class EqualWeights(_Memoryless):
    """w_k = 1 / K."""

    def weight(self, samples: Array, ids: Array, slots: Mapping[str, Array]) -> Array:
        return np.full(len(ids), 1 / len(ids))


@dataclass(frozen=True)
class ByPruningError:
    """w_k in proportion to D_k ||u - u m_k||^2 / rho_k (model.md, section 6), measured when the device was last pruned.

    A device that never was counts with the mean of the others, and all count by D_k before the first measurement.
    """

    name: str

    def weight(self, samples: Array, ids: Array, slots: Mapping[str, Array]) -> Array:
        cost = slots["error_per_ratio"][ids]
        known = np.isfinite(cost)
        cost = np.where(known, cost, cost[known].mean() if known.any() else 1.0)
        weight = samples * cost
        return weight / weight.sum() if weight.any() else samples / samples.sum()

    def slots(self, num_devices: int) -> dict[str, Array]:
        return {"error_per_ratio": np.full(num_devices, np.nan)}

    def next_slots(self, slots: Mapping[str, Array], ids: Array, prune_ratio: Array, error: Array) -> dict[str, Array]:
        cost, pruned = slots["error_per_ratio"].copy(), prune_ratio > 0
        cost[ids[pruned]] = error[pruned] / prune_ratio[pruned]
        return {"error_per_ratio": cost}


WEIGHTS: dict[str, type[Weights]] = {"samples": BySamples, "uniform": EqualWeights, "pruning_error": ByPruningError}
