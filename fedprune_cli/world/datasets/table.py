"""A table of one's own: rows of numbers and categories, from CSV or Parquet."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import DataError, require
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.dataset import Dataset, Source, number_dataset
from fedprune_cli.world.datasets.encoding import MISSING, Reading, count_inputs, encode_table, learn_encoding
from fedprune_cli.world.datasets.levels import classes, coded, first_mixed, held_out
from fedprune_cli.world.datasets.room import check_room
from fedprune_cli.world.datasets.sheets import Sheet, check_column, key_texts, read_sheet
from fedprune_cli.world.tables import shown

MAX_INPUTS = 100_000  # of a row


@dataclass(frozen=True)
class Table:
    """A row of a table is a sample: its columns are numbers or categories, but for those that say what or whose it is."""

    name: str
    file: str
    label: str
    device: str | None
    group: str | None
    split: str | None
    drop: tuple[str, ...]
    categories: tuple[str, ...]
    missing: str
    marks: tuple[str, ...]

    def __post_init__(self) -> None:
        require(self.missing in MISSING, "missing", self.missing, f"one of {', '.join(MISSING)}")

    def load(self) -> Dataset:
        sheet = read_sheet(self.file, self.marks)
        keys = {"label": self.label, "device": self.device, "group": self.group, "split": self.split}
        check_keys(sheet, keys, {"drop": self.drop, "categories": self.categories})
        used = {name for name in keys.values() if name} | {*self.drop}
        columns = tuple(name for name in sheet.header if name not in used)
        check_features(sheet, columns)
        names, labels = classes(f"{self.file}: column {self.label}", key_texts(sheet, self.label))
        source = read_source(sheet, self.device, self.group, self.split)
        train = np.ones(sheet.size, dtype=bool) if source.held_out is None else ~source.held_out
        encoding = learn_encoding(sheet, Reading(columns, self.categories, self.missing), self.label, train)
        width = count_inputs(encoding)
        if width > MAX_INPUTS:
            raise DataError(
                f"{self.file}: a row would become {width} inputs, at most {MAX_INPUTS}; leave columns out: data.drop=[...]"
            )
        check_room(
            f"{self.file}: {sheet.size} rows of {width} inputs",
            16 * sheet.size * width,
            "leave columns out: data.drop=[...]",
        )
        source = dataclasses.replace(source, label_names=names, encoding=encoding)
        dataset = number_dataset(self.name, encode_table(sheet, encoding), labels, len(names), source)
        # the encoding has scaled the numbers already, and what is 0 or 1 stays so: a rare level would become a huge input
        return dataclasses.replace(dataset, mean=(0.0,) * width, std=(1.0,) * width)


def check_keys(sheet: Sheet, keys: dict[str, str | None], lists: dict[str, tuple[str, ...]]) -> None:
    """Raises ConfigError for a key, or a list of columns, that names a column that is not there or that another key names too."""
    of: dict[str, str] = {}
    for key, name in keys.items():
        if name is None:
            continue
        check_column(sheet, f"data.{key}", name)
        if name in of:
            raise DataError(f"{sheet.file}: column {name} cannot be both data.{of[name]} and data.{key}")
        of[name] = key
    for key, names in lists.items():
        for name in names:
            if name or "" not in sheet.header:  # the columns without a name are dropped by an empty one
                check_column(sheet, f"data.{key}", name)
            if name in of:
                raise DataError(f"{sheet.file}: column {name} is data.{of[name]} and cannot be in data.{key}")


def check_features(sheet: Sheet, columns: tuple[str, ...]) -> None:
    """Raises DataError when no columns are left to learn from, or one of them has no name."""
    if not columns:
        raise DataError(f"{sheet.file}: no columns are left to learn from")
    if "" in columns:
        raise DataError(
            f"{sheet.file}: column {sheet.header.index('') + 1} has no name (an index that a program wrote?); leave such columns out: "
            "data.drop=['']"
        )


def read_source(sheet: Sheet, device: str | None, group: str | None, split: str | None) -> Source:
    """Returns whose the rows are, which are near-duplicates and which are for testing, as columns say; raises DataError with the row."""
    owner_names, owner = coded(key_texts(sheet, device)) if device else ((), None)
    groups = coded(key_texts(sheet, group))[1] if group else None
    held = _held(sheet, split) if split else None
    if groups is not None and group:
        for values, what in ((owner, "of more than one device"), (held, "on both sides of the split")):
            if values is not None and (mixed := first_mixed(groups, values)) is not None:
                raise DataError(
                    f"{sheet.where(mixed, group)}: the rows of {group}={shown(sheet.texts(group)[mixed])} are {what}: near-duplicates "
                    "belong together"
                )
    return Source(owner, owner_names, held, groups)


def _held(sheet: Sheet, split: str) -> Array:
    found = held_out(f"{sheet.file}: column {split}", key_texts(sheet, split))
    if isinstance(found, tuple):
        row, text = found
        raise DataError(
            f"{sheet.where(row, split)}: {split}={shown(text)} is not allowed: must be train or test (0 or 1, false or true)"
        )
    return found
