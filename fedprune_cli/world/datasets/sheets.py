"""CSV and Parquet files as columns, whose cells are asked for as numbers or as texts; what is not sound is named by row and column.

CSV is read by the strict reader of the project's other tables (world/tables.py), which names the line of a bad row. Parquet, whose types
are its own, is read by pyarrow, an extra: no data frame library stands between.
"""

from __future__ import annotations

import datetime
import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedprune_cli.errors import ConfigError, DataError, FedpruneError
from fedprune_cli.store.files import NUMBER
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.room import check_room
from fedprune_cli.world.tables import count_breaks, csv_header, csv_records, missing_column, shown

if TYPE_CHECKING:
    import pyarrow

MAX_CSV_BYTES = 2**32
LONGEST_LINE = 10**6  # characters
SHORT = 4  # characters of a cell, up to which equal ones are kept once
CSV_FACTOR = 20  # bytes of memory a byte of the file takes at most while its cells are strings; measured
TEXT_BYTES = 64  # of memory a cell takes as a string
MAX_SIZE = 1e30  # of a number: its square does not overflow
MAX_NAMED = 20  # columns of a header that a message lists


@dataclass(frozen=True)
class Numbers:
    """A column read as numbers: values, float64 [N], NaN where one is missing; wrong: the rows that hold something else, int64."""

    values: Array
    wrong: Array


@dataclass(frozen=True)
class Sheet(ABC):
    """A file's columns. header: their names, unlike each other but for empty ones; marks: cells that stand for a missing value."""

    file: str
    header: tuple[str, ...]
    size: int
    marks: tuple[str, ...]

    @abstractmethod
    def where(self, row: int, name: str) -> str:
        """Returns the file and the place of a column's cell in words."""

    @abstractmethod
    def texts(self, name: str) -> list[str]:
        """Returns a column's cells without blanks around them, empty where a value is missing."""

    @abstractmethod
    def numbers(self, name: str) -> Numbers:
        """Returns a column's cells as numbers."""

    @abstractmethod
    def seconds(self, name: str) -> Array:
        """Returns a column of times as seconds, float64 [N], NaN where it is missing; raises DataError for what is no time."""


def read_sheet(file: str, marks: Sequence[str] = ()) -> Sheet:
    """Returns the columns of a .csv or .parquet file; raises DataError, and DeviceError when it does not fit into memory."""
    kind = Path(file).suffix.lower()
    if kind == ".csv":
        return _read_csv(file, tuple(marks))
    if kind == ".parquet":
        return _read_parquet(file, tuple(marks))
    raise DataError(f"{file}: must be a file named .csv or .parquet")


def check_column(sheet: Sheet, key: str, name: str) -> None:
    """Raises ConfigError when the column that a key names is not there, with the nearest name."""
    if not name or name not in sheet.header:
        raise ConfigError(f"{key}={name}: {sheet.file} has no such column.{nearest(name, sheet.header)}")


def nearest(name: str, names: Sequence[str]) -> str:
    """Returns in words which of the names was meant, and what there is."""
    known = [one for one in names if one]
    meant = [f" Did you mean {close!r}?" for close in difflib.get_close_matches(name, known, n=1, cutoff=0.5)]
    there = ", ".join(known[:MAX_NAMED]) + ", ..." * (len(known) > MAX_NAMED)
    return f"{''.join(meant)} It has {there or 'none'}"


def need_column(sheet: Sheet, name: str) -> None:
    """Raises DataError when a file that is to be read like another lacks a column."""
    if name not in sheet.header:
        raise DataError(f"{sheet.file}: {missing_column(name, sheet.header)}")


def key_texts(sheet: Sheet, name: str) -> list[str]:
    """Returns a column of which every row must have a value; raises DataError naming the first that has none."""
    texts = sheet.texts(name)
    if "" in texts:
        raise DataError(f"{sheet.where(texts.index(''), name)}: {name} is missing; every row must have one")
    return texts


def good_numbers(sheet: Sheet, name: str, other: str) -> Array:
    """Returns a column of numbers, float64 [N], NaN where one is missing; DataError naming what is none, `other` saying what else to do."""
    numbers = sheet.numbers(name)
    if numbers.wrong.size:
        row = int(numbers.wrong[0])
        raise DataError(
            f"{sheet.where(row, name)}: {name}={shown(sheet.texts(name)[row])} is not a number"
            f"{' of at most 1e+30 in size' if _is_large(sheet.texts(name)[row]) else ''}{other}"
        )
    return numbers.values


def _is_large(text: str) -> bool:
    return bool(NUMBER.fullmatch(text)) or text.lower().strip("+-") in ("inf", "infinity")


def parse(texts: Sequence[str]) -> Numbers:
    """Returns texts as numbers; an empty one is missing."""
    values, wrong = np.full(len(texts), np.nan), []
    for row, text in enumerate(texts):
        if not text:
            continue
        value = float(text) if NUMBER.fullmatch(text) else math.nan
        if abs(value) <= MAX_SIZE:
            values[row] = value
        else:
            wrong.append(row)
    return Numbers(values, np.array(wrong, dtype=np.int64))


# --- CSV ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CsvSheet(Sheet):
    """lines: on which each row begins [N]."""

    columns: tuple[list[str], ...]
    lines: Sequence[int]

    def where(self, row: int, name: str) -> str:
        at = self.header.index(name)
        return f"{self.file}, line {self.lines[row] + count_breaks(column[row] for column in self.columns[:at])}"

    def texts(self, name: str) -> list[str]:
        found = [cell.strip() for cell in self.columns[self.header.index(name)]]
        return [("" if cell in self.marks else cell) for cell in found] if self.marks else found

    def numbers(self, name: str) -> Numbers:
        return parse(self.texts(name))

    def seconds(self, name: str) -> Array:
        texts = self.texts(name)
        numbers = parse(texts)
        return numbers.values if not numbers.wrong.size else _dates(self, name, texts)


def _dates(sheet: Sheet, name: str, texts: Sequence[str]) -> Array:
    """Returns dates with times, as ISO 8601 writes them, as seconds after the first one; raises DataError."""
    first, seconds = None, np.full(len(texts), np.nan)
    for row, text in enumerate(texts):
        if not text:
            continue
        try:
            moment = datetime.datetime.fromisoformat(text)
            first = first or moment
            seconds[row] = (moment - first).total_seconds()
        except (ValueError, TypeError, OverflowError):  # no date; or one has a time zone and the first has none
            raise DataError(
                f"{sheet.where(row, name)}: {name}={shown(text)} is not a time: must be a number of seconds, or a date and "
                "time such as 2024-05-01T12:00:00.020, all with a time zone or all without"
            ) from None
    return seconds


def _read_csv(file: str, marks: tuple[str, ...]) -> Sheet:
    try:
        size = Path(file).stat().st_size
    except (OSError, ValueError):  # said better by who opens it
        size = 0
    check_room(file, CSV_FACTOR * size, "a Parquet file takes less, or give a part of it")
    records = csv_records(file, MAX_CSV_BYTES, LONGEST_LINE)
    line, header = csv_header(file, records)
    if not any(header):
        raise DataError(f"{file}: is empty: the first line must name the columns")
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise DataError(f"{file}, line {line}: {missing_column('', header)}")
    columns: tuple[list[str], ...] = tuple([] for _ in header)
    lines, seen = [], dict[str, str]()
    for line, cells in records:
        if len(cells) != len(header):
            raise DataError(f"{file}, line {line}: {len(cells)} values for {len(header)} columns")
        lines.append(line)
        for column, cell in zip(columns, cells, strict=True):
            column.append(seen.setdefault(cell, cell) if len(cell) <= SHORT else cell)
    if not lines:
        raise DataError(f"{file}: has no rows")
    kept = [
        at for at, name in enumerate(header) if name or any(map(str.strip, columns[at]))
    ]  # spreadsheets leave empty ones behind
    return _CsvSheet(
        file, tuple(header[at] for at in kept), len(lines), marks, tuple(columns[at] for at in kept), lines
    )


# --- Parquet --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ParquetSheet(Sheet):
    columns: tuple[pyarrow.ChunkedArray, ...]

    def where(self, row: int, name: str) -> str:
        return f"{self.file}, row {row + 1}"

    def texts(self, name: str) -> list[str]:
        from pyarrow import types

        column = self._column(name)
        if types.is_floating(column.type):
            cells = ["" if value != value else f"{value:.17g}" for value in _floats(column)]
        else:
            cells = [(value or "").strip() for value in column.cast("string").to_pylist()]
        return [("" if cell in self.marks else cell) for cell in cells]

    def numbers(self, name: str) -> Numbers:
        from pyarrow import types

        column = self._column(name)
        if not (types.is_integer(column.type) or types.is_floating(column.type) or types.is_decimal(column.type)):
            return parse(self.texts(name))
        values = _floats(column)
        wrong = np.flatnonzero(np.abs(np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=-np.inf)) > MAX_SIZE)
        return Numbers(values, wrong)

    def seconds(self, name: str) -> Array:
        from pyarrow import types

        column = self._column(name)
        if types.is_timestamp(column.type):
            unit = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[column.type.unit]
            whole = column.cast("int64")
            first = next((value for value in whole.to_pylist() if value is not None), 0)
            return np.array([math.nan if value is None else (value - first) * unit for value in whole.to_pylist()])
        numbers = self.numbers(name)
        return numbers.values if not numbers.wrong.size else _dates(self, name, self.texts(name))

    def _column(self, name: str) -> pyarrow.ChunkedArray:
        """Returns a column whose cells are numbers or texts; raises DataError for lists, maps, bytes and the like."""
        from pyarrow import types

        column = self.columns[self.header.index(name)]
        inner = column.type.value_type if types.is_dictionary(column.type) else column.type
        plain = (
            types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_string, types.is_large_string,
            types.is_timestamp, types.is_date, types.is_null,
        )  # fmt: skip
        if not any(is_kind(inner) for is_kind in plain):
            raise DataError(
                f"{self.file}: column {name} holds {inner}, and neither numbers nor texts; drop it: data.drop=[{name}]"
            )
        return column.cast(inner) if types.is_dictionary(column.type) else column


def _floats(column: pyarrow.ChunkedArray) -> Array:
    """Returns a column of numbers as float64, NaN where one is missing."""
    return np.asarray(column.cast("float64", safe=False).to_numpy(), dtype=np.float64)


def _read_parquet(file: str, marks: tuple[str, ...]) -> Sheet:
    path = Path(file)
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"data.file={file}: reading Parquet needs an extra: pip install 'fedprune[tables]'") from None
    try:
        if not path.is_file():
            raise DataError(f"{file}: {'not a plain file' if path.exists() else 'No such file or directory'}")
        with parquet.ParquetFile(path, memory_map=False, page_checksum_verification=True) as opened:
            wide = opened.schema_arrow
            names, rows = tuple(str(name).strip() for name in wide.names), opened.metadata.num_rows
            cell = sum(TEXT_BYTES if one.type in ("string", "large_string") else 8 for one in wide)
            check_room(f"{file}: {rows} rows of {len(names)} columns", 3 * rows * cell, "give a part of it")
            table = opened.read(use_threads=False)
            table.validate(full=True)  # else a text that is no UTF-8 is found only when it is used
    except (FedpruneError, MemoryError):
        raise
    except Exception as error:  # whatever pyarrow makes of a damaged file
        raise DataError(f"{file}: damaged, or not Parquet ({' '.join(str(error).split())[:200]})") from None
    if twice := next((name for at, name in enumerate(names) if name and name in names[:at]), None):
        raise DataError(f"{file}: column {twice} stands there twice")
    if not any(names):
        raise DataError(f"{file}: is empty: it has no columns")
    if not table.num_rows:
        raise DataError(f"{file}: has no rows")
    return _ParquetSheet(file, names, table.num_rows, marks, tuple(table.columns))
