"""The comparison's page, its tables and figures as files, and what a terminal or a program is shown of it."""

from __future__ import annotations

import csv
import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fedprune_cli.report import figures
from fedprune_cli.report.comparison import (
    EQUAL_SUFFIX,
    TARGET_MARGIN,
    Comparison,
    headline,
    latency_split,
    missed_seeds,
)
from fedprune_cli.report.drawing import Drawing
from fedprune_cli.report.estimate import BY_KEY, QUANTITIES, Estimate, Estimates, csv_cells, known
from fedprune_cli.report.page import (
    csv_text,
    html_figure,
    html_page,
    html_section,
    html_table,
    latex_table,
    percent,
    write_files,
)
from fedprune_cli.report.presence import presence_json, presence_section
from fedprune_cli.report.read import HELD_ROUNDS, Run
from fedprune_cli.report.run import CONVERGENCE_NOTE, fault_sections, ingredients
from fedprune_cli.report.tuning import Tuned, tuning_csv, tuning_json, tuning_section
from fedprune_cli.report.versus import versus_csv, versus_section
from fedprune_cli.terminal import Table

NOTE = (
    "±: half the 95 % interval over seeds, of paired differences where two are compared; -: missing on a seed. The target is what the "
    f"reference holds over its last {HELD_ROUNDS} rounds, minus {100 * TARGET_MARGIN} points. Final figures are of the last round, "
    "never of the best. Equal-bandwidth seconds replay the same training on the same channel draws."
)
CAPTIONS = {
    "progress": "Device accuracy against simulated time: mean over seeds and its 95 % interval.",
    "finals": "Accuracies of the last round, never of the best, with 95 % intervals.",
    "target": "Simulated time until the target accuracy, with 95 % intervals.",
    "split": "Mean latency of a round with its 95 % interval, and what was taken off the dense round on equal bandwidth.",
}
FINALS = {"devices": "accuracy", "10th percentile": "accuracy_p10", "fresh device": "fresh_accuracy"}
TERMINAL_TITLES = {  # those further left matter more: where a terminal is narrow the last are left out
    "latency_reduction": "less per round %", "time_reduction": "less to target %", "accuracy": "acc. %", "latency_s": "s per round",
    "accuracy_p10": "p10 %", "least_rounds": "least rounds", "fresh_accuracy": "fresh %",
}  # fmt: skip
MARKDOWN_KEYS = ("time_to_target_s", "time_reduction_equal", "time_reduction", "latency_s", "accuracy", "accuracy_gain", "p10_gain",
                 "fresh_accuracy", "megabytes_up")  # fmt: skip
LIMIT_HEADERS = (
    "",
    "seconds per round",
    "radio free",
    "CPU free",
    "radio free: less than the reference %",
    "CPU free: less %",
)
LIMIT_NOTE = (
    "The same ratios with one of the two costs taken away, mean over rounds and seeds: with a free radio a round lasts as long as its "
    "longest computation, a bound; with a free CPU as long as its longest transmission at the bandwidths given, which others shorten."
)
CERTIFICATE_HEADERS = ("rounds by status", "certified", "largest KKT residual", "largest gap, relative")
DEVICE_KEYS = ("prune_ratio", "bandwidth_hz", "compute_s", "uplink_s", "latency_s", "joules")
DEVICE_HEADERS = (
    "device", "rounds", "ratio", "bandwidth Hz", "computation s", "uplink s", "latency s", "joules per round", "last accuracy",
)  # fmt: skip


def comparison_table(comparison: Comparison) -> Table:
    """Returns the comparison for the terminal: its main figures, a row a method; the page has all of them.

    The rounds of the device with the fewest stand there where a device missed one.
    """
    count = max((len(run.rounds) for runs in comparison.runs.values() for run in runs), default=0)
    all_there = all(known(cells, "least_rounds").mean == count for cells in comparison.figures.values())
    titles = {key: title for key, title in TERMINAL_TITLES.items() if key != "least_rounds" or not all_there}
    rows = [
        [arm.replace(EQUAL_SUFFIX, ", equal"), *(BY_KEY[key].cell(cells[key]) for key in titles)]
        for arm, cells in comparison.figures.items()
    ]
    return Table.of("comparison", ["", *titles.values()], rows)


def comparison_json(
    comparison: Comparison, page: Path, missing: Sequence[str], tuned: Tuned | None = None
) -> dict[str, object]:
    """Returns the comparison for programs: method -> figure -> mean, half_width (95 %), count; null where a seed has none."""
    return {
        "reference": comparison.reference,
        "targets": {str(seed): target for seed, target in comparison.targets.items()},
        "figures": {
            arm: {key: None if cell is None else asdict(cell) for key, cell in cells.items()}
            for arm, cells in comparison.figures.items()
        },
        "runs": {arm: [str(run.path) for run in runs] for arm, runs in comparison.runs.items()},
        "presence": {arm: [presence_json(run) for run in runs] for arm, runs in comparison.runs.items()},
        "tuning": tuning_json(tuned),
        "missing": list(missing),
        "report": str(page),
    }


def write_comparison(
    comparison: Comparison,
    out: Path,
    command: str | None = None,
    missing: Sequence[str] = (),
    tuned: Tuned | None = None,
) -> Path:
    """Writes index.html, table.csv, .tex and .md, versus.csv, tuning.csv where arms were tuned, and the figures as SVG and PDF.

    Returns the page. command: what made it, to say how to repeat it; missing: runs that failed, and why, whose seeds are left out;
    tuned: how the arms came to their settings.
    """
    drawn = drawings(comparison)
    headers, rows = ["", *comparison.figures], _rows(comparison)
    files: dict[str, str | bytes] = {
        "index.html": _page(comparison, drawn, command, missing, tuned),
        "table.csv": _csv_table(comparison),
        "table.tex": latex_table(headers, rows),
        "table.md": markdown(comparison.figures),
    }
    if comparison.reference is not None:
        files["versus.csv"] = versus_csv(comparison)
    if tuned is not None:
        files["tuning.csv"] = tuning_csv(tuned)
    for name, drawing in drawn.items():
        files |= {f"{name}.svg": drawing.svg(), f"{name}.pdf": drawing.pdf()}
    return write_files(out, files)


def drawings(comparison: Comparison) -> dict[str, Drawing]:
    curves = {arm: [run.rounds for run in runs] for arm, runs in comparison.runs.items()}
    target = float(np.mean(list(comparison.targets.values()))) if comparison.targets else None
    finals = {
        arm: {kind: cell for kind, key in FINALS.items() if (cell := comparison.figures[arm][key])} for arm in curves
    }
    drawn = {"progress": figures.progress_figure(curves, target), "finals": figures.finals_figure(finals)}
    if comparison.reference is not None:
        times = {
            arm: cells["time_to_target_s"] or missed_seeds(comparison, arm) for arm, cells in comparison.figures.items()
        }
        drawn["target"] = figures.target_figure(times)
        drawn["split"] = figures.split_figure(latency_split(comparison, comparison.reference))
    drawn["convergence"] = figures.convergence_figure(comparison.runs[comparison.subject][0].rounds)
    return drawn


def _page(
    comparison: Comparison,
    drawn: Mapping[str, Drawing],
    command: str | None,
    missing: Sequence[str],
    tuned: Tuned | None,
) -> str:
    arm, first = comparison.subject, next(iter(comparison.runs.values()))[0]
    captions = CAPTIONS | {"convergence": f"{arm}, seed {comparison.runs[arm][0].seed}. {CONVERGENCE_NOTE}"}
    pictures = {name: html_figure(name, drawing, captions[name]) for name, drawing in drawn.items()}
    table = html_table(["", *comparison.figures], _rows(comparison))
    members = [[name, str(run.seed), str(run.path)] for name, runs in comparison.runs.items() for run in runs]
    left_out = "".join(f"<li>{html.escape(text)}</li>" for text in missing)
    how = f"<p><code>{html.escape(command)}</code></p>" if command else ""
    body = [
        f"<p class=answer>{html.escape(headline(comparison))}</p>",
        pictures.pop("progress"),
        *([html_section("Failed runs, whose seeds are left out", f"<ul>{left_out}</ul>")] if missing else []),
        html_section("Comparison", f"{table}<p class=note>{NOTE}</p>"),
        *versus_section(comparison),
        *tuning_section(tuned),
        *pictures.values(),
        html_section("What limits a round", html_table(LIMIT_HEADERS, _limit_rows(comparison)) + f"<p class=note>{LIMIT_NOTE}</p>"),
        html_section("Certificates", html_table(["", *CERTIFICATE_HEADERS], _certificate_rows(comparison))),
        *fault_sections(comparison.runs),
        presence_section(comparison.runs),
        html_section("Devices", "".join(_devices_of(name, runs[0]) for name, runs in comparison.runs.items())),
        html_section("Runs", html_table(["method", "seed", "folder"], members)),
        html_section("Reproduce", how + ingredients(first)),
    ]  # fmt: skip
    return html_page("comparison", body)


def _rows(comparison: Comparison) -> list[list[str]]:
    """Returns the comparison's table with a row a quantity that any arm has."""
    rows = []
    for quantity in QUANTITIES:
        cells = [of_arm[quantity.key] for of_arm in comparison.figures.values()]
        if any(cells):
            rows.append([quantity.title, *map(quantity.cell, cells)])
    return rows


def _csv_table(comparison: Comparison) -> str:
    """Returns table.csv: unrounded means, half widths and counts."""
    parts = ("mean", "half_width_95", "seeds")
    headers = ["figure", *(f"{arm} {part}" for arm in comparison.figures for part in parts)]
    rows = [
        [quantity.key, *(value for cells in comparison.figures.values() for value in csv_cells(cells[quantity.key]))]
        for quantity in QUANTITIES
    ]
    return csv_text(headers, rows)


def markdown(estimates: Mapping[str, Estimates]) -> str:
    """Returns the comparison's main columns as a Markdown table, a row a method."""
    columns = [BY_KEY[key] for key in MARKDOWN_KEYS]
    lines = [f"| | {' | '.join(column.title for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method, cells in estimates.items():
        shown = [column.cell(cells.get(column.key)) for column in columns]
        name = html.escape(method, quote=False).replace("\\", "\\\\").replace("|", "\\|")
        lines.append(f"| {name} | {' | '.join(shown)} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


def read_table(path: Path) -> dict[str, dict[str, Estimate | None]]:
    """Returns the estimates of a comparison's table.csv: method -> figure -> estimate."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    methods = [name.removesuffix(" mean") for name in header[1::3]]
    estimates: dict[str, dict[str, Estimate | None]] = {method: {} for method in methods}
    for key, *cells in rows:
        for method, mean, half, seeds in zip(methods, cells[::3], cells[1::3], cells[2::3], strict=True):
            estimates[method][key] = Estimate(float(mean), float(half) if half else None, int(seeds)) if mean else None
    return estimates


def _limit_rows(comparison: Comparison) -> list[list[str]]:
    """Returns what each method's round would take without its radio, and without its computation."""
    limits_s = {arm: np.mean([_limits_s(run) for run in runs], axis=0) for arm, runs in comparison.runs.items()}
    base_s = limits_s[comparison.reference][0] if comparison.reference else None
    return [
        [arm, *(f"{value:.4g}" for value in row), *("-" if base_s is None else f"{100 * (1 - value / base_s):.1f}" for value in row[1:])]
        for arm, row in limits_s.items()
    ]  # fmt: skip


def _limits_s(run: Run) -> np.ndarray:
    """Returns the mean seconds of a round: as it was, with a free radio, with a free CPU, float64 [3]."""
    rows = []
    for record in run.rounds:
        devices = record.devices
        compute, radio = np.array(devices.compute_s), np.add(devices.uplink_s, devices.downlink_s)
        rows.append([part.max(initial=0.0) for part in (compute + radio, compute, radio)])
    return np.mean(rows, axis=0)


def _certificate_rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for method, runs in comparison.runs.items():
        records = [record for run in runs for record in run.rounds]
        status = [record.status for record in records]
        proofs = [abs(r.residual) for r in records if r.residual is not None]
        gaps = [abs(r.gap) for r in records if r.gap is not None]
        worst = [f"{max(found):.2e}" if found else "-" for found in (proofs, gaps)]
        counts = ", ".join(f"{status.count(name)} {name}" for name in dict.fromkeys(status))
        rows.append([method, counts, str(len(proofs)), *worst])
    return rows


def _devices_of(method: str, run: Run) -> str:
    """Returns a table, to open when wanted, of the devices' means over a run's rounds and their last accuracy."""
    rows: dict[int, list[list[float]]] = {}
    accuracy: dict[int, float | None] = {}
    for record in run.rounds:
        devices = record.devices
        for device, *values in zip(devices.id, *(getattr(devices, key) for key in DEVICE_KEYS), strict=True):
            rows.setdefault(device, []).append(values)
        accuracy |= dict(zip(devices.id, devices.accuracy or (), strict=False))
    cells = []
    for device in sorted(rows):
        means = [f"{value:.4g}" for value in np.mean(rows[device], axis=0)]
        cells.append([run.called(device), str(len(rows[device])), *means, percent(accuracy.get(device))])
    title = html.escape(f"{method}, seed {run.seed}: means of each device")
    return f"<details><summary>{title}</summary>{html_table(DEVICE_HEADERS, cells)}</details>"
