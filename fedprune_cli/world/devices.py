"""Fleets: the devices' clocks, powers and places, sampled from ranges or classes, or from a table."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedprune_cli.errors import ConfigError, DataError, require
from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array
from fedprune_cli.world.fleet import LIMIT_COLUMNS, Fleet, check_range
from fedprune_cli.world.measured import MeasuredFleet
from fedprune_cli.world.tables import MAX_DEVICES, Rows, check_order, read_table


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
class _EveryFleet:
    """What every fleet says: who takes part, who never trains, what energy costs, and the limits of every device (None: none)."""

    name: str
    per_round: int | None
    fresh: int
    energy_coefficient: float
    min_bandwidth_hz: float
    max_bandwidth_hz: float | None
    energy_budget_j: float | None

    def limits(self, size: int) -> dict[str, Array]:
        """Returns the limits of every device as columns of a Fleet [size]."""
        values = {
            "min_bandwidth_hz": self.min_bandwidth_hz,
            "max_bandwidth_hz": math.inf if self.max_bandwidth_hz is None else self.max_bandwidth_hz,
            "energy_budget_j": math.inf if self.energy_budget_j is None else self.energy_budget_j,
        }
        return {name: np.full(size, value) for name, value in values.items()}


def _check_every(fleet: _EveryFleet) -> None:
    require(fleet.per_round is None or fleet.per_round >= 1, "per_round", fleet.per_round, ">= 1 or null")
    require(0 <= fleet.fresh <= MAX_DEVICES, "fresh", fleet.fresh, ">= 0")
    coefficient = fleet.energy_coefficient
    require(0 <= coefficient < math.inf, "energy_coefficient", coefficient, ">= 0")
    least, most, budget = fleet.min_bandwidth_hz, fleet.max_bandwidth_hz, fleet.energy_budget_j
    require(0 <= least < math.inf, "min_bandwidth_hz", least, ">= 0")
    allowed = "at least the minimum, or null"
    require(most is None or max(least, 1) <= most < math.inf, "max_bandwidth_hz", most, allowed)
    require(budget is None or 0 < budget < math.inf, "energy_budget_j", budget, "> 0 or null")


def limit_columns(file: str, rows: Rows, default: Mapping[str, Array]) -> dict[str, Array]:
    """Returns a table's own limits as columns of a Fleet, where it has them, else the default.

    Raises DataError naming the line on which the least bandwidth is more than the most.
    """
    limits = dict(default)
    for name in ("min_bandwidth", "max_bandwidth"):
        if f"{name}_mhz" in rows:
            limits[f"{name}_hz"] = rows[f"{name}_mhz"] * 1e6
    if "energy_budget_j" in rows:
        limits["energy_budget_j"] = rows["energy_budget_j"]
    check_order(file, rows.lines, limits["min_bandwidth_hz"], limits["max_bandwidth_hz"])
    return limits


@dataclass(frozen=True)
class _DrawnFleet(_EveryFleet, ABC):
    """A fleet of `count` devices and `fresh` more that never train, placed uniformly in a disk with a hole."""

    count: int
    min_distance_m: float
    radius_m: float

    @abstractmethod
    def kind(self, first: Array, second: Array) -> tuple[Array, Array, Array]:
        """Returns clocks (Hz), cycles per FLOP and powers (W) [N] for two uniform draws in [0, 1) per device."""

    @property
    def num_devices(self) -> int:
        return self.count

    def draw(self, seed: int) -> Fleet:
        # one row of draws per device: more devices change no earlier one
        size = self.count + self.fresh
        first, second, place = stream(seed, "fleet").random((size, 3)).T
        cpu_hz, cycles_per_flop, tx_power_w = self.kind(first, second)
        return Fleet(
            cpu_hz=cpu_hz,
            cycles_per_flop=cycles_per_flop,
            tx_power_w=tx_power_w,
            distance_m=np.sqrt(self.min_distance_m**2 + (self.radius_m**2 - self.min_distance_m**2) * place),
            energy_coefficient=np.full(size, self.energy_coefficient),
            path_gain_linear=np.full(size, np.nan),
            names=None,
            practice=None,
            **self.limits(size),
        )


def _check_drawn(fleet: _DrawnFleet) -> None:
    _check_every(fleet)
    require(1 <= fleet.count <= MAX_DEVICES, "count", fleet.count, f"in 1..{MAX_DEVICES}")
    chosen = fleet.per_round
    require(chosen is None or chosen <= fleet.count, "per_round", chosen, f"at most count={fleet.count}")
    check_range(fleet, "min_distance_m", "radius_m", 1, 1e7)


@dataclass(frozen=True)
class SampledFleet(_DrawnFleet):
    """Clocks log-uniform, cycles per FLOP uniform, one power for all (model.md, section 5)."""

    min_cpu_hz: float
    max_cpu_hz: float
    min_cycles_per_flop: float
    max_cycles_per_flop: float
    tx_power_w: float

    def __post_init__(self) -> None:
        _check_drawn(self)
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
        _check_drawn(self)
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


@dataclass(frozen=True)
class FleetTable(_EveryFleet):
    """A fleet from a CSV file with the columns cpu_ghz, cycles_per_flop, tx_power_dbm and either distance_km or gain_db.

    min_bandwidth_mhz, max_bandwidth_mhz and energy_budget_j may be columns too, and then replace the configuration's.
    An empty cell of these is no limit. An `id` column names the devices. The last `fresh` rows never train. Other columns are passed over.
    """

    file: str

    def __post_init__(self) -> None:
        _check_every(self)

    @property
    def num_devices(self) -> int:
        return len(self._rows()["cpu_ghz"]) - self.fresh

    def _rows(self) -> Rows:
        rows = read_table(
            self.file, ("cpu_ghz", "cycles_per_flop", "tx_power_dbm"),
            either=("distance_km", "gain_db"), optional=LIMIT_COLUMNS, named=True,
        )  # fmt: skip
        if len(rows["cpu_ghz"]) <= self.fresh:
            raise DataError(
                f"{self.file}: {len(rows['cpu_ghz'])} devices, of which devices.fresh={self.fresh} never train: none is left"
            )
        return rows

    def draw(self, seed: int) -> Fleet:
        rows = self._rows()
        size = len(rows["cpu_ghz"])
        if self.per_round is not None and self.per_round > size - self.fresh:
            raise ConfigError(
                f"devices.per_round={self.per_round}: must be at most {size - self.fresh}, "
                f"the devices of {self.file} that train"
            )
        unknown = np.full(size, np.nan)
        return Fleet(
            cpu_hz=rows["cpu_ghz"] * 1e9,
            cycles_per_flop=rows["cycles_per_flop"],
            tx_power_w=10 ** (rows["tx_power_dbm"] / 10 - 3),
            distance_m=rows["distance_km"] * 1e3 if "distance_km" in rows else unknown,
            energy_coefficient=np.full(size, self.energy_coefficient),
            path_gain_linear=10 ** (rows["gain_db"] / 10) if "gain_db" in rows else unknown,
            names=rows.names,
            practice=None,
            **limit_columns(self.file, rows, self.limits(size)),
        )


FLEETS: dict[str, type[Devices]] = {
    "sampled": SampledFleet,
    "classes": FleetOfClasses,
    "measured": MeasuredFleet,
    "table": FleetTable,
}
