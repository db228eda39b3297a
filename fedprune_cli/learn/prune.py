"""Pruners: one ranking of the shared entries or channels a round; a device keeps the first ones, as many as its ratio allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.learn.cost import ModelCost
from fedprune_cli.learn.kept import Channels, Entries, Kept, Whole
from fedprune_cli.learn.structured import Layout
from fedprune_cli.rng import stream
from fedprune_cli.store.memory import Forgetful, Memory, Outcome, Sizes, Slots
from fedprune_cli.store.state import Array, State


class Pruner(Memory, Protocol):
    """A pruner plug-in: a frozen dataclass whose fields are its configuration.

    derivable: a device can compute the ranking itself from what it already has (u, the seed), so no mask is sent.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_ratio(self) -> float: ...

    @property
    def granularity(self) -> str:
        """`weight` drops single entries: a mask, whose saving of computation is modelled. `channel` leaves whole channels out."""

    derivable: ClassVar[bool]

    def importance(self, state: State, seed: int) -> Array:
        """Returns how much each shared entry matters, float [U]."""


@dataclass(frozen=True)
class _Fields:
    """What every pruner is configured by."""

    name: str
    max_ratio: float
    granularity: str

    def __post_init__(self) -> None:
        require(0 <= self.max_ratio <= 1, "max_ratio", self.max_ratio, "in [0, 1]")
        require(self.granularity in ("weight", "channel"), "granularity", self.granularity, "'weight' or 'channel'")


@dataclass(frozen=True)
class Magnitude(_Fields, Forgetful):
    """|u_j|: what is small matters least (model.md, section 2)."""

    derivable: ClassVar[bool] = True

    def importance(self, state: State, seed: int) -> Array:
        return np.abs(state.shared)


@dataclass(frozen=True)
class Taylor(_Fields):
    """|u_j g_j|: the first-order change of the loss when entry j is dropped (model.md, section 2).

    g is the mean gradient that the devices' updates imply (slot `gradient`); an entry without news
    keeps its last g, and has g = 1 before the first.
    The server alone knows g, so it must tell the devices their masks.
    """

    derivable: ClassVar[bool] = False

    def importance(self, state: State, seed: int) -> Array:
        return np.abs(state.shared * state.slots["gradient"])

    def slots(self, sizes: Sizes) -> Slots:
        return {"gradient": np.ones(sizes.shared_params, dtype=np.float32)}

    def next_slots(self, slots: Slots, outcome: Outcome) -> Slots:
        if outcome.gradient is None:  # an audit's: no record holds it
            return {}
        return {"gradient": np.where(outcome.gradient != 0, outcome.gradient, slots["gradient"])}


@dataclass(frozen=True)
class RandomOrder(_Fields, Forgetful):
    """A random order, redrawn each round from stream (seed, "importance", round): the control for any importance."""

    derivable: ClassVar[bool] = True

    def importance(self, state: State, seed: int) -> Array:
        return stream(seed, "importance", state.round).random(state.shared.size)


PRUNERS: dict[str, type[Pruner]] = {"magnitude": Magnitude, "taylor": Taylor, "random": RandomOrder}


@dataclass(frozen=True)
class Masks:
    """The nested masks of a round: m_k keeps the entries with rank < kept[k].

    rank: int64 [U], 0 for the most important entry, ties by index. kept: int64 [K].
    units: for whole channels the rank of each unit, an array a channel group; empty for single entries.

    >>> masks = Masks(rank=np.array([2, 0, 1]), kept=np.array([1, 2]))  # the second entry matters most
    >>> masks[0].tolist(), masks[1].tolist()
    ([False, True, False], [False, True, True])
    """

    rank: Array
    kept: Array
    units: tuple[Array, ...] = ()

    def __getitem__(self, device: int) -> Array:
        """Returns m_k, bool [U]."""
        return self.rank < self.kept[device]

    @property
    def order(self) -> Array:
        """The entry of each rank, int64 [U], ties by index: each device keeps the first ones."""
        return np.argsort(self.rank, kind="stable")

    def levels(self, devices: Array) -> Array:
        """Returns how many of these devices' different cutoffs are at or below each entry's rank, [U]; the same ones keep a level."""
        return _levels(np.unique(self.kept[devices]), self.rank)

    def kept_units(self, device: int) -> tuple[Array, ...]:
        """Returns which units the device keeps, a bool array a channel group."""
        return tuple(rank < self.kept[device] for rank in self.units)

    def kept_by(self, device: int) -> Kept:
        """Returns what the device keeps of the model."""
        mask = self[device]
        if mask.all():
            return Whole()
        return Channels(self.kept_units(device)) if self.units else Entries(np.packbits(mask))

    def dropped_norms(self, shared: Array, devices: Array) -> Array:
        """Returns the pruning errors ||u - u m_k||^2 of the devices [K], float64 [K]; `shared` is u."""
        dropped = [~self[device] for device in devices.tolist()]
        return np.array([np.square(shared[drop], dtype=np.float64).sum() if drop.any() else 0.0 for drop in dropped])

    def costs(self, layout: Layout, cost: ModelCost, devices: Array) -> tuple[list[ModelCost], Array]:
        """Returns for the devices [K] what their models cost, and the fraction [K] of the shared part's computation in it that remains.

        A slice costs what its own FLOPs are. Of a model with dropped entries the fraction that is kept counts, as if the rest were saved.
        """
        cutoffs = self.kept[devices].tolist()
        if not self.units:
            return [cost] * len(cutoffs), self.kept[devices] / max(len(self.rank), 1)
        of_cutoff = {
            cutoff: cost.sliced(layout.kept_params(self.kept_units(device)))
            for device, cutoff in zip(devices.tolist(), cutoffs, strict=True)
        }
        return [of_cutoff[cutoff] for cutoff in cutoffs], np.ones(len(cutoffs))

    def sent(self, device: int) -> Array:
        """Returns the bits that tell a device what it keeps: one an entry, or one a unit."""
        return np.concatenate(self.kept_units(device)) if self.units else self[device]

    def arrays(self) -> Mapping[str, Array]:
        """Returns what tells every device's mask in few bytes, for `masks_of_arrays`; nothing where everybody keeps everything.

        Of a rank only counts how many of the devices' different cutoffs are at or below it.

        >>> masks = Masks(rank=np.array([2, 0, 1, 3]), kept=np.array([1, 3, 3])).arrays()
        >>> masks["kept"].tolist(), masks["rank"].tolist()
        ([1, 2, 2], [1, 0, 1, 2])
        """
        if self.kept.min(initial=len(self.rank)) > self.rank.max(initial=-1):
            return {}
        cutoffs = np.unique(self.kept)
        small = np.min_scalar_type(len(cutoffs) + 1)
        ranks = {f"units/{at}": rank for at, rank in enumerate(self.units)} or {"rank": self.rank}
        coarse = {name: _levels(cutoffs, rank) for name, rank in ranks.items()}
        return {"kept": (np.searchsorted(cutoffs, self.kept) + 1).astype(small), **coarse}


def _levels(cutoffs: Array, rank: Array) -> Array:
    """Returns how many of the cutoffs, ascending, are at or below each rank, in as few bytes as can be."""
    return np.searchsorted(cutoffs, rank, side="right").astype(np.min_scalar_type(len(cutoffs) + 1))


def masks_of_arrays(arrays: Mapping[str, Array], layout: Layout, num_devices: int) -> Masks | None:
    """Returns masks that keep for every device what those did whose `arrays` these are; None for arrays of another model or fleet."""
    size = sum(math.prod(shape) for shape in list(layout.shapes.values())[: layout.num_shared])
    if not arrays:
        return Masks(np.arange(size), np.full(num_devices, size))
    units = tuple(arrays.get(f"units/{at}", np.zeros(0)) for at in range(len(layout.groups)))
    names = {"kept", *(f"units/{at}" for at in range(len(units)))} if units else {"kept", "rank"}
    if arrays.keys() != names or len(arrays["kept"]) != num_devices:
        return None
    if not units:
        return Masks(arrays["rank"], arrays["kept"]) if len(arrays["rank"]) == size else None
    if [len(rank) for rank in units] != [group.units for group in layout.groups]:
        return None
    entries = layout.over_entries(units, np.maximum, 0)[: layout.num_shared]
    return Masks(np.concatenate([entry.ravel() for entry in entries]), arrays["kept"], units)


def build_masks(pruner: Pruner, state: State, prune_ratio: Array, seed: int, layout: Layout) -> Masks:
    """Returns the masks of every device, `prune_ratio` [K] (model.md, section 2).

    Of single entries exactly round((1 - rho_k) U); of channels, the largest slice of which neither the entries nor the
    computation exceed the share 1 - rho_k, and at least the first unit of every channel group.
    """
    size = state.shared.size
    kept = np.rint((1 - prune_ratio) * size).astype(np.int64)
    if (kept == size).all():
        return Masks(np.arange(size), kept)  # nobody drops anything: no order is needed
    importance = pruner.importance(state, seed)
    if layout.slices:
        units, level = layout.levels(importance)
        cutoff = np.searchsorted(np.cumsum(np.bincount(level)), kept, side="right")
        for share in shares_by_level(layout, level):
            cutoff = np.minimum(cutoff, np.searchsorted(share, (1 - prune_ratio) * (1 + 1e-12), side="right"))
        return Masks(level, np.maximum(cutoff, 1), units)
    order = np.argsort(-importance, kind="stable")
    rank = np.empty(size, dtype=np.int64)
    rank[order] = np.arange(size)
    return Masks(rank, kept)


def shares_by_level(layout: Layout, level: Array) -> list[Array]:
    """Returns for each kind of step the share of the shared part's computation up to each level, float64 [levels]."""
    sums = [np.cumsum(np.bincount(level, flops)) for flops in layout.shared_flops.values() if flops.any()]
    return [total / total[-1] for total in sums]


def least_kept(layout: Layout) -> float:
    """Returns the smallest share 1 - rho that a device can be held to: of slices the first unit of every channel group, else nothing."""
    if not layout.slices:
        return 0.0
    _, level = layout.levels(
        np.zeros(sum(math.prod(shape) for shape in list(layout.shapes.values())[: layout.num_shared]))
    )
    return max(float((level == 0).mean()), *(float(share[0]) for share in shares_by_level(layout, level)))
