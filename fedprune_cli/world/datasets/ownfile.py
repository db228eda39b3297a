"""Further rows of one's own for a model that was trained on such: read from a file and encoded as the training data were."""

from __future__ import annotations

from collections.abc import Sequence

from fedprune_cli.errors import DataError
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.encoding import Encoding, encode_table, labels_of
from fedprune_cli.world.datasets.sheets import Sheet, read_sheet
from fedprune_cli.world.datasets.windows import encode_windows, window_labels


def read_like(file: str, encoding: Encoding) -> Sheet:
    """Returns the columns of a .csv or .parquet file, with the marks of missing values that the training data had; raises DataError."""
    marks = encoding.get("marks")
    return read_sheet(file, [str(mark) for mark in marks] if isinstance(marks, list) else ())


def encode(rows: Sheet, encoding: Encoding) -> Array:
    """Returns rows as the network's inputs, float32 [N, C, H, W], by an encoding of a dataset's Source.

    Raises DataError naming the row and the column that the encoding does not know.
    """
    if encoding.get("kind") == "table":
        return encode_table(rows, encoding)
    if encoding.get("kind") == "windows":
        return encode_windows(rows, encoding)[0]
    raise DataError(
        f"{rows.file}: the model was not trained on a table or on windows, but on {encoding.get('kind', 'other data')}"
    )


def encoded_labels(rows: Sheet, encoding: Encoding, label_names: Sequence[str]) -> Array | None:
    """Returns the labels of what `encode` returns, int64 [N], -1 where one is missing; None when the file has no column of labels."""
    if encoding.get("kind") == "windows":
        return window_labels(rows, encoding, label_names, encode_windows(rows, encoding)[1])
    return labels_of(rows, encoding, label_names)
