"""Pruners: one ranking of the shared entries a round; a device keeps the first ones, as many as its ratio allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.rng import stream
from fedprune_cli.state import Array, State


class Pruner(Protocol):
    """A pruner plug-in: a frozen dataclass whose fields are its configuration.

    derivable: a device can compute the ranking itself from what it already has (u, the seed), so no mask is sent.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_ratio(self) -> float: ...

    derivable: ClassVar[bool]

    def importance(self, state: State, seed: int) -> Array:
        """Returns how much each shared entry matters, float [U]."""

    def slots(self, size: int) -> dict[str, Array]:
        """Returns what the pruner remembers before round 1, for `size` shared entries."""

    def next_slots(self, state: State, gradient: Array) -> dict[str, Array]:
        """Returns what it remembers after a round whose updates imply `gradient` [U], 0 where no device kept the entry."""


@dataclass(frozen=True)
class Magnitude:
    """|u_j|: what is small matters least (model.md, section 2)."""

    name: str
    max_ratio: float
    derivable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.max_ratio <= 1, "max_ratio", self.max_ratio, "in [0, 1]")

    def importance(self, state: State, seed: int) -> Array:
        return np.abs(state.shared)

    def slots(self, size: int) -> dict[str, Array]:
        return {}

    def next_slots(self, state: State, gradient: Array) -> dict[str, Array]:
        return {}


@dataclass(frozen=True)
class Taylor(Magnitude):
    """|u_j g_j|: the first-order change of the loss when entry j is dropped (model.md, section 2).

    g is the mean gradient that the devices' updates imply (slot `gradient`); an entry without news
    keeps its last g, and has g = 1 before the first.
    The server alone knows g, so it must tell the devices their masks.
    """

    derivable: ClassVar[bool] = False

    def importance(self, state: State, seed: int) -> Array:
        return np.abs(state.shared * state.slots["gradient"])

    def slots(self, size: int) -> dict[str, Array]:
        return {"gradient": np.ones(size, dtype=np.float32)}

    def next_slots(self, state: State, gradient: Array) -> dict[str, Array]:
        return {"gradient": np.where(gradient != 0, gradient, state.slots["gradient"])}


@dataclass(frozen=True)
class Random(Magnitude):
    """A random order, redrawn each round from stream (seed, "importance", round): the control for any importance."""

    def importance(self, state: State, seed: int) -> Array:
        return stream(seed, "importance", state.round).random(state.shared.size)


PRUNERS: dict[str, type[Pruner]] = {"magnitude": Magnitude, "taylor": Taylor, "random": Random}


@dataclass(frozen=True)
class Masks:
    """The nested masks of a round: m_k keeps the entries with rank < kept[k].

    rank: int64 [U], 0 for the most important entry, ties by index. kept: int64 [K], entries kept by each device.
    """

    rank: Array
    kept: Array

    def __getitem__(self, device: int) -> Array:
        """Returns m_k, bool [U]."""
        return self.rank < self.kept[device]


def build_masks(pruner: Pruner, state: State, prune_ratio: Array, seed: int) -> Masks:
    """Returns masks with exactly round((1 - rho_k) U) entries for every device, `prune_ratio` [K] (model.md, section 2)."""
    size = state.shared.size
    kept = np.rint((1 - prune_ratio) * size).astype(np.int64)
    if (kept == size).all():
        return Masks(np.arange(size), kept)  # nobody drops anything: no order is needed
    order = np.argsort(-pruner.importance(state, seed), kind="stable")
    rank = np.empty(size, dtype=np.int64)
    rank[order] = np.arange(size)
    return Masks(rank, kept)
