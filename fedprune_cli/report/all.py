"""Records -> tables, figures and one HTML page, for a run or for several compared. Of a run folder it changes report/ only."""

from __future__ import annotations

import csv
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprune_cli.errors import CheckpointError, one_line
from fedprune_cli.report import figures
from fedprune_cli.report.figures import Record, tested
from fedprune_cli.report.page import (
    csv_text,
    details,
    figure,
    html_table,
    latex_table,
    page,
    percent,
    seconds,
    section,
    terminal_table,
    write,
)
from fedprune_cli.store import folder
from fedprune_cli.store.files import fits, read_json

if TYPE_CHECKING:
    from rich.table import Table

HELD_ROUNDS = 10  # a level counts as held when no test of the last ten is below it
TARGET_MARGIN = 0.005  # the target: what the reference holds, minus half a point
NOTE = (
    "±: half the 95 % interval over seeds, of paired differences where two are compared; -: missing on a seed. The target is what the "
    f"reference holds over its last {HELD_ROUNDS} tests, minus 0.5 points. Final figures are of the last round, never of the best. "
    "Equal-bandwidth seconds replay the same training on the same channel draws."
)

CONVERGENCE_NOTE = (
    "Left: the squared norm of the mean gradient that the updates imply, averaged over the rounds so far, and c1/sqrt(R) + c2 (mean "
    "pruning error) + c3 fitted to it: the shape of the convergence bound, not a prediction. Right: the pruning error, with which the "
    "bound's floor grows."
)


MANIFEST_FORM = {
    "method": str, "seed": int, "fresh_devices": int, "train_samples": [int], "histogram": [[int]],
    "config": {"pruner": {"granularity": str}, "rounds": int, **dict.fromkeys(("data", "partition", "devices", "channel"), dict)},
    "dataset": {"num_classes": int}, "model": dict, "versions": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder's content. summary is None while the run is unfinished."""

    path: Path
    manifest: Record
    rounds: tuple[Record, ...]
    summary: Record | None

    @property
    def method(self) -> str:
        return one_line(self.manifest["method"])

    @property
    def seed(self) -> int:
        return int(self.manifest["seed"])


def read_run(path: Path) -> Run:
    """Returns the run; raises CheckpointError when the folder is not one, or is damaged."""
    folder.check(path, folder.MANIFEST)
    manifest, summary = read_json(path / folder.MANIFEST, CheckpointError), folder.read_summary(path)
    if (
        not fits(manifest, MANIFEST_FORM)
        or len({manifest["dataset"]["num_classes"], *map(len, manifest["histogram"])}) > 1
    ):
        raise CheckpointError(f"{path / folder.MANIFEST}: damaged (not the manifest of a run)")
    rounds = tuple(record.as_json() for record in folder.read_records(path))
    if not tested(rounds):
        raise CheckpointError(f"{path}: no round has been tested yet, there is nothing to report")
    return Run(path, manifest, rounds, summary)


def held_accuracy(run: Run) -> float:
    """Returns the lowest accuracy of the last ten tests: the level that the run holds (model.md, section 7)."""
    return min(float(record["accuracy"]) for record in tested(run.rounds)[-HELD_ROUNDS:])


def crossing(run: Run, target: float) -> int | None:
    """Returns the index of the first round whose tested accuracy reaches the target, or None."""
    return next((i for i, r in enumerate(run.rounds) if r["accuracy"] is not None and r["accuracy"] >= target), None)


# --- one run --------------------------------------------------------------------------------------------------------


def write_report(path: Path, out: Path | None = None) -> Path:
    """Writes a run's index.html, figures as SVG, rounds.csv, devices.csv and histogram.csv into report/, or `out`; returns the page."""
    run = read_run(path)
    count = len(run.manifest["train_samples"]) - run.manifest["fresh_devices"]
    drawn = {
        "accuracy": figures.accuracy_figure(run.rounds),
        "latency": figures.latency_figure(run.rounds),
        "allocation": figures.allocation_figure(run.rounds),
        "convergence": figures.convergence_figure(run.rounds),
        "partition": figures.partition_figure(run.manifest["histogram"], count),
    }
    captions = {
        "accuracy": "Accuracy of each device's own model on its own test samples, and of a device that never trained.",
        "latency": "Each round lasts as long as its slowest device; the lines are what the same round costs without pruning.",
        "allocation": "What each device was given: mean over the rounds, and the 10th to 90th percentile.",
        "convergence": CONVERGENCE_NOTE,
        "partition": "Samples of each class on each device; those above the red line never train.",
    }
    last = tested(run.rounds)[-1]
    answer = (
        f"{run.method}, seed {run.seed}: device accuracy {percent(last['accuracy'])} after {len(run.rounds)} rounds "
        f"and {seconds(run.rounds[-1]['simulated_s'])} of simulated time."
    )
    body = [
        f"<p class=answer>{html.escape(answer)}</p>",
        *(figure(name, drawing, captions[name]) for name, drawing in drawn.items()),
        section("Figures of the run", html_table(["figure", "value"], _facts(run))),
        section("Certificate", html_table(["figure", "value"], _certificate_facts(run))),
        *_fault_sections({run.method: (run,)}),
        section("Reproduce", f"<p>State: <code>{_state_hash(run)}</code></p>" + _reproduce(run)),
    ]
    plain = [key for key, value in run.rounds[0].items() if key not in ("devices", "faults")]
    kinds = [kind for kind in FAULT_TITLES if any("faults" in record for record in run.rounds)]
    files = {
        "index.html": page(f"{run.method}, seed {run.seed}", body),
        "rounds.csv": csv_text([*plain, *kinds],
                               [[*(r[key] for key in plain), *_fault_counts([r], kinds)] for r in run.rounds]),
        "devices.csv": csv_text(*_device_rows(run)),
        "histogram.csv": csv_text(["device", *(f"class_{c}" for c in range(run.manifest["dataset"]["num_classes"]))],
                              [[device, *counts] for device, counts in enumerate(run.manifest["histogram"])]),
    }  # fmt: skip
    return write(out or path / "report", files | {f"{name}.svg": drawing.svg() for name, drawing in drawn.items()})


def run_table(run: Run) -> Table:
    """Returns the run's figures for the terminal."""
    return terminal_table(f"{run.method}, seed {run.seed}", ["figure", "value"], _facts(run))


def run_json(run: Run, page: Path) -> Record:
    """Returns the run for programs: its summary, None while it is unfinished, its folder and the report's page."""
    return {"run_dir": str(run.path), "report": str(page), "rounds": len(run.rounds), "summary": run.summary}


def _facts(run: Run) -> list[list[str]]:
    last, rounds = tested(run.rounds)[-1], run.rounds
    ratios = [r["mean_ratio"] for r in rounds if r["mean_ratio"] is not None]
    facts = [
        ["rounds", str(len(rounds))],
        ["simulated time", seconds(rounds[-1]["simulated_s"])],
        ["latency per round, mean", seconds(float(np.mean([r["latency_s"] for r in rounds])))],
        ["final accuracy, weighted by samples", percent(last["accuracy"])],
        ["final accuracy, unweighted", percent(last["accuracy_mean"])],
        ["final accuracy, 10th percentile of devices", percent(last["accuracy_p10"])],
        ["accuracy on a fresh device", percent(last["fresh_accuracy"])],
        ["pruning ratio, mean", "-" if not ratios else f"{np.mean(ratios):.3f}"],
        ["pruned are", _granularity(run)],
        ["sent by all devices", f"{sum(r['bytes_up'] for r in rounds) / 1e6:.4g} MB"],
        ["energy of all devices", f"{sum(r['joules'] for r in rounds):.4g} J"],
    ]
    if begun := run.manifest["config"].get("branch"):
        facts.insert(1, ["a branch", f"of {begun['run']}, from its round {begun['round']} on"])
    if run.summary and run.summary["time_to_target_s"] is not None:
        facts.append(["time to the target accuracy", seconds(run.summary["time_to_target_s"])])
    return facts


def _granularity(run: Run) -> str:
    if all(not record["max_ratio"] for record in run.rounds):
        return "none"
    if run.manifest["config"]["pruner"]["granularity"] == "channel":
        return "whole channels: the model is smaller"
    return "single entries: the computation they save is modelled, masks save none"


def _certificate_facts(run: Run) -> list[list[str]]:
    status = [r["status"] for r in run.rounds]
    certified = [r for r in run.rounds if r["residual"] is not None]
    facts = [["rounds " + name, str(status.count(name))] for name in dict.fromkeys(status)]
    if certified:
        facts.append(["largest KKT residual", f"{max(r['residual'] for r in certified):.2e}"])
        facts.append(["largest duality gap, relative", f"{max(abs(r['gap']) for r in certified):.2e}"])
    else:
        facts.append(["certificate", "none: this allocator claims no optimality of P1"])
    return facts


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


def _fault_counts(records: Sequence[Record], kinds: Sequence[str]) -> list[int]:
    """Returns for each kind how many device-rounds the logs name."""
    return [sum(len(record.get("faults", {}).get(kind, ())) for record in records) for kind in kinds]


def _fault_sections(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Returns the section on faults and fail-safes, or nothing when no round of any run names one."""
    of = {name: [record for run in group for record in run.rounds] for name, group in runs.items()}
    counts = {name: _fault_counts(records, list(FAULT_TITLES)) for name, records in of.items()}
    shown = [at for at in range(len(FAULT_TITLES)) if any(count[at] for count in counts.values())]
    if not shown:
        return []
    titles = list(FAULT_TITLES.values())
    rows = [[titles[at], *(str(count[at]) for count in counts.values())] for at in shown]
    waited = [sum(record.get("faults", {}).get("waited_s", 0.0) for record in records) for records in of.values()]
    rows.append(["waited for what did not come", *(seconds(value) for value in waited)])
    rules = "".join(f"<li>{html.escape(name)}: {html.escape(_rules(group[0]))}</li>" for name, group in runs.items())
    note = "<p class=note>Device-rounds. What the server did:</p>"
    return [section("Faults and fail-safes", html_table(["", *runs], rows) + f"{note}<ul>{rules}</ul>")]


def _rules(run: Run) -> str:
    """Says in a sentence which fail-safes a run had."""
    rules = run.manifest["config"].get("failsafe")
    if rules is None:
        return "waited for every update and took the mean"
    late = {
        "wait": "waited for late updates",
        "drop": "dropped late updates",
        "defer": "took late updates a round later",
    }
    words = [
        f"{late[rules['late']]} (late after {rules['wait_factor']:g} deadlines)",
        f"took updates up to {rules['max_staleness']} rounds old",
        f"combined by {rules['aggregation'].replace('_', ' ')}",
    ]
    if rules["clip_norm"] is not None:
        words.append(f"clipped changes to {rules['clip_norm']:g} median norms")
    if rules["safe_ratio"]:
        words.append("pruned more where a device had missed its deadline")
    if (after := rules["quarantine_after"]) is not None:
        rounds = rules["quarantine_rounds"]
        words.append(
            f"shut devices out {'for good' if rounds is None else f'for {rounds} rounds'} after {after} offences in a row"
        )
    return ", ".join(words)


def _device_rows(run: Run) -> tuple[list[str], list[list[Any]]]:
    keys = list(dict.fromkeys(key for record in run.rounds for key in record["devices"]))
    rows = []
    for record in run.rounds:
        columns = [record["devices"].get(key) or [None] * len(record["devices"]["id"]) for key in keys]
        rows += [[record["round"], *row] for row in zip(*columns, strict=True)]
    return ["round", *keys], rows


# --- several runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval (Student's t); no interval from one seed."""

    mean: float
    half_width: float | None
    count: int

    def text(self, show: Callable[[float], str]) -> str:
        """Returns the mean, and half the interval's width where there is one."""
        return show(self.mean) + ("" if self.half_width is None else f" ± {show(self.half_width)}")


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Returns the mean and interval of the values, or None when any of them is missing."""
    if not values or any(value is None for value in values):
        return None
    numbers = np.array(values, dtype=float)
    if len(numbers) == 1:
        return Estimate(float(numbers[0]), None, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    return Estimate(float(numbers.mean()), half, len(numbers))


Column = tuple[str, str, Callable[[float], str]]
COLUMNS: tuple[Column, ...] = (
    ("latency_s", "seconds a round", lambda v: f"{v:.4g}"),
    ("time_to_target_s", "seconds to target", lambda v: f"{v:.4g}"),
    ("accuracy", "accuracy %", lambda v: f"{100 * v:.2f}"),
    ("accuracy_p10", "10th percentile %", lambda v: f"{100 * v:.2f}"),
    ("fresh_accuracy", "fresh device %", lambda v: f"{100 * v:.2f}"),
    ("accuracy_gain", "accuracy, points above", lambda v: f"{100 * v:.2f}"),
    ("p10_gain", "10th percentile, points above", lambda v: f"{100 * v:.2f}"),
    ("mean_ratio", "mean pruning ratio", lambda v: f"{v:.3f}"),
    ("megabytes_up", "MB sent", lambda v: f"{v:.4g}"),
    ("joules", "joules", lambda v: f"{v:.4g}"),
    ("latency_reduction", "less a round %", lambda v: f"{100 * v:.1f}"),
    ("time_reduction", "less to target %", lambda v: f"{100 * v:.1f}"),
    ("time_reduction_equal", "less to target than on equal bandwidth %", lambda v: f"{100 * v:.1f}"),
    ("bandwidth_share", "off equal bandwidth: by bandwidth %", lambda v: f"{100 * v:.1f}"),
    ("pruning_share", "off equal bandwidth: by pruning %", lambda v: f"{100 * v:.1f}"),
)
TERMINAL_TITLES = {
    "latency_s": "s a round", "accuracy": "acc. %", "accuracy_p10": "p10 %", "fresh_accuracy": "fresh %",
    "latency_reduction": "less a round %", "time_reduction": "less to target %",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Runs of several methods, or arms of an experiment, on the same seeds.

    runs: method or arm -> its runs in seed order; reference: the one that sets the target and the reductions, None if absent;
    targets: seed -> target accuracy; figures: method -> column -> estimate.
    Reductions are against the reference on its own optimal bandwidth; the shares are of the reference's mean round on EQUAL bandwidth.
    """

    runs: Mapping[str, tuple[Run, ...]]
    reference: str | None
    targets: Mapping[int, float]
    figures: Mapping[str, Mapping[str, Estimate | None]]


EQUAL_SUFFIX = " (equal bandwidth)"


def compare(runs: Sequence[Run], labels: Sequence[str] | None = None, reference: str = "personalized") -> Comparison:
    """Returns the comparison of runs grouped by `labels`, by method when None; `reference` is a method.

    Raises CheckpointError when the runs are not of the same data, devices, channel and seeds.
    """
    groups: dict[str, dict[int, Run]] = {}
    for run, label in zip(runs, map(one_line, labels or [run.method for run in runs]), strict=True):
        if run.summary is None:
            raise CheckpointError(f"{run.path}: not finished; continue it with `fedprune resume {run.path}`")
        if run.seed in groups.setdefault(label, {}):
            raise CheckpointError(f"{run.path}: a second run of {label} with seed {run.seed}; give one of each")
        groups[label][run.seed] = run
    named = next((label for label, of in groups.items() if next(iter(of.values())).method == reference), None)
    seeds = sorted(next(iter(groups.values())))
    first = runs[0]
    for method, members in groups.items():
        if sorted(members) != seeds:
            raise CheckpointError(
                f"{method} has the seeds {sorted(members)}, others {seeds}: a comparison needs the same ones"
            )
        for run in members.values():
            for key in ("data", "partition", "devices", "channel", "rounds"):
                if run.manifest["config"][key] != first.manifest["config"][key]:
                    raise CheckpointError(
                        f"{run.path}: another {key} than {first.path}; runs are compared in the same world"
                    )
    base = groups[named] if named else None
    targets = {seed: held_accuracy(base[seed]) - TARGET_MARGIN for seed in seeds} if base else {}
    estimates: dict[str, dict[str, Estimate | None]] = {}
    for method, members in groups.items():
        rows = [run_figures(members[seed], base[seed] if base else None, targets.get(seed)) for seed in seeds]
        estimates[method] = {key: estimate([row[key] for row in rows]) for key, _, _ in COLUMNS}
        if base and method == named:
            rows = [_equal_bandwidth_figures(base[seed], targets[seed]) for seed in seeds]
            estimates[method + EQUAL_SUFFIX] = {key: estimate([row[key] for row in rows]) for key, _, _ in COLUMNS}
    ordered = {method: tuple(members[seed] for seed in seeds) for method, members in groups.items()}
    return Comparison(ordered, named, targets, estimates)


def run_figures(run: Run, base: Run | None, target: float | None) -> dict[str, float | None]:
    """Returns a run's columns, its reductions against the reference of the same seed."""
    last = tested(run.rounds)[-1]
    latency_s = float(np.mean([r["latency_s"] for r in run.rounds]))
    reached = None if target is None else crossing(run, target)
    time_s = None if reached is None else run.rounds[reached]["simulated_s"]
    row: dict[str, float | None] = {key: None for key, _, _ in COLUMNS}
    row |= {
        "latency_s": latency_s,
        "time_to_target_s": time_s,
        "accuracy": last["accuracy"],
        "accuracy_p10": last["accuracy_p10"],
        "fresh_accuracy": last["fresh_accuracy"],
        "mean_ratio": float(np.mean([r["mean_ratio"] for r in run.rounds if r["mean_ratio"] is not None] or [0.0])),
        "megabytes_up": sum(r["bytes_up"] for r in run.rounds) / 1e6,
        "joules": sum(r["joules"] for r in run.rounds),
    }
    if base is None or target is None:
        return row
    base_s = float(np.mean([r["latency_s"] for r in base.rounds]))
    equal_s = _mean_equal_s(base)
    base_time_s = base.rounds[crossing(base, target) or 0]["simulated_s"]
    base_last, equal_time_s = tested(base.rounds)[-1], _equal_time_s(base, target)
    row |= {
        "accuracy_gain": last["accuracy"] - base_last["accuracy"],
        "p10_gain": last["accuracy_p10"] - base_last["accuracy_p10"],
        "time_reduction_equal": None if time_s is None else 1 - time_s / equal_time_s,
        "latency_reduction": 1 - latency_s / base_s,
        "time_reduction": None if time_s is None else 1 - time_s / base_time_s,
        "bandwidth_share": (equal_s - base_s) / equal_s,
        "pruning_share": (base_s - latency_s) / equal_s,
    }
    return row


def _equal_bandwidth_figures(base: Run, target: float) -> dict[str, float | None]:
    """Returns the columns of the reference on equal bandwidth: dense training does not depend on bandwidth, only its clock does."""
    row = run_figures(base, base, target)
    base_s, equal_s = row["latency_s"], _mean_equal_s(base)
    assert base_s is not None
    base_time_s, time_s = row["time_to_target_s"], _equal_time_s(base, target)
    assert base_time_s is not None
    return row | {
        "latency_s": equal_s,
        "time_to_target_s": time_s,
        "joules": None,  # the radio's share would have to be metered again
        "latency_reduction": 1 - equal_s / base_s,
        "time_reduction": 1 - time_s / base_time_s,
        "time_reduction_equal": 0.0,
        "bandwidth_share": 0.0,
        "pruning_share": 0.0,
    }


def _equal_time_s(base: Run, target: float) -> float:
    """Returns the seconds to the target of the reference's devices on equal bandwidth; it reaches what it holds itself."""
    return float(sum(r["equal_dense_latency_s"] or 0.0 for r in base.rounds[: (crossing(base, target) or 0) + 1]))


def _mean_equal_s(run: Run) -> float:
    """Mean seconds a round of the run's devices without pruning on equal bandwidth."""
    return float(np.mean([r["equal_dense_latency_s"] or 0.0 for r in run.rounds]))


def headline(comparison: Comparison) -> str:
    """Returns the answer in a few sentences, whichever way it falls."""
    others = [method for method in comparison.runs if method != comparison.reference]
    if comparison.reference is None or not others:
        return "No reduction is given: it needs the method 'personalized' and another one."
    method = "proposed" if "proposed" in others else others[0]
    mine, base = comparison.figures[method], comparison.figures[comparison.reference]
    per_round, to_target = mine["latency_reduction"], mine["time_reduction"]
    accuracy, base_accuracy = mine["accuracy"], base["accuracy"]
    assert per_round
    assert accuracy
    assert base_accuracy
    target = float(np.mean(list(comparison.targets.values())))
    seeds = len(comparison.targets)
    text = f"{method} takes {_less(per_round)} simulated time a round than {comparison.reference} with its own optimal bandwidth"
    if to_target:
        equal = mine["time_reduction_equal"]
        assert equal
        text += f" and {_less(to_target)} to the target accuracy of {percent(target)}, {_less(equal)} than on equal bandwidth"
    else:
        text += f"; it does not reach the target accuracy of {percent(target)} on every seed"
    bandwidth, pruning = mine["bandwidth_share"], mine["pruning_share"]
    assert bandwidth
    assert pruning
    points = mine["accuracy_gain"]
    assert points
    text += (
        f". Against equal bandwidth a round takes {_less(Estimate(bandwidth.mean + pruning.mean, None, seeds))}: "
        f"{100 * bandwidth.mean:.1f} points by bandwidth, {100 * pruning.mean:.1f} by pruning. "
        f"Final device accuracy {percent(accuracy.mean)} against {percent(base_accuracy.mean)} ({_points(points)} points). "
    )
    return text + (f"Means of {seeds} seeds with 95 % intervals." if seeds > 1 else "One seed: there is no interval.")


def _points(gain: Estimate) -> str:
    if gain.half_width is None:
        return f"{100 * gain.mean:+.2f}"
    ends = gain.mean - gain.half_width, gain.mean + gain.half_width
    return f"{100 * gain.mean:+.2f} [{100 * ends[0]:+.2f}, {100 * ends[1]:+.2f}]"


def _less(reduction: Estimate) -> str:
    word = "less" if reduction.mean >= 0 else "more"
    sign = 1 if reduction.mean >= 0 else -1
    interval = ""
    if reduction.half_width is not None:
        ends = sorted((sign * reduction.mean - reduction.half_width, sign * reduction.mean + reduction.half_width))
        interval = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
    return f"{100 * abs(reduction.mean):.1f} %{interval} {word}"


def comparison_table(comparison: Comparison) -> Table:
    """Returns the comparison for the terminal: its main figures, a row a method; the page has all of them."""
    shown = [(key, TERMINAL_TITLES[key], show) for key, _, show in COLUMNS if key in TERMINAL_TITLES]
    rows = [
        [
            method.replace(EQUAL_SUFFIX, ", equal"),
            *("-" if (cell := cells[key]) is None else cell.text(show) for key, _, show in shown),
        ]
        for method, cells in comparison.figures.items()
    ]
    return terminal_table("comparison", ["", *(title for _, title, _ in shown)], rows)


def comparison_json(comparison: Comparison, page: Path, missing: Sequence[str]) -> Record:
    """Returns the comparison for programs: method -> figure -> mean, half_width (95 %), count; null where a seed has none."""
    return {
        "reference": comparison.reference,
        "targets": {str(seed): target for seed, target in comparison.targets.items()},
        "figures": {
            method: {key: None if cell is None else asdict(cell) for key, cell in cells.items()}
            for method, cells in comparison.figures.items()
        },
        "runs": {method: [str(run.path) for run in runs] for method, runs in comparison.runs.items()},
        "missing": list(missing),
        "report": str(page),
    }


def _comparison_rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for key, title, show in COLUMNS:
        cells = [comparison.figures[method][key] for method in comparison.figures]
        if any(cells):
            rows.append([title, *("-" if cell is None else cell.text(show) for cell in cells)])
    return rows


def write_comparison(
    comparison: Comparison, out: Path, command: str | None = None, missing: Sequence[str] = ()
) -> Path:
    """Writes index.html, table.csv, .tex and .md, and the figures as SVG and PDF; returns the page.

    command: what made it, to say how to repeat it; missing: runs that failed, and why, whose seeds are left out.
    """
    curves = {method: [run.rounds for run in runs] for method, runs in comparison.runs.items()}
    target = float(np.mean(list(comparison.targets.values()))) if comparison.targets else None
    finals = {
        method: {
            kind: (cell.mean, cell.half_width)
            for kind, key in (
                ("devices", "accuracy"),
                ("10th percentile", "accuracy_p10"),
                ("fresh device", "fresh_accuracy"),
            )
            if (cell := comparison.figures[method][key])
        }
        for method in comparison.runs
    }
    drawn = {"progress": figures.progress_figure(curves, target, _band), "finals": figures.finals_figure(finals)}
    if comparison.reference is not None:
        drawn["target"] = figures.target_figure(
            {
                method: (cell.mean, cell.half_width)
                if (cell := cells["time_to_target_s"])
                else _missed(comparison, method)
                for method, cells in comparison.figures.items()
            }
        )
        drawn["split"] = figures.split_figure(_split(comparison))
    proposed = "proposed" if "proposed" in comparison.runs else next(iter(comparison.runs))
    drawn["convergence"] = figures.convergence_figure(comparison.runs[proposed][0].rounds)
    captions = {
        "progress": "Device accuracy against simulated time: mean over seeds and its 95 % interval.",
        "finals": "Accuracies of the last round, never of the best, with 95 % intervals.",
        "target": "Simulated time until the target accuracy, with 95 % intervals.",
        "split": "Mean latency of a round with its 95 % interval, and what was taken off the dense round on equal bandwidth.",
        "convergence": f"{proposed}, seed {comparison.runs[proposed][0].seed}. {CONVERGENCE_NOTE}",
    }
    headers, rows = ["", *comparison.figures], _comparison_rows(comparison)
    first = next(iter(comparison.runs.values()))[0]
    members = [[method, str(run.seed), str(run.path)] for method, runs in comparison.runs.items() for run in runs]
    left_out = "".join(f"<li>{html.escape(text)}</li>" for text in missing)
    how = f"<p><code>{html.escape(command)}</code></p>" if command else ""
    body = [
        f"<p class=answer>{html.escape(headline(comparison))}</p>",
        figure("progress", drawn["progress"], captions["progress"]),
        *([section("Failed runs, whose seeds are left out", f"<ul>{left_out}</ul>")] if missing else []),
        section("Comparison", html_table(headers, rows) + f"<p class=note>{NOTE}</p>"),
        *(figure(name, drawing, captions[name]) for name, drawing in drawn.items() if name != "progress"),
        section("What limits a round", html_table(LIMIT_HEADERS, _limit_rows(comparison)) + f"<p class=note>{LIMIT_NOTE}</p>"),
        section("Certificates", html_table(["", *CERTIFICATE_HEADERS], _certificate_rows(comparison))),
        *_fault_sections(comparison.runs),
        section("Devices", "".join(_devices_of(method, runs[0]) for method, runs in comparison.runs.items())),
        section("Runs", html_table(["method", "seed", "folder"], members)),
        section("Reproduce", how + _reproduce(first)),
    ]  # fmt: skip
    raw_headers = [
        "figure",
        *(f"{method} {part}" for method in comparison.figures for part in ("mean", "half_width_95", "seeds")),
    ]
    raw_rows = [
        [key, *(value for method in comparison.figures for value in raw(comparison.figures[method][key]))]
        for key, _, _ in COLUMNS
    ]
    files: dict[str, str | bytes] = {
        "index.html": page("comparison", body),
        "table.csv": csv_text(raw_headers, raw_rows),
        "table.tex": latex_table(headers, rows),
        "table.md": markdown(comparison.figures),
    }
    for name, drawing in drawn.items():
        files |= {f"{name}.svg": drawing.svg(), f"{name}.pdf": drawing.pdf()}
    return write(out, files)


def _missed(comparison: Comparison, method: str) -> str:
    """Returns on how many seeds a method does not reach the target."""
    runs = comparison.runs[method]
    missed = sum(crossing(run, comparison.targets[run.seed]) is None for run in runs)
    return f"missed on {missed} of {len(runs)} seeds"


MARKDOWN_KEYS = ("time_to_target_s", "time_reduction_equal", "time_reduction", "latency_s", "accuracy", "accuracy_gain", "p10_gain",
                 "fresh_accuracy", "megabytes_up")  # fmt: skip


def markdown(estimates: Mapping[str, Mapping[str, Estimate | None]]) -> str:
    """Returns the comparison's main columns as a Markdown table, a row a method."""
    columns = [(key, title, show) for wanted in MARKDOWN_KEYS for key, title, show in COLUMNS if key == wanted]
    lines = [f"| | {' | '.join(title for _, title, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method, cells in estimates.items():
        shown = ["-" if (cell := cells.get(key)) is None else cell.text(show) for key, _, show in columns]
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


def _band(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the curves' mean and half the width of its 95 % interval at each point."""
    points = [estimate(values) for values in np.stack(curves, axis=1).tolist()]
    mean = np.array([point.mean for point in points if point])
    return mean, np.array([point.half_width for point in points if point]) if len(curves) > 1 else None


LIMIT_HEADERS = (
    "",
    "seconds a round",
    "radio free",
    "CPU free",
    "radio free: less than the reference %",
    "CPU free: less %",
)
LIMIT_NOTE = (
    "The same ratios with one of the two costs taken away, mean over rounds and seeds: with a free radio a round lasts as long as its "
    "longest computation, a bound; with a free CPU as long as its longest transmission at the bandwidths given, which others shorten."
)


def _limit_rows(comparison: Comparison) -> list[list[str]]:
    """Returns what each method's round would take without its radio, and without its computation."""
    seconds = {method: np.mean([_limits_s(run) for run in runs], axis=0) for method, runs in comparison.runs.items()}
    base_s = seconds[comparison.reference][0] if comparison.reference else None
    return [
        [method, *(f"{value:.4g}" for value in of), *("-" if base_s is None else f"{100 * (1 - value / base_s):.1f}" for value in of[1:])]
        for method, of in seconds.items()
    ]  # fmt: skip


def _limits_s(run: Run) -> np.ndarray:
    """Returns the mean seconds of a round: as it was, with a free radio, with a free CPU, float64 [3]."""
    rows = []
    for record in run.rounds:
        of = record["devices"]
        compute, radio = np.array(of.get("compute_s", ())), np.add(of.get("uplink_s", ()), of.get("downlink_s", ()))
        rows.append([part.max(initial=0.0) for part in (compute + radio, compute, radio)])
    return np.mean(rows, axis=0)


CERTIFICATE_HEADERS = ("rounds by status", "certified", "largest KKT residual", "largest gap, relative")


def _certificate_rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for method, runs in comparison.runs.items():
        records = [record for run in runs for record in run.rounds]
        status = [record["status"] for record in records]
        certified = [record for record in records if record["residual"] is not None]
        worst = [
            f"{max(abs(record[key]) for record in certified):.2e}" if certified else "-" for key in ("residual", "gap")
        ]
        counts = ", ".join(f"{status.count(name)} {name}" for name in dict.fromkeys(status))
        rows.append([method, counts, str(len(certified)), *worst])
    return rows


def _devices_of(method: str, run: Run) -> str:
    """Returns a table, to open when wanted, of the devices' means over a run's rounds and their last accuracy."""
    keys = ("prune_ratio", "bandwidth_hz", "compute_s", "uplink_s", "latency_s", "joules")
    rows: dict[int, list[list[float]]] = {}
    accuracy: dict[int, float] = {}
    for record in run.rounds:
        of = record["devices"]
        for device, *values in zip(of["id"], *(of.get(key, ()) for key in keys), strict=False):
            rows.setdefault(device, []).append(values)
        accuracy |= dict(zip(of["id"], of.get("accuracy") or (), strict=False))
    cells = [
        [str(device), str(len(rows[device])), *(f"{value:.4g}" for value in np.mean(rows[device], axis=0)), percent(accuracy.get(device))]
        for device in sorted(rows)
    ]  # fmt: skip
    headers = (
        "device",
        "rounds",
        "ratio",
        "bandwidth Hz",
        "computation s",
        "uplink s",
        "latency s",
        "joules a round",
        "last accuracy",
    )
    title = html.escape(f"{method}, seed {run.seed}: means of each device")
    return f"<details><summary>{title}</summary>{html_table(headers, cells)}</details>"


def raw(cell: Estimate | None) -> tuple[Any, Any, Any]:
    """Returns an estimate's mean, half width and count, for a CSV file."""
    return (None, None, None) if cell is None else (cell.mean, cell.half_width, cell.count)


def _split(comparison: Comparison) -> dict[str, tuple[float, float, float, float]]:
    """Returns for each method: seconds a round left, saved by pruning, saved by bandwidth, and half of what is left's interval."""
    equal = comparison.figures[f"{comparison.reference}{EQUAL_SUFFIX}"]["latency_s"]
    assert equal
    split = {}
    for method, columns in comparison.figures.items():
        latency, bandwidth, pruning = (columns[key] for key in ("latency_s", "bandwidth_share", "pruning_share"))
        if latency and bandwidth and pruning:
            half_s = latency.half_width or 0.0
            split[method] = (latency.mean, pruning.mean * equal.mean, bandwidth.mean * equal.mean, half_s)
    return split


# --- an allocation by itself ------------------------------------------------------------------------------------------

ALLOCATION_COLUMNS = ("id", "prune_ratio", "bandwidth_hz", "rate_bps", "latency_s", "binds", "admitted")


def allocation_table(result: Record) -> Table:
    """Returns the devices of `planning.answer` for the terminal, with the certificate above."""
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
            f"{d['rate_bps'] / 1e6:.4g}",
            f"{d['latency_s']:.4g}",
            d["binds"],
        ]
        for d in result["devices"]
    ]
    return terminal_table(title, ["device", "ratio", "MHz", "Mbit/s", "seconds", "binds"], rows)


def ladder_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns `planning.ladder` for the terminal."""
    names = [key for key in rows[0] if key not in ("fraction", "deadline_s")]
    cells = [
        [
            f"{row['fraction']:.2f}",
            seconds(row["deadline_s"]),
            *("cannot" if row[n] is None else f"{row[n][0]:.3f} / {row[n][1]:.3f}" for n in names),
        ]
        for row in rows
    ]
    return terminal_table("weighted mean / largest pruning ratio", ["of dense", "deadline", *names], cells)


def write_allocation(out: Path, result: Record, frontier: Sequence[Mapping[str, float]]) -> Path:
    """Writes allocation.csv and .json, frontier.csv and frontier.svg; returns the first one's path."""
    devices = [[device[key] for key in ALLOCATION_COLUMNS] for device in result["devices"]]
    files = {
        "allocation.csv": csv_text(ALLOCATION_COLUMNS, devices),
        "allocation.json": json.dumps(result, indent=1) + "\n",
        "frontier.csv": csv_text(["fraction", "deadline_s", "mean_ratio"], [list(row.values()) for row in frontier]),
        "frontier.svg": figures.frontier_figure(frontier, result["deadline_s"]).svg(),
    }
    return write(out, files)


# --- what a run was made of -------------------------------------------------------------------------------------------


def _reproduce(run: Run) -> str:
    """What a run was made of, to open when wanted."""
    manifest = run.manifest
    parts = {
        "Configuration": manifest["config"],
        "Versions": manifest["versions"],
        "Data": manifest["dataset"],
        "Model": manifest["model"],
    }
    return "".join(details(title, values) for title, values in parts.items())


def _state_hash(run: Run) -> str:
    return html.escape(str(run.summary["state_sha256"]) if run.summary else "unfinished")
