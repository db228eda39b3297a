"""Fleets: the devices' clocks, powers and places, sampled from ranges or classes, or from a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np

from fedprune_cli.errors import ConfigError, DataError, require
from fedprune_cli.rng import stream
from fedprune_cli.store.files import read_bytes
from fedprune_cli.store.state import Array

MAX_DEVICES = 10**7
MAX_TABLE_BYTES = 64 * 2**20
MAX_LINE = 10_000
TINY = 1e-30  # the inverse of what is smaller overflows
# What a column may hold: generous, and narrow enough that no later exponent or square overflows.
RANGES = {
    "cpu_ghz": (1e-6, 1e6),
    "cycles_per_flop": (1e-6, 1e6),
    "tx_power_dbm": (-100, 100),
    "distance_km": (1e-3, 1e4),
    "gain_db": (-400, 100),
    "round": (0, 10**7 - 1),
    "device": (0, MAX_DEVICES - 1),
    "available": (0, 1),
    "samples": (1, 10**12),
    "shared_compute_s": (0, 1e12),
    "payload_bits": (0, 1e18),
    "fixed_s": (0, 1e12),
    "snr_hz": (0, 1e30),
    "weight": (0, 1e12),
    "max_ratio": (0, 1),
    "min_bandwidth_mhz": (0, 1e6),
    "max_bandwidth_mhz": (1e-6, 1e6),
    "energy_budget_j": (0, 1e12),
    "min_bandwidth_hz": (0, 1e12),
    "max_bandwidth_hz": (1, 1e12),
    "shared_energy_j": (0, 1e12),
    "fixed_energy_j": (0, 1e12),
    "tx_power_w": (1e-13, 1e7),
}
LIMIT_COLUMNS = ("min_bandwidth_mhz", "max_bandwidth_mhz", "energy_budget_j")
WHOLE = ("round", "device", "available", "samples")


@dataclass(frozen=True)
class Fleet:
    """The devices, one array entry each [N].

    cpu_hz; cycles_per_flop; tx_power_w; distance_m from the base station; energy_coefficient kappa (a cycle costs kappa f^2 joules);
    path_gain_linear: a fixed large-scale gain that replaces path loss and shadowing, NaN where the channel computes it;
    min_bandwidth_hz, max_bandwidth_hz: what the device may be given, 0 and infinite without a limit; energy_budget_j: of a round's
    computing and sending, infinite without one.
    """

    cpu_hz: Array
    cycles_per_flop: Array
    tx_power_w: Array
    distance_m: Array
    energy_coefficient: Array
    path_gain_linear: Array
    min_bandwidth_hz: Array
    max_bandwidth_hz: Array
    energy_budget_j: Array

    def take(self, index: Array) -> Fleet:
        """Returns some of the devices, in that order."""
        return Fleet(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def limited(self) -> bool:
        """Whether any device has a limit besides its time."""
        unlimited = np.isinf(self.max_bandwidth_hz) & np.isinf(self.energy_budget_j) & (self.min_bandwidth_hz == 0)
        return not bool(unlimited.all())


class Devices(Protocol):
    """A fleet plug-in: a frozen dataclass whose fields are its configuration."""

    @property
    def name(self) -> str: ...

    @property
    def per_round(self) -> int | None:
        """Devices that take part in a round, None: all that can be reached."""

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
class Common:
    """What every fleet says: who takes part, who never trains, what energy costs, and the limits of every device (None: none)."""

    name: str
    per_round: int | None
    fresh: int
    energy_coefficient: float
    min_bandwidth_hz: float
    max_bandwidth_hz: float | None
    energy_budget_j: float | None

    def __post_init__(self) -> None:
        require(self.per_round is None or self.per_round >= 1, "per_round", self.per_round, ">= 1 or null")
        require(0 <= self.fresh <= MAX_DEVICES, "fresh", self.fresh, ">= 0")
        coefficient = self.energy_coefficient
        require(0 <= coefficient < math.inf, "energy_coefficient", coefficient, ">= 0")
        least, most, budget = self.min_bandwidth_hz, self.max_bandwidth_hz, self.energy_budget_j
        require(0 <= least < math.inf, "min_bandwidth_hz", least, ">= 0")
        require(
            most is None or max(least, 1) <= most < math.inf, "max_bandwidth_hz", most, "at least the minimum, or null"
        )
        require(budget is None or 0 < budget < math.inf, "energy_budget_j", budget, "> 0 or null")

    def limits(self, size: int) -> dict[str, Array]:
        """Returns the limits of every device as columns of a Fleet [size]."""
        values = {
            "min_bandwidth_hz": self.min_bandwidth_hz,
            "max_bandwidth_hz": math.inf if self.max_bandwidth_hz is None else self.max_bandwidth_hz,
            "energy_budget_j": math.inf if self.energy_budget_j is None else self.energy_budget_j,
        }
        return {name: np.full(size, value) for name, value in values.items()}


def limit_columns(rows: Mapping[str, Array], default: Mapping[str, Array]) -> dict[str, Array]:
    """Returns a table's own limits as columns of a Fleet, where it has them, else the default."""
    megahertz = {
        name: rows[f"{name}_mhz"] * 1e6 for name in ("min_bandwidth", "max_bandwidth") if f"{name}_mhz" in rows
    }
    own = {f"{name}_hz": values for name, values in megahertz.items()}
    own |= {"energy_budget_j": rows["energy_budget_j"]} if "energy_budget_j" in rows else {}
    return {**default, **own}


def _check_range(config: object, low: str, high: str, least: float, most: float) -> None:
    minimum, maximum = getattr(config, low), getattr(config, high)
    require(least <= minimum <= most, low, minimum, f"in [{least:g}, {most:g}] (SI units)")
    require(minimum <= maximum <= most, high, maximum, f"at least its minimum and at most {most:g} (SI units)")


@dataclass(frozen=True)
class Placed(Common):
    """A fleet of `count` devices and `fresh` more that never train, placed uniformly in a disk with a hole."""

    count: int
    min_distance_m: float
    radius_m: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.count <= MAX_DEVICES, "count", self.count, f"in 1..{MAX_DEVICES}")
        require(
            self.per_round is None or self.per_round <= self.count,
            "per_round",
            self.per_round,
            f"at most count={self.count}",
        )
        _check_range(self, "min_distance_m", "radius_m", 1, 1e7)

    @property
    def num_devices(self) -> int:
        return self.count

    def draw(self, seed: int) -> Fleet:
        # one row of draws a device: more devices change no earlier one
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
            **self.limits(size),
        )

    def kind(self, first: Array, second: Array) -> tuple[Array, Array, Array]:
        """Returns clocks (Hz), cycles per FLOP and powers (W) [N] for two uniform draws in [0, 1) a device."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sampled(Placed):
    """Clocks log-uniform, cycles per FLOP uniform, one power for all (model.md, section 5)."""

    min_cpu_hz: float
    max_cpu_hz: float
    min_cycles_per_flop: float
    max_cycles_per_flop: float
    tx_power_w: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, "min_cpu_hz", "max_cpu_hz", 1e3, 1e15)
        _check_range(self, "min_cycles_per_flop", "max_cycles_per_flop", 1e-6, 1e6)
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
class Classes(Placed):
    """Every device is of one class, drawn in proportion to the classes' shares."""

    classes: tuple[DeviceClass, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
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
class Table(Common):
    """A fleet from a CSV file with the columns cpu_ghz, cycles_per_flop, tx_power_dbm and either distance_km or gain_db.

    min_bandwidth_mhz, max_bandwidth_mhz and energy_budget_j may be columns too, and then replace the configuration's.
    The last `fresh` rows never train. Other columns (an id, a remark) are passed over.
    """

    file: str

    @property
    def num_devices(self) -> int:
        return len(self._rows()["cpu_ghz"]) - self.fresh

    def _rows(self) -> dict[str, Array]:
        rows = read_table(
            self.file, ("cpu_ghz", "cycles_per_flop", "tx_power_dbm"),
            either=("distance_km", "gain_db"), optional=LIMIT_COLUMNS,
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
            **limit_columns(rows, self.limits(size)),
        )


FLEETS: dict[str, type[Devices]] = {"sampled": Sampled, "classes": Classes, "table": Table}


def read_table(
    file: str,
    columns: tuple[str, ...],
    *,
    either: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> dict[str, Array]:
    """Returns the numeric columns of a CSV file as float64 arrays [rows]; at least one of `either`, and those of `optional` that it has.

    Raises DataError naming the file, the line, the column, the value and what is allowed.
    """
    try:
        content = read_bytes(Path(file), MAX_TABLE_BYTES, DataError).decode("utf-8-sig").splitlines()
        if (longest := max(map(len, content), default=0)) > MAX_LINE:
            raise DataError(f"{file}: a line of {longest} characters, at most {MAX_LINE} are read")
        lines = list(csv.reader(content))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a CSV text file ({error})") from None
    header = [name.strip() for name in lines[0]] if lines else []
    chosen = [name for name in either if name in header]
    if missing := [name for name in columns if name not in header] or (
        [] if chosen or not either else [" or ".join(either)]
    ):
        raise DataError(f"{file}, line 1: column {missing[0]} is missing; the header is {','.join(header) or 'empty'}")
    values: dict[str, list[float]] = {
        name: [] for name in (*columns, *chosen, *(name for name in optional if name in header))
    }
    for number, row in enumerate(lines[1:], start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(f"{file}, line {number}: {len(row)} values for {len(header)} columns")
        for name, column in values.items():
            text = row[header.index(name)].strip()
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            least, most = RANGES[name]
            whole = name in WHOLE
            if not least <= value <= most or (whole and value != math.floor(value)) or 0 < abs(value) < TINY:
                kind = "whole number" if whole else "number"
                raise DataError(
                    f"{file}, line {number}: {name}={text!r} is not allowed: must be a {kind} in [{least:.12g}, {most:.12g}]"
                    + (f", and 0 when it is below {TINY:g}" if 0 < abs(value) < TINY else "")
                )
            column.append(value)
    if not values[columns[0]]:
        raise DataError(f"{file}: has no rows")
    return {name: np.array(column) for name, column in values.items()}
