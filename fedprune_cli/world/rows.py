"""A fleet from the rows of a CSV table: clocks and cycles, what was measured besides, and times and rates as others publish them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedprune_cli.errors import ConfigError, DataError, require, unknown
from fedprune_cli.sections import LATER
from fedprune_cli.store.state import Array
from fedprune_cli.world.fleet import EveryFleet, Fleet, check_coefficient, check_every
from fedprune_cli.world.measured import RANGES, SCALED, MeasuredClass, check_classes, figures, most_hz, practice_of
from fedprune_cli.world.tables import Rows, check_order, read_header, read_table, shown

BASIC = {"cpu_ghz": "cpu_hz", "cycles_per_flop": "cycles_per_flop", "tx_power_dbm": "tx_power_w"}
BESIDES = {
    "radio_power_w": "radio_power_w", "radio_circuit_w": "radio_circuit_w", "idle_power_w": "idle_power_w", "step_ms": "step_s",
    "dense_scale": "dense_scale", "depthwise_scale": "depthwise_scale", "recurrent_scale": "recurrent_scale",
}  # fmt: skip
LIMIT_COLUMNS = ("min_bandwidth_mhz", "max_bandwidth_mhz", "energy_budget_j")
TIMES = ("reference_ms", "computation")  # the second is FedScale's name for it
KINDS = ("conv", "dense", "depthwise", "recurrent")
THERMAL_W_PER_HZ = 10 ** (-174 / 10 - 3)
MOST_BITS_PER_S_HZ = 30.0  # beyond what any radio does: the band is not that of the measurement
FIGURES = BASIC | {"energy_coefficient": "energy_coefficient"} | BESIDES
NO_CLASSES = "this configuration has no classes of real devices, as devices=measured and devices=table have"


@dataclass(frozen=True)
class FleetTable(EveryFleet):
    """A fleet from a CSV file with the columns cpu_ghz, cycles_per_flop, tx_power_dbm and either distance_km or gain_db.

    Further columns say what is known besides: energy_coefficient, radio_power_w, radio_circuit_w, idle_power_w, step_ms, dense_scale,
    depthwise_scale and recurrent_scale, as in the classes of devices=measured. A `class` column names one of these classes, whose
    figures then fill what a row leaves empty; with it no other column is needed but the place. default_class: that of rows that name none.

    A column reference_ms (or computation, as FedScale calls it) may take the place of cycles_per_flop: the milliseconds that a device
    takes for the FLOPs reference_flops by kind of layer, weighed by the row's scales. A step of training counts its own FLOPs, which are
    three times those of an inference.
    Ignored: that a small batch, or another model, may use the machine worse. A column communication, in kbit/s, may take the place of
    distance_km and gain_db: it becomes the gain that gives this rate on the band measured_hz under thermal noise of -174 dBm/Hz;
    the channel's fading is on top.

    min_bandwidth_mhz, max_bandwidth_mhz and energy_budget_j may be columns too, and then replace the configuration's and the class's.
    An empty cell of these is no limit. An `id` column names the devices. The last `fresh` rows never train. Other columns are passed over.
    """

    energy_coefficient: float
    file: str
    classes: tuple[MeasuredClass, ...] = ()
    default_class: str | None = field(default=None, metadata=LATER)
    reference_flops: dict[str, float] | None = field(default=None, metadata=LATER)
    measured_hz: float = field(default=20e6, metadata=LATER)

    def __post_init__(self) -> None:
        check_every(self)
        check_coefficient(self.energy_coefficient)
        check_classes(self.classes)
        by_name, chosen, flops = self.by_name, self.default_class, self.reference_flops
        if chosen is not None and chosen not in by_name:
            raise unknown("class of devices", chosen, by_name, key="default_class")
        for kind in flops or ():
            if kind not in KINDS:
                raise unknown("kind of layer", kind, KINDS, key="reference_flops")
        sound = flops is None or (len(flops) > 0 and all(1 <= count <= 1e18 for count in flops.values()))
        require(sound, "reference_flops", flops, "FLOPs in 1..1e18 by kind of layer, such as {conv: 1e9}, or null")
        require(1e3 <= self.measured_hz <= 1e12, "measured_hz", self.measured_hz, "in [1000, 1e+12] (SI units)")

    @property
    def by_name(self) -> dict[str, MeasuredClass]:
        """The classes by their names."""
        return {entry.name: entry for entry in self.classes}

    @property
    def classed(self) -> bool:
        """Whether rows may be of a class, so that the classes decide something. Raises DataError."""
        return self.default_class is not None or "class" in read_header(self.file)

    @property
    def num_devices(self) -> int:
        """Devices that train."""
        return len(self._rows().lines) - self.fresh

    def _rows(self) -> Rows:
        rows = read_rows(self)
        if len(rows.lines) <= self.fresh:
            raise DataError(
                f"{self.file}: {len(rows.lines)} devices, of which devices.fresh={self.fresh} never train: none is left"
            )
        return rows

    def draw(self, seed: int) -> Fleet:
        """Returns the devices in the order of the rows; the seed decides nothing. Raises DataError naming the line of a bad row."""
        rows = self._rows()
        training = len(rows.lines) - self.fresh
        if self.per_round is not None and self.per_round > training:
            raise ConfigError(
                f"devices.per_round={self.per_round}: must be at most {training}, the devices of {self.file} that train"
            )
        return build_fleet(self, rows)


def read_rows(table: FleetTable, columns: tuple[str, ...] = ()) -> Rows:
    """Returns the rows of a table, with further numeric `columns` that it must have; raises DataError, or ConfigError for a time."""
    header = read_header(table.file)
    timed = [name for name in TIMES if name in header]
    if timed and table.reference_flops is None:
        raise ConfigError(
            f"{table.file} has the column {timed[0]}: devices.reference_flops of devices=table must say how many FLOPs take that long"
        )
    placed = [name for name in ("distance_km", "gain_db") if name in header]
    rated = "communication" in header and not placed
    needed = () if table.classed else tuple(name for name in BASIC if not (timed and name == "cycles_per_flop"))
    blank = [name for name in (*FIGURES, *TIMES) if name not in needed]
    return read_table(
        table.file,
        (*columns, *needed),
        either=("communication",) if rated else ("distance_km", "gain_db"),
        optional=(*blank, *LIMIT_COLUMNS),
        blank=blank,
        named=True,
    )


def build_fleet(table: FleetTable, rows: Rows) -> Fleet:
    """Returns the fleet of a table's rows. Raises DataError naming the line of a row that lacks a figure or has one that cannot be."""
    size, of = len(rows.lines), _classes(table, rows)
    known, limits = _figures(table, rows, of), table.limits(size)
    if of is not None:
        most = np.where(of < 0, np.inf, most_hz(table.classes, of))
        limits["max_bandwidth_hz"] = np.maximum(
            np.minimum(limits["max_bandwidth_hz"], most), limits["min_bandwidth_hz"]
        )
    gain = np.full(size, np.nan)
    if "gain_db" in rows:
        gain = 10 ** (rows["gain_db"] / 10)
    elif "communication" in rows:
        gain = _measured_gain(table, rows, known["tx_power_w"])
    return Fleet(
        cpu_hz=known["cpu_hz"],
        cycles_per_flop=known["cycles_per_flop"],
        tx_power_w=known["tx_power_w"],
        distance_m=rows["distance_km"] * 1e3 if "distance_km" in rows else np.full(size, np.nan),
        energy_coefficient=known["energy_coefficient"],
        path_gain_linear=gain,
        names=rows.names,
        practice=practice_of(known) if of is not None or {*BESIDES} & {*rows} else None,
        **_limits(table.file, rows, limits),
    )


def _classes(table: FleetTable, rows: Rows) -> Array | None:
    """Returns which of the table's classes each row is, int [rows], -1 for none; None where no row is any. Raises DataError."""
    places = {entry.name: at for at, entry in enumerate(table.classes)} | {"": -1}
    if table.default_class is not None:
        places[""] = places[table.default_class]
    of = np.full(len(rows.lines), places[""])
    for at, name in enumerate(rows.classes or ()):
        if name not in places:
            why = unknown("class of devices", name, table.by_name) if table.classes else NO_CLASSES
            raise DataError(f"{table.file}, line {rows.lines[at]}: class={shown(name)} is not allowed: {why}")
        of[at] = places[name]
    return None if (of < 0).all() else of


def _figures(table: FleetTable, rows: Rows, of: Array | None) -> dict[str, Array]:
    """Returns each figure of measured.RANGES [rows]: of the row itself, else of its class, else what a modelled device has."""
    size = len(rows.lines)
    modelled = {
        "energy_coefficient": table.energy_coefficient,
        "radio_circuit_w": 0.0,
        "idle_power_w": 0.0,
        "step_s": 0.0,
    }
    modelled |= {f"{kind}_scale": 1.0 for kind in SCALED}
    known = {key: np.full(size, modelled.get(key, np.nan)) for key in RANGES}
    if of is not None:
        classed = figures(table.classes, of, missing=0.0)
        known = {key: np.where(of < 0, values, classed[key]) for key, values in known.items()}
    for column, key in FIGURES.items():
        known[key] = _first_known(_si(column, rows[column]), known[key]) if column in rows else known[key]
    known["radio_power_w"] = _first_known(known["radio_power_w"], known["tx_power_w"])
    if timed := [rows[name] for name in TIMES if name in rows]:
        cycles = known["cpu_hz"] * _first_known(*timed) / 1e3 / _reference(table, known)
        own = rows.get(
            "cycles_per_flop", np.full(size, np.nan)
        )  # counts more than a time, which counts more than a class
        known["cycles_per_flop"] = _first_known(own, cycles, known["cycles_per_flop"])
    for column, key in BASIC.items():
        _refuse(
            table.file, rows, np.isnan(known[key]), f"{column} is not given, and the row names no class that has it"
        )
    least, most = RANGES["cycles_per_flop"]
    cycles = known["cycles_per_flop"]
    _refuse(table.file, rows, (cycles < least) | (cycles > most),
            f"its time makes cycles_per_flop={{}}: must be in [{least:g}, {most:g}]", cycles)  # fmt: skip
    circuit_w = known["radio_circuit_w"]
    _refuse(table.file, rows, circuit_w > known["radio_power_w"],
            "radio_circuit_w={} is not allowed: must be at most radio_power_w, of which it is a part", circuit_w)  # fmt: skip
    return known


def _si(column: str, values: Array) -> Array:
    """Returns a column's values in SI units."""
    if column == "tx_power_dbm":
        return np.asarray(10 ** (values / 10 - 3))
    return values * {"cpu_ghz": 1e9, "step_ms": 1e-3}.get(column, 1.0)


def _first_known(*given: Array) -> Array:
    """Returns of each row the first value that is not NaN."""
    return functools.reduce(lambda known, other: np.where(np.isnan(known), other, known), given)


def _reference(table: FleetTable, known: Mapping[str, Array]) -> Array:
    """Returns the FLOPs that a table's times are of [rows], in those of a convolution on each device."""
    flops = table.reference_flops or {}
    scale = {kind: known[f"{kind}_scale"] for kind in SCALED} | {"conv": np.ones(len(known["cpu_hz"]))}
    return np.sum([scale[kind] * count for kind, count in flops.items()], axis=0)


def _measured_gain(table: FleetTable, rows: Rows, tx_power_w: Array) -> Array:
    """Returns the power gains [rows] at which the rates of `communication` are those of the measured band without fading."""
    efficiency = rows["communication"] * 1e3 / table.measured_hz  # bits/s per Hz
    most_kbps = MOST_BITS_PER_S_HZ * table.measured_hz / 1e3
    _refuse(table.file, rows, efficiency > MOST_BITS_PER_S_HZ,
            f"communication={{}} kbit/s is more than {most_kbps:g}, what devices.measured_mhz={table.measured_hz / 1e6:g} can carry",
            rows["communication"])  # fmt: skip
    return np.asarray(np.expm1(efficiency * math.log(2)) * THERMAL_W_PER_HZ * table.measured_hz / tx_power_w)


def _limits(file: str, rows: Rows, default: Mapping[str, Array]) -> dict[str, Array]:
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


def _refuse(file: str, rows: Rows, bad: Array, why: str, values: Array | None = None) -> None:
    """Raises DataError naming the line of the first bad row [rows], and its value where `why` has a place for it."""
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise DataError(f"{file}, line {rows.lines[at]}: {why if values is None else why.format(f'{values[at]:g}')}")
