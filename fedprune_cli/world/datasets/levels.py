"""Different values of a column in a fixed order: the classes of labels, the names of devices, the levels of a category."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

import numpy as np

from fedprune_cli.errors import DataError
from fedprune_cli.store.files import NUMBER
from fedprune_cli.store.state import Array

MAX_CLASSES = 1000
FEW = 20  # different numbers that are no whole ones may be classes, more are measurements
LONGEST_NUMBER = 30  # characters of a label that is taken for a number


def in_order(names: set[str]) -> tuple[str, ...]:
    """Returns names as a person would order them: numbers by their size, if all are numbers, and else by their characters."""
    if all(NUMBER.fullmatch(name) and math.isfinite(float(name)) for name in names):
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    return tuple(sorted(names))


def coded(texts: Sequence[str]) -> tuple[tuple[str, ...], Array]:
    """Returns the different texts in order, and the index of each text among them, int64 [N]."""
    names = in_order(set(texts))
    code = {name: at for at, name in enumerate(names)}
    return names, np.array([code[text] for text in texts], dtype=np.int64)


def plain_number(text: str) -> str:
    """Returns a number in its plainest spelling, so that 1, 1.0 and 01 are one class."""
    if len(text) > LONGEST_NUMBER or "e" in text.lower() or not NUMBER.fullmatch(text):
        return text
    shortest = Decimal(text).normalize()
    return f"{shortest or abs(shortest):f}"


def classes(where: str, texts: Sequence[str]) -> tuple[tuple[str, ...], Array]:
    """Returns the names of the classes and each sample's, int64 [N]; raises DataError where these cannot be labels.

    where: the file and the column in words.
    """
    different = set(texts)
    numeric = all(NUMBER.fullmatch(text) for text in different)
    names, labels = coded([plain_number(text) for text in texts] if numeric else texts)
    if len(names) < 2:
        raise DataError(f"{where}: every sample has the label {names[0]!r}: two classes are the least")
    if numeric and len(names) > FEW and (broken := next((name for name in names if "." in name), None)):
        raise DataError(
            f"{where}: {len(names)} different numbers such as {broken}: a measurement, and not the class of a sample"
        )
    if len(names) > MAX_CLASSES or (len(names) > FEW and len(names) > len(texts) / 2):
        raise DataError(
            f"{where}: {len(names)} different labels for {len(texts)} samples, such as {names[0][:40]!r}: at most {MAX_CLASSES} classes, "
            "and two samples of each on average"
        )
    return names, labels


HELD_OUT = {
    "train": False,
    "training": False,
    "0": False,
    "false": False,
    "test": True,
    "testing": True,
    "1": True,
    "true": True,
}


def held_out(where: str, texts: Sequence[str]) -> tuple[int, str] | Array:
    """Returns whether each sample is for testing, bool [N], or the first row that does not say so, with its text.

    Raises DataError where all are on one side.
    """
    sides = [HELD_OUT.get(text.lower()) for text in texts]
    if None in sides:
        return sides.index(None), texts[sides.index(None)]
    held = np.array(sides, dtype=bool)
    if held.all() or not held.any():
        raise DataError(
            f"{where}: every sample is for {'testing' if held.all() else 'training'}: there must be some of both"
        )
    return held


def first_mixed(groups: Array, values: Array) -> int | None:
    """Returns the first row whose value differs from that of the first row of its group, None when there is none."""
    _, first, unit = np.unique(groups, return_index=True, return_inverse=True)
    mixed = np.flatnonzero(values[first][unit] != values)
    return int(mixed[0]) if mixed.size else None
