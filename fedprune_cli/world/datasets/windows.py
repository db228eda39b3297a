"""Time series of one's own, cut into windows.

A run is what can be cut: rows that follow each other, of one device, one recording (`series`), one label and one side of the split, without
a gap in time. Windows of `length` rows begin every `stride` rows of a run. Where they overlap, they are near-duplicates; so a run is first
divided into blocks of rows, windows are cut within a block only, and the windows of a block are one group, which is never divided between
devices nor between training and test. What is lost are the windows that would straddle two blocks.

The encoding is {"kind": "windows", "axes": [...], "length": 100, "stride": 50, "label": NAME, "device": NAME or null, "series": ...,
"time": ..., "rate_hz": ..., "marks": [...]}, by which later series are cut as well; there no window is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from fedprune_cli.errors import DataError, require
from fedprune_cli.store.files import Plain
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.dataset import Dataset, Source, number_dataset
from fedprune_cli.world.datasets.encoding import Encoding, labels_of
from fedprune_cli.world.datasets.levels import classes, coded
from fedprune_cli.world.datasets.room import check_room
from fedprune_cli.world.datasets.sheets import Sheet, good_numbers, key_texts, need_column, read_sheet
from fedprune_cli.world.datasets.table import check_features, check_keys, read_source

MAX_LENGTH = 10**6  # rows of a window
GAP = 1.5  # periods between two rows that are more than this apart
BLOCKS = 5  # of a run, where it has so many windows
MOST_PER_BLOCK = 10  # windows


@dataclass(frozen=True)
class Windows:
    """Windows of time series: a row of the file holds one moment of all axes."""

    name: str
    file: str
    label: str
    device: str | None
    series: str | None
    split: str | None
    time: str | None
    rate_hz: float | None
    length: int
    stride: int
    block: int | None
    drop: tuple[str, ...]
    missing: str
    marks: tuple[str, ...]

    def __post_init__(self) -> None:
        require(2 <= self.length <= MAX_LENGTH, "length", self.length, f"in 2..{MAX_LENGTH}")
        require(1 <= self.stride <= MAX_LENGTH, "stride", self.stride, f"in 1..{MAX_LENGTH}")
        require(
            self.rate_hz is None or 1e-9 <= self.rate_hz <= 1e12, "rate_hz", self.rate_hz, "in [1e-09, 1e+12] or null"
        )
        require(self.block is None or 1 <= self.block <= MAX_LENGTH, "block", self.block, f"in 1..{MAX_LENGTH} or null")
        require(self.missing in ("refuse", "gap"), "missing", self.missing, "one of refuse, gap")

    def load(self) -> Dataset:
        sheet = read_sheet(self.file, self.marks)
        keys = {
            "label": self.label,
            "device": self.device,
            "series": self.series,
            "split": self.split,
            "time": self.time,
        }
        check_keys(sheet, keys, {"drop": self.drop})
        used = {name for name in keys.values() if name} | {*self.drop}
        axes = tuple(name for name in sheet.header if name not in used)
        check_features(sheet, axes)
        where = f"{self.file}: column {self.label}"
        names, labels = classes(where, key_texts(sheet, self.label))
        source = read_source(sheet, self.device, None, self.split)
        values = _axes(sheet, axes, self.missing)
        order, breaks = _ordered(sheet, values, self._encoding(axes), [labels, source.held_out])
        starts, group = _cut(breaks, self.length, self.stride, self.block)
        if not len(starts):
            raise _too_short(self.file, breaks, self.length)
        check_room(
            f"{self.file}: {len(starts)} windows of {len(axes)} axes and {self.length} rows", 12 * len(starts) * len(axes) * self.length,
            "take a longer data.stride",
        )  # fmt: skip
        first = order[starts]
        _check_all_have_windows(self.file, self.label, names, labels[first])
        if self.device and source.owner is not None:
            _check_all_have_windows(self.file, self.device, source.owner_names, source.owner[first])
        known = Source(
            None if source.owner is None else source.owner[first], source.owner_names,
            None if source.held_out is None else source.held_out[first],
            group if self.stride < self.length else None, names, self._encoding(axes),
        )  # fmt: skip
        return number_dataset(self.name, _take(values[order], starts, self.length), labels[first], len(names), known)

    def _encoding(self, axes: Sequence[str]) -> dict[str, Plain]:
        """Returns how later series are to be cut, and which of their columns are the axes."""
        kept = ("length", "stride", "rate_hz", "label", "device", "series", "time")
        return {"kind": "windows", "axes": [*axes], "marks": [*self.marks]} | {key: getattr(self, key) for key in kept}


def encode_windows(sheet: Sheet, encoding: Encoding) -> tuple[Array, Array]:
    """Returns a sheet's series as inputs, float32 [windows, axes, 1, length], and the row on which each begins, int64 [windows].

    They are cut at every change of device, series and label, as far as the sheet has these columns, and at gaps; none is left out for
    overlapping another. Raises DataError.
    """
    axes, length = cast(list[str], encoding["axes"]), cast(int, encoding["length"])
    for name in axes:
        need_column(sheet, name)
    values = _axes(sheet, axes, "refuse")
    known = {
        key: encoding[key] if encoding[key] in sheet.header else None for key in ("device", "series", "time", "label")
    }
    labels = coded(sheet.texts(str(known["label"])))[1] if known["label"] else None
    order, breaks = _ordered(sheet, values, {**encoding, **known}, [labels])
    starts, _ = _cut(breaks, length, cast(int, encoding["stride"]), MAX_LENGTH)
    if not len(starts):
        raise _too_short(sheet.file, breaks, length)
    return _take(values[order], starts, length), order[starts]


def _axes(sheet: Sheet, axes: Sequence[str], missing: str) -> Array:
    """Returns the axes' values, float32 [N, axes], NaN where one is missing; raises DataError for what is no number, or missing."""
    values = np.empty((sheet.size, len(axes)), dtype=np.float32)
    for at, name in enumerate(axes):
        column = good_numbers(
            sheet,
            name,
            f"; every column is an axis of the series unless a key names it; data.drop=[{name}] leaves it out",
        )
        absent = ~np.isfinite(column)
        if absent.any() and missing == "refuse":
            raise DataError(
                f"{sheet.where(int(np.argmax(absent)), name)}: {name} is missing; data.missing=gap cuts windows around such rows, or "
                f"data.drop=[{name}]"
            )
        values[:, at] = column
    return values


def _ordered(sheet: Sheet, values: Array, encoding: Encoding, others: Sequence[Array | None]) -> tuple[Array, Array]:
    """Returns the rows of each series together, in their order, int64 [N], and where runs begin and end there, int64 [runs, 2].

    others: what else ends a run where it changes [N]. Raises DataError for a series whose time goes back or has another rate.
    """
    recordings = [coded(key_texts(sheet, str(encoding[key])))[1] for key in ("device", "series") if encoding[key]]
    order = np.lexsort(recordings[::-1]) if recordings else np.arange(sheet.size)
    new = np.zeros(max(sheet.size - 1, 0), dtype=bool)
    for codes in recordings:
        new |= np.diff(codes[order]) != 0
    if encoding["time"]:
        new |= _gaps(sheet, str(encoding["time"]), cast(float | None, encoding["rate_hz"]), order, new)
    for codes_or_none in others:
        if codes_or_none is not None:
            new |= np.diff(codes_or_none[order].astype(np.int64)) != 0
    absent = ~np.isfinite(values[order]).all(axis=1)
    new |= absent[1:] | absent[:-1]
    edges = np.concatenate([[0], np.flatnonzero(new) + 1, [sheet.size]])
    runs = np.stack([edges[:-1], edges[1:]], axis=1)
    return order, runs[~absent[runs[:, 0]]]


def _gaps(sheet: Sheet, time: str, rate_hz: float | None, order: Array, new: Array) -> Array:
    """Returns whether there is a gap after each row but the last, in order, bool [N-1]; raises DataError."""
    seconds = sheet.seconds(time)
    if (absent := np.flatnonzero(~np.isfinite(seconds))).size:
        raise DataError(f"{sheet.where(int(absent[0]), time)}: {time} is missing; every row must have one")
    steps = np.diff(seconds[order])
    if (back := np.flatnonzero((steps <= 0) & ~new)).size:
        row, before = int(order[back[0] + 1]), int(order[back[0]])
        raise DataError(
            f"{sheet.where(row, time)}: {time}={sheet.texts(time)[row]} is not after {sheet.texts(time)[before]}, the row before it of its "
            "series: rows must stand in the order of time, and recordings be told apart by data.device or data.series"
        )
    inner = steps[~new]
    if not inner.size:
        return np.zeros(len(steps), dtype=bool)
    usual = float(np.median(inner))
    period = usual if rate_hz is None else 1 / rate_hz
    if not 1 / GAP < usual / period < GAP:
        raise DataError(
            f"{sheet.file}: column {time}: rows are {usual:.6g} s apart, which is {1 / usual:.6g} Hz and not data.rate_hz={rate_hz}; times "
            "must be in seconds"
        )
    return steps > GAP * period


def _cut(runs: Array, length: int, stride: int, block: int | None) -> tuple[Array, Array]:
    """Returns where windows begin in the ordered rows, int64 [W], and the block of each [W]."""
    starts, group = list[Array](), list[int]()
    for begin, end in runs:
        count = (end - begin - length) // stride + 1
        if count < 1:
            continue
        per_block = block or int(min(max(count // BLOCKS, 1), MOST_PER_BLOCK))
        rows = length + (min(per_block, count) - 1) * stride  # of a block; the next begins where it ends
        rows = max(rows, per_block * stride) if stride >= length else rows  # where nothing overlaps, nothing is lost
        for at in range(begin, end - length + 1, rows):
            of_block = np.arange(at, min(at + rows, end) - length + 1, stride)
            starts.append(of_block)
            group.append(len(of_block))
    if not starts:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.concatenate(starts), np.repeat(np.arange(len(group)), group)


def _too_short(file: str, runs: Array, length: int) -> DataError:
    longest = int(np.max(runs[:, 1] - runs[:, 0], initial=0))
    return DataError(
        f"{file}: no window: the longest run of one device, series and label without a gap has {longest} rows, a window has {length}"
    )


def _take(values: Array, starts: Array, length: int) -> Array:
    """Returns the windows of ordered values [N, axes] that begin at `starts`, [W, axes, 1, length]."""
    windows = np.lib.stride_tricks.sliding_window_view(values, length, axis=0)  # [N-length+1, axes, length]
    return np.ascontiguousarray(windows[starts])[:, :, None, :]


def _check_all_have_windows(file: str, column: str, names: Sequence[str], codes: Array) -> None:
    """Raises DataError naming the first class or device of which there is no window."""
    if (without := np.flatnonzero(np.bincount(codes, minlength=len(names)) == 0)).size:
        raise DataError(
            f"{file}: {column}={names[int(without[0])]} has no window: none of its runs is as long as data.length; shorten it, or take "
            "these rows out"
        )


def window_labels(sheet: Sheet, encoding: Encoding, label_names: Sequence[str], rows: Array) -> Array | None:
    """Returns the label of the windows that begin on `rows`, int64 [windows], None without a column of labels; raises DataError."""
    labels = labels_of(sheet, encoding, label_names)
    return None if labels is None else labels[rows]
