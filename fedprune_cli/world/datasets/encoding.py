"""Rows of a table as a network sees them: an encoding is learnt once, as plain values, and encodes any later rows the same way.

An encoding is {"kind": "table", "label": NAME, "marks": [...], "columns": [...]}. Each column is of one of two kinds:

    {"name": "temp", "kind": "number", "missing": "mean", "mean": 20.5, "std": 3.1}         one input: (x - mean) / std
    {"name": "machine", "kind": "category", "missing": "refuse", "levels": ["A", "B"]}      an input for each level: 1, else 0

missing: `refuse` raises; `mean` makes a number its column's mean and a category none of its levels, which is zeros in both cases;
`indicator` does the same and adds an input that is 1 where the value is missing. One of kind `windows` is described in windows.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np

from fedprune_cli.errors import DataError
from fedprune_cli.store.files import Plain
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.levels import in_order, plain_number
from fedprune_cli.world.datasets.sheets import Sheet, good_numbers, nearest, need_column
from fedprune_cli.world.tables import shown

Encoding: TypeAlias = Mapping[str, Plain]
MISSING = ("refuse", "mean", "indicator")
MAX_LEVELS = 200
LARGEST = 1e15  # of a scaled number: its square does not overflow


@dataclass(frozen=True)
class Reading:
    """How the columns of a table are to be read: their names, those that are categories whatever they look like, what is missing."""

    columns: tuple[str, ...]
    categories: tuple[str, ...]
    missing: str


def learn_encoding(sheet: Sheet, reading: Reading, label: str, learnt_from: Array) -> dict[str, Plain]:
    """Returns the encoding of a table's rows; means are those of the rows `learnt_from`, bool [N].

    Raises DataError for a column of which it cannot be told whether it holds numbers, with too many levels, or with missing values.
    """
    columns: list[Plain] = [_learn(sheet, name, reading, learnt_from) for name in reading.columns]
    return {"kind": "table", "label": label, "marks": [*sheet.marks], "columns": columns}


def _learn(sheet: Sheet, name: str, reading: Reading, learnt_from: Array) -> dict[str, Plain]:
    """Returns a column's encoding: a number where all its values are numbers, a category where half of them or more are not."""
    if name in reading.categories:
        return _learn_category(sheet, name, reading.missing)
    numbers = sheet.numbers(name)
    known = int(np.isfinite(numbers.values).sum())
    if known < numbers.wrong.size:
        return _learn_category(sheet, name, reading.missing)
    other = (
        f", as {known} others of this column are; if its values are categories: data.categories=[{name}]; if this one stands for a "
        "missing value, add it to data.marks"
    )
    values = good_numbers(sheet, name, other)
    absent = ~np.isfinite(values)
    mean, std = _moments(values[learnt_from & ~absent])
    policy = _policy(sheet, name, reading.missing, absent)
    return {"name": name, "kind": "number", "missing": policy, "mean": mean, "std": std}


def _learn_category(sheet: Sheet, name: str, missing: str) -> dict[str, Plain]:
    texts = sheet.texts(name)
    levels = in_order({*texts} - {""})
    if len(levels) > MAX_LEVELS:
        raise DataError(
            f"{sheet.file}: column {name} has {len(levels)} different values as a category, such as {shown(levels[0])}; at most "
            f"{MAX_LEVELS} levels become inputs; leave it out: data.drop=[{name}]"
        )
    policy = _policy(sheet, name, missing, np.array([text == "" for text in texts]))
    return {"name": name, "kind": "category", "missing": policy, "levels": list[Plain](levels)}


def _moments(values: Array) -> tuple[float, float]:
    """Returns mean and standard deviation; 1 where all values are the same, and 0 and 1 where there are none."""
    if not values.size:
        return 0.0, 1.0
    if values.min() == values.max():
        return float(values[0]), 1.0
    return float(values.mean()), float(values.std()) or 1.0


def _policy(sheet: Sheet, name: str, missing: str, absent: Array) -> str:
    """Returns what becomes of a column's missing values; raises DataError when they are refused, or when there is nothing else."""
    if absent.all():
        raise DataError(f"{sheet.file}: column {name} has no values at all; leave it out: data.drop=[{name}]")
    if not absent.any():
        return "mean" if missing == "indicator" else missing  # nothing that the indicator could have been learnt from
    if missing == "refuse":
        raise _missing(sheet, name, absent)
    return missing


def _missing(sheet: Sheet, name: str, absent: Array) -> DataError:
    several = f" ({int(absent.sum())} of the column are)" if absent.sum() > 1 else ""
    return DataError(
        f"{sheet.where(int(np.argmax(absent)), name)}: {name} is missing{several}; data.missing=mean or indicator says what becomes of "
        f"such rows, or data.drop=[{name}]"
    )


def encode_table(sheet: Sheet, encoding: Encoding) -> Array:
    """Returns a sheet's rows as inputs, float32 [N, columns, 1, 1]; raises DataError for a cell that the encoding does not know."""
    inputs = np.zeros((sheet.size, count_inputs(encoding)), dtype=np.float32)
    at = 0
    for column in columns_of(encoding):
        name = str(column["name"])
        need_column(sheet, name)
        at += (_put_number if column["kind"] == "number" else _put_category)(sheet, column, inputs[:, at:])
    return inputs[:, :, None, None]


def columns_of(encoding: Encoding) -> Sequence[dict[str, Plain]]:
    """Returns the columns of a table's encoding."""
    return cast(Sequence[dict[str, Plain]], encoding["columns"])


def count_inputs(encoding: Encoding) -> int:
    """Returns how many inputs a row becomes."""
    return sum(
        (1 if column["kind"] == "number" else len(_levels(column))) + (column["missing"] == "indicator")
        for column in columns_of(encoding)
    )


def _levels(column: Mapping[str, Plain]) -> list[str]:
    return cast(list[str], column["levels"])


def _put_number(sheet: Sheet, column: Mapping[str, Plain], inputs: Array) -> int:
    """Fills a number's inputs [N, ...] in place, in float64 until the last step; returns how many they are."""
    name = str(column["name"])
    values = good_numbers(sheet, name, "")
    absent = ~np.isfinite(values)
    with np.errstate(over="ignore"):
        scaled = (values - cast(float, column["mean"])) / cast(float, column["std"])
    inputs[:, 0] = np.clip(np.where(absent, 0.0, scaled), -LARGEST, LARGEST)
    return 1 + _put_absent(sheet, column, absent, inputs[:, 1:])


def _put_category(sheet: Sheet, column: Mapping[str, Plain], inputs: Array) -> int:
    """Fills a category's inputs [N, ...] in place; returns how many they are."""
    name, levels = str(column["name"]), _levels(column)
    code = {level: at for at, level in enumerate(levels)} | {"": -1}
    texts = sheet.texts(name)
    codes = np.array([code.get(text, -2) for text in texts])
    if (strange := np.flatnonzero(codes == -2)).size:
        row = int(strange[0])
        raise DataError(
            f"{sheet.where(row, name)}: {name}={shown(texts[row])} is none of the levels.{nearest(texts[row], levels)}"
        )
    known = np.flatnonzero(codes >= 0)
    inputs[known, codes[known]] = 1.0
    return len(levels) + _put_absent(sheet, column, codes == -1, inputs[:, len(levels) :])


def _put_absent(sheet: Sheet, column: Mapping[str, Plain], absent: Array, inputs: Array) -> int:
    """Fills the indicator of missing values [N, ...] in place, where the column has one; returns how many inputs it takes."""
    if column["missing"] == "refuse" and absent.any():
        raise DataError(
            f"{sheet.where(int(np.argmax(absent)), str(column['name']))}: {column['name']} is missing, and no row that the model was "
            "trained on lacked it"
        )
    if column["missing"] != "indicator":
        return 0
    inputs[:, 0] = absent
    return 1


def labels_of(sheet: Sheet, encoding: Encoding, label_names: Sequence[str]) -> Array | None:
    """Returns the label of every row as an index into the classes, int64 [N], -1 where it is missing; None without a column of labels.

    Raises DataError for a label that is none of the classes.
    """
    name = str(encoding["label"])
    if name not in sheet.header:
        return None
    code = {label: at for at, label in enumerate(label_names)} | {"": -1}
    texts = sheet.texts(name)
    found = [code.get(text, code.get(plain_number(text), -2)) for text in texts]
    if -2 in found:
        row = found.index(-2)
        raise DataError(
            f"{sheet.where(row, name)}: {name}={shown(texts[row])} is none of the classes.{nearest(texts[row], label_names)}"
        )
    return np.array(found, dtype=np.int64)
