"""CSV tables of devices and channels, read strictly and within bounds; what is not sound is named by its line and its column.

Python's csv module reads them: it knows quoting and counts the file's lines. pandas and pyarrow would be a second hundred megabytes to
install, guess types and encodings, and do not say which line a bad value stands on.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedprune_cli.errors import DataError
from fedprune_cli.store.files import NUMBER, read_bytes
from fedprune_cli.store.state import Array

MAX_DEVICES = 10**7
MAX_TABLE_BYTES = 64 * 2**20
MAX_LINE = 10_000
MAX_NAME = 200
MAX_SHOWN = 60  # characters of a bad value in a message
TINY = 1e-30  # the inverse of what is smaller overflows
# What a column may hold: generous, and narrow enough that no later exponent or square overflows. Below -250 dB even the strongest
# sender stays under the thermal noise of 1 Hz.
RANGES = {
    "cpu_ghz": (1e-6, 1e6),
    "cycles_per_flop": (1e-6, 1e6),
    "tx_power_dbm": (-100, 100),
    "distance_km": (1e-3, 1e4),
    "gain_db": (-250, 100),
    "uplink_mbps": (1e-6, 1e6),
    "round": (0, 10**7 - 1),
    "device": (0, MAX_DEVICES - 1),
    "available": (0, 1),
    "samples": (1, 10**12),
    "shared_compute_s": (0, 1e12),
    "payload_bits": (0, 1e18),
    "fixed_s": (0, 1e12),
    "snr_hz": (0, 1e30),
    "gain_n": (0, 1e6),  # of a block, relative to the device's own
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
    "energy_coefficient": (0, 1e-15),
    "radio_power_w": (1e-13, 1e7),
    "radio_circuit_w": (0, 1e7),
    "idle_power_w": (0, 1e7),
    "step_ms": (0, 1e6),
    "dense_scale": (1e-3, 1e3),
    "depthwise_scale": (1e-3, 1e3),
    "recurrent_scale": (1e-3, 1e3),
    "reference_ms": (1e-6, 1e9),
    "computation": (1e-6, 1e9),
    "communication": (1e-3, 1e9),
}
WHOLE = ("round", "device", "available", "samples")
# What an empty cell of a limit stands for: no limit there.
UNLIMITED = {
    "min_bandwidth_mhz": 0.0,
    "min_bandwidth_hz": 0.0,
    "max_bandwidth_mhz": math.inf,
    "max_bandwidth_hz": math.inf,
    "energy_budget_j": math.inf,
}
BREAK = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, eq=False)
class Rows(Mapping[str, Array]):
    """The numeric columns of a table by name, float64 [rows] each.

    lines: the line of the file on which each row begins, int [rows]; names: what the `id` column calls the rows, None without one;
    classes: what the `class` column says that each row is, empty where it says nothing, None without one.
    """

    columns: Mapping[str, Array]
    lines: Array
    names: tuple[str, ...] | None
    classes: tuple[str, ...] | None

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


def read_header(file: str) -> tuple[str, ...]:
    """Returns the names of a table's columns; raises DataError."""
    return csv_header(file, csv_records(file))[1]


def read_table(
    file: str,
    columns: tuple[str, ...],
    *,
    either: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    blank: Collection[str] = (),
    named: bool = False,
) -> Rows:
    """Returns the numeric `columns` of a CSV file, at least one of `either`, and those of `optional` that it has; passes over others.

    blank: columns in which an empty cell is NaN: what it stands for is for the caller to say; a limit's empty cell is no limit.
    named: an `id` column, where there is one, calls each row by a name of its own, and a `class` column says what it is.
    Raises DataError naming the file, the line, the column, the value and what is allowed.
    """
    records = csv_records(file)
    line, header = csv_header(file, records)
    chosen = [name for name in either if name in header]
    missing = [name for name in columns if name not in header]
    if either and not chosen:
        missing.append(" or ".join(either))
    if missing:
        raise DataError(f"{file}, line {line}: {missing_column(missing[0], header)}")
    wanted = (*columns, *chosen, *(name for name in optional if name in header))
    places = [(name, header.index(name)) for name in wanted]
    name_at, class_at = (header.index(name) if named and name in header else None for name in ("id", "class"))
    values: dict[str, list[float]] = {name: [] for name in wanted}
    lines, names, classes = list[int](), dict[str, int](), list[str]()
    for line, cells in records:
        if len(cells) != len(header):
            raise DataError(f"{file}, line {line}: {len(cells)} values for {len(header)} columns")
        for name, at in places:
            try:
                values[name].append(_number(name, cells[at], may_be_empty=name in blank))
            except ValueError as reason:
                raise DataError(f"{file}, line {line + count_breaks(cells[:at])}: {reason}") from None
        if name_at is not None:
            try:
                names[_name(cells[name_at], names)] = line
            except ValueError as reason:
                raise DataError(f"{file}, line {line + count_breaks(cells[:name_at])}: {reason}") from None
        if class_at is not None:
            classes.append(cells[class_at].strip())
        lines.append(line)
    if not lines:
        raise DataError(f"{file}: has no rows")
    arrays = {name: np.array(column) for name, column in values.items()}
    if "min_bandwidth_hz" in arrays and "max_bandwidth_hz" in arrays:
        check_order(file, np.array(lines), arrays["min_bandwidth_hz"], arrays["max_bandwidth_hz"])
    named_as, of_class = None if name_at is None else tuple(names), None if class_at is None else tuple(classes)
    return Rows(arrays, np.array(lines), named_as, of_class)


def check_order(file: str, lines: Array, least_hz: Array, most_hz: Array) -> None:
    """Raises DataError naming the line of the first row whose least bandwidth is more than its most [rows]."""
    if (crossed := np.flatnonzero(least_hz > most_hz)).size:
        at = int(crossed[0])
        raise DataError(
            f"{file}, line {lines[at]}: min_bandwidth={least_hz[at] / 1e6:.9g} MHz is not allowed: "
            f"must be at most the maximum, {most_hz[at] / 1e6:.9g} MHz"
        )


def csv_records(
    file: str, most_bytes: int = MAX_TABLE_BYTES, longest_line: int = MAX_LINE
) -> Iterator[tuple[int, list[str]]]:
    """Yields the line on which each row begins and its cells, blank lines passed over. Raises DataError naming the line."""
    data = read_bytes(Path(file), most_bytes, DataError)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + len(re.findall(rb"\r\n|\r|\n", error.object[: error.start]))
        raise DataError(f"{file}, line {line}: not a CSV text file in UTF-8") from None
    reader = csv.reader(_lines(file, text, longest_line), strict=True, skipinitialspace=True)
    line = 1
    try:
        for cells in reader:
            if any(cells[1:]) or "".join(cells).strip() or len(cells) > 1:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        if "end of data" in str(error):
            raise DataError(f"{file}, line {line}: a quoted value of this row is never closed") from None
        if "expected after" in str(error):
            raise DataError(f"{file}, line {reader.line_num}: a closing quotation mark must end its value") from None
        raise DataError(f"{file}, line {reader.line_num}: not CSV ({error})") from None


def _lines(file: str, text: str, longest: int) -> Iterator[str]:
    """Yields the lines of a text, which end with LF, CR LF or CR and with nothing else that Unicode takes for an end."""
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
        if len(line) > longest:
            raise DataError(f"{file}, line {number}: {len(line)} characters, at most {longest} are read")
        yield line


def csv_header(file: str, records: Iterator[tuple[int, list[str]]]) -> tuple[int, tuple[str, ...]]:
    """Returns the header's line and its names; those of columns without a name, as spreadsheets leave behind, are empty."""
    line, cells = next(records, (1, list[str]()))
    header = tuple(cell.strip() for cell in cells)
    seen = set[str]()
    for at, name in enumerate(header):
        if name in seen:
            raise DataError(f"{file}, line {line + count_breaks(cells[:at])}: column {name} stands there twice")
        seen |= {name} - {""}
    return line, header


def missing_column(name: str, header: tuple[str, ...]) -> str:
    """Returns in words that a header has no column of a name, and why that may be."""
    if len(header) == 1 and (other := re.search(r"[;\t|]", header[0])):
        return f"columns must be separated by ',', not by {other[0]!r}"
    return f"column {name} is missing; the header is {','.join(header) or 'empty'}"


def count_breaks(cells: Iterable[str]) -> int:
    """Returns how many lines below the row's first one the cell after these begins: quoted values may hold ends of lines."""
    return sum(len(BREAK.findall(cell)) for cell in cells)


def _number(name: str, cell: str, *, may_be_empty: bool) -> float:
    """Returns a cell's number, NaN for an empty one that may be; raises ValueError that says what is allowed."""
    text = cell.strip(" \t")
    if not text and (name in UNLIMITED or may_be_empty):
        return UNLIMITED.get(name, math.nan)
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    least, most = RANGES[re.sub(r"^gain_\d+$", "gain_n", name)]
    whole = name in WHOLE
    if least <= value <= most and (not whole or value.is_integer()) and not 0 < abs(value) < TINY:
        return value + 0.0  # never -0.0
    allowed = f"a {'whole number' if whole else 'number'} in [{least:.12g}, {most:.12g}]"
    if 0 < abs(value) < TINY:
        allowed += f", and 0 when it is below {TINY:g}"
    if name in UNLIMITED:
        allowed += ", or empty for no limit"
    elif may_be_empty:
        allowed += ", or empty where it is not known"
    if name in ("gain_db", "uplink_mbps") and value < least:
        allowed += "; a link so weak carries nothing, and a trace says available=0 for it"
    raise ValueError(f"{name}={shown(text)} is not allowed: must be {allowed}")


def _name(cell: str, names: Mapping[str, int]) -> str:
    """Returns a row's name; raises ValueError when it is none, or another row's (names: name -> line)."""
    name = cell.strip()
    if not name or len(name) > MAX_NAME:
        raise ValueError(f"id={shown(name)} is not allowed: must be a name of 1 to {MAX_NAME} characters")
    if name in names:
        raise ValueError(f"id={shown(name)} is not allowed: must be of its own, and is that of line {names[name]} too")
    return name


def shown(text: str) -> str:
    """Returns a value as a message quotes it, cut where it is long."""
    return repr(text) if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]!r}..."
