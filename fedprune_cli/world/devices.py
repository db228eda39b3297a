"""Fleets: the devices' clocks, powers and places, sampled from ranges or classes, or from a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array
from fedprune_cli.world.fleet import Fleet, PlacedFleet, check_coefficient, check_placed, check_range
from fedprune_cli.world.measured import MeasuredFleet
from fedprune_cli.world.rows import FleetTable


class Devices(Protocol):
    """A fleet plug-in: a frozen dataclass whose fields are its configuration."""

    @property
    def name(self) -> str: ...

    @property
    def per_round(self) -> int | None:
        """Devices that take part per round, None: all that can be reached."""

    @property
    def fresh(self) -> int: ...

    @property
    def energy_coefficient(self) -> float: ...

    def limits(self, size: int) -> dict[str, Array]:
        """Returns the limits of every device as columns of a Fleet [size]."""

    @property
    def num_devices(self) -> int:
        """Devices that train; `fresh` more never do."""

    def draw(self, seed: int) -> Fleet:
        """Returns the training devices and then the fresh ones. Raises DataError for a bad table."""


@dataclass(frozen=True)
class _DrawnFleet(PlacedFleet, ABC):
    """A placed fleet that is only modelled: of what kind a device is decide two uniform draws."""

    energy_coefficient: float

    @abstractmethod
    def kind(self, first: Array, second: Array) -> tuple[Array, Array, Array]:
        """Returns clocks (Hz), cycles per FLOP and powers (W) [N] for two uniform draws in [0, 1) per device."""

    def draw(self, seed: int) -> Fleet:
        # one row of draws per device: more devices change no earlier one
        size = self.count + self.fresh
        first, second, place = stream(seed, "fleet").random((size, 3)).T
        cpu_hz, cycles_per_flop, tx_power_w = self.kind(first, second)
        return Fleet(
            cpu_hz=cpu_hz,
            cycles_per_flop=cycles_per_flop,
            tx_power_w=tx_power_w,
            distance_m=self.distance_m(place),
            energy_coefficient=np.full(size, self.energy_coefficient),
            path_gain_linear=np.full(size, np.nan),
            names=None,
            practice=None,
            **self.limits(size),
        )


@dataclass(frozen=True)
class SampledFleet(_DrawnFleet):
    """Clocks log-uniform, cycles per FLOP uniform, one power for all (model.md, section 5)."""

    min_cpu_hz: float
    max_cpu_hz: float
    min_cycles_per_flop: float
    max_cycles_per_flop: float
    tx_power_w: float

    def __post_init__(self) -> None:
        check_placed(self)
        check_coefficient(self.energy_coefficient)
        check_range(self, "min_cpu_hz", "max_cpu_hz", 1e3, 1e15)
        check_range(self, "min_cycles_per_flop", "max_cycles_per_flop", 1e-6, 1e6)
        require(1e-13 <= self.tx_power_w <= 1e7, "tx_power_w", self.tx_power_w, "in -100..100 dBm")

    def kind(self, first: Array, second: Array) -> tuple[Array, Array, Array]:
        return (
            self.min_cpu_hz * (self.max_cpu_hz / self.min_cpu_hz) ** first,
            self.min_cycles_per_flop + (self.max_cycles_per_flop - self.min_cycles_per_flop) * second,
            np.full(len(first), self.tx_power_w),
        )


@dataclass(frozen=True)
class DeviceClass:
    """One kind of device, and its share of the fleet in any unit."""

    name: str
    share: float
    cpu_hz: float
    cycles_per_flop: float
    tx_power_w: float


@dataclass(frozen=True)
class FleetOfClasses(_DrawnFleet):
    """Every device is of one class, drawn in proportion to the classes' shares."""

    classes: tuple[DeviceClass, ...]

    def __post_init__(self) -> None:
        check_placed(self)
        check_coefficient(self.energy_coefficient)
        require(len(self.classes) >= 1, "classes", self.classes, "at least one class")
        for entry in self.classes:
            for key, least, most in (
                ("share", 1e-9, 1e9),
                ("cpu_hz", 1e3, 1e15),
                ("cycles_per_flop", 1e-6, 1e6),
                ("tx_power_w", 1e-13, 1e7),
            ):
                value = getattr(entry, key)
                allowed = f"classes with {key} in [{least:g}, {most:g}], class {entry.name!r} has {value:g}"
                require(least <= value <= most, "classes", value, allowed)

    def kind(self, first: Array, second: Array) -> tuple[Array, Array, Array]:
        share, cpu_hz, cycles_per_flop, tx_power_w = np.array(
            [(entry.share, entry.cpu_hz, entry.cycles_per_flop, entry.tx_power_w) for entry in self.classes]
        ).T
        edges = np.cumsum(share) / share.sum()
        of = np.searchsorted(edges[:-1], first, side="right")
        return cpu_hz[of], cycles_per_flop[of], tx_power_w[of]


FLEETS: dict[str, type[Devices]] = {
    "sampled": SampledFleet,
    "classes": FleetOfClasses,
    "measured": MeasuredFleet,
    "table": FleetTable,
}
