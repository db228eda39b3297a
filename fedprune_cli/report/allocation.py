"""An allocation by itself, and allocators compared by deadline, for the terminal and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprune_cli.report import figures
from fedprune_cli.report.page import csv_text, seconds, write_files
from fedprune_cli.report.read import Record
from fedprune_cli.terminal import Table

CSV_KEYS = ("id", "prune_ratio", "bandwidth_hz", "rate_bps", "latency_s", "binds", "admitted")


def allocation_table(result: Record) -> Table:
    """Returns the devices of `table.answer` for the terminal, with the certificate above."""
    certificate = result["certificate"]
    proof = (
        "no certificate"
        if certificate is None
        else f"KKT residual {certificate['residual']:.1e}, gap {certificate['gap']:.1e}"
    )
    title = f"{result['status']}, deadline {seconds(result['deadline_s'])}; {proof}" + (
        f"\n{result['message']}" if result["message"] else ""
    )
    rows = [
        [
            str(d["id"]),
            f"{d['prune_ratio']:.3f}",
            f"{d['bandwidth_hz'] / 1e6:.4f}",
            f"{d['latency_s']:.4g}",
            d["binds"],
            f"{d['rate_bps'] / 1e6:.4g}",
        ]
        for d in result["devices"]
    ]
    headers = ["device", "ratio", "MHz", "seconds", "binds", "Mbit/s"]
    return Table.of(title, headers, rows, folding=["binds"], elsewhere="in --json")


def ladder_table(rows: Sequence[Record]) -> Table:
    """Returns `table.ladder` for the terminal."""
    names = [key for key in rows[0] if key not in ("fraction", "deadline_s")]
    cells = [
        [
            f"{row['fraction']:.2f}",
            seconds(row["deadline_s"]),
            *("cannot" if row[n] is None else f"{row[n][0]:.3f} / {row[n][1]:.3f}" for n in names),
        ]
        for row in rows
    ]
    headers = ["of dense", "deadline", *names]
    return Table.of("weighted mean / largest pruning ratio", headers, cells, elsewhere="in --json")


def write_allocation(out: Path, result: Record, frontier: Sequence[Mapping[str, float]]) -> Path:
    """Writes allocation.csv and .json, frontier.csv and frontier.svg; returns the first one's path."""
    devices = [[device[key] for key in CSV_KEYS] for device in result["devices"]]
    files = {
        "allocation.csv": csv_text(CSV_KEYS, devices),
        "allocation.json": json.dumps(result, indent=1) + "\n",
        "frontier.csv": csv_text(["fraction", "deadline_s", "mean_ratio"], [list(row.values()) for row in frontier]),
        "frontier.svg": figures.frontier_figure(frontier, result["deadline_s"]).svg(),
    }
    return write_files(out, files)
