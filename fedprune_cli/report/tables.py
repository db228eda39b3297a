"""A run's records as plain tables: a row a round, and a row a device and round; for CSV, Parquet and data frames."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import fields

from fedprune_cli.errors import ConfigError
from fedprune_cli.report.read import Run
from fedprune_cli.store.record import DeviceRows, RoundRecord

Rows = tuple[list[str], list[list[object]]]  # the header, and rows of as many cells

# What the log of a round names, and what became of it.
FAULT_TITLES = {
    "died": "died in mid-round: nothing arrived",
    "lost": "lost on the radio",
    "delayed": "sent, to arrive in a later round",
    "poisoned": "sent poison (the server cannot see it)",
    "late": "late: after the deadline",
    "refused": "refused: not finite, or of a wrong size",
    "stale": "stale: from an earlier round, taken with less weight",
    "expired": "expired: too old, or from a device in quarantine",
    "clipped": "clipped: shortened to clip_norm median norms",
    "outliers": "outliers: beyond outlier_norm median norms",
    "safe": "planned with more time than estimated",
    "quarantined": "in quarantine, taking no part",
}


def fault_counts(records: Sequence[RoundRecord], kinds: Sequence[str]) -> list[int]:
    """Returns for each kind how many device-rounds the logs name."""
    return [sum(len(record.faults.of(kind)) for record in records if record.faults) for kind in kinds]


def round_table(run: Run) -> Rows:
    """Returns the figures of each round as a whole, and of each kind of fault that was logged how many devices it befell."""
    plain = list(run.rounds[0].figures())
    kinds = [kind for kind in FAULT_TITLES if any(record.faults for record in run.rounds)]
    rounds: list[list[object]] = [
        [*map(record.figures().get, plain), *fault_counts([record], kinds)] for record in run.rounds
    ]
    return [*plain, *kinds], rounds


def device_table(run: Run) -> Rows:
    """Returns the figures of each device in each round that it trained in, with its name where devices have names."""
    chosen = {key for record in run.rounds for key in record.devices.columns()}
    keys = [key.name for key in fields(DeviceRows) if key.name in chosen]
    names = ["name"] if "device_names" in run.manifest else []
    rows: list[list[object]] = []
    for record in run.rounds:
        columns = [getattr(record.devices, key) or [None] * len(record.devices.id) for key in keys]
        called = [[run.called(device) for device in record.devices.id] for _ in names]
        rows += [[record.round, *map(cell, row)] for row in zip(*called, *columns, strict=True)]
    return ["round", *names, *keys], rows


def cell(value: object) -> object:
    """Returns a cell: of several numbers, such as a device's blocks, one text."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def as_parquet(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    """Returns the table as a Parquet file; raises ConfigError when pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("--format parquet needs its extra: pip install 'fedprune[tables]'; csv needs none")
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(zip(*rows, strict=True)) or [()] * len(headers)
    file = io.BytesIO()
    pq.write_table(pa.table({name: list(column) for name, column in zip(headers, columns, strict=True)}), file)
    return file.getvalue()
