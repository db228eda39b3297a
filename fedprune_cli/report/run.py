"""One run's report: its page, its tables as CSV, and what terminals and programs get. Of a run folder it changes report/ only."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedprune_cli.report import figures
from fedprune_cli.report.drawing import Drawing
from fedprune_cli.report.page import (
    csv_text,
    html_details,
    html_figure,
    html_page,
    html_section,
    html_table,
    percent,
    seconds,
    write_files,
)
from fedprune_cli.report.presence import presence, presence_json
from fedprune_cli.report.read import Run, read_run
from fedprune_cli.report.tables import FAULT_TITLES, device_table, fault_counts, round_table
from fedprune_cli.terminal import Table

CONVERGENCE_NOTE = (
    "Left: the squared norm of the mean gradient that the updates imply, averaged over the rounds so far, and c1/sqrt(R) + c2 (mean "
    "pruning error) + c3 fitted to it: the shape of the convergence bound, not a prediction. Right: the pruning error, with which the "
    "bound's floor grows."
)
CAPTIONS = {
    "accuracy": "Accuracy of each device's own model on its own test samples, and of a device that never trained.",
    "latency": "Each round lasts as long as its slowest device; the lines are what the same round costs without pruning.",
    "allocation": "What each device was given: mean over the rounds, and the 10th to 90th percentile.",
    "convergence": CONVERGENCE_NOTE,
    "partition": "Samples of each class on each device; those above the red line never train.",
}


def write_report(path: Path, out: Path | None = None) -> Path:
    """Writes a run's index.html, figures as SVG, rounds.csv, devices.csv and histogram.csv into report/, or `out`; returns the page."""
    run = read_run(path)
    drawn = drawings(run)
    pictures = {f"{name}.svg": drawing.svg() for name, drawing in drawn.items()}
    return write_files(out or path / "report", {"index.html": _page(run, drawn), **_csv_files(run), **pictures})


def run_table(run: Run) -> Table:
    """Returns the run's figures for the terminal."""
    return Table.of_facts(f"{run.method}, seed {run.seed}", facts(run))


def run_json(run: Run, page: Path) -> dict[str, object]:
    """Returns the run for programs: its summary, None while it is unfinished, its folder, the report's page, and who took part."""
    return {
        "run_dir": str(run.path),
        "report": str(page),
        "rounds": len(run.rounds),
        "presence": presence_json(run),
        "summary": run.summary,
    }


def drawings(run: Run) -> dict[str, Drawing]:
    training = len(run.manifest["train_samples"]) - run.manifest["fresh_devices"]
    return {
        "accuracy": figures.accuracy_figure(run.rounds),
        "latency": figures.latency_figure(run.rounds),
        "allocation": figures.allocation_figure(run.rounds),
        "convergence": figures.convergence_figure(run.rounds),
        "partition": figures.partition_figure(run.manifest["histogram"], training),
    }


def _page(run: Run, drawn: Mapping[str, Drawing]) -> str:
    answer = (
        f"{run.method}, seed {run.seed}: device accuracy {percent(run.final.accuracy)} after {len(run.rounds)} rounds "
        f"and {seconds(run.rounds[-1].simulated_s)} of simulated time."
    )
    state = html.escape(str(run.summary["state_sha256"]) if run.summary else "unfinished")
    body = [
        f"<p class=answer>{html.escape(answer)}</p>",
        *(html_figure(name, drawing, CAPTIONS[name]) for name, drawing in drawn.items()),
        html_section("Figures of the run", html_table(["figure", "value"], facts(run))),
        html_section("Certificate", html_table(["figure", "value"], _certificate_facts(run))),
        *fault_sections({run.method: (run,)}),
        html_section("Reproduce", f"<p>State: <code>{state}</code></p>" + ingredients(run)),
    ]
    return html_page(f"{run.method}, seed {run.seed}", body)


def _csv_files(run: Run) -> dict[str, str]:
    classes = [f"class_{at}" for at in range(run.manifest["dataset"]["num_classes"])]
    histogram = [[run.called(device), *counts] for device, counts in enumerate(run.manifest["histogram"])]
    return {
        "rounds.csv": csv_text(*round_table(run)),
        "devices.csv": csv_text(*device_table(run)),
        "histogram.csv": csv_text(["device", *classes], histogram),
    }


def ingredients(run: Run) -> str:
    """Returns what a run was made of as HTML, to open when wanted."""
    manifest = run.manifest
    parts = {
        "Configuration": manifest["config"],
        "Versions": manifest["versions"],
        "Data": manifest["dataset"],
        "Model": manifest["model"],
    }
    return "".join(html_details(title, values) for title, values in parts.items())


def facts(run: Run) -> list[list[str]]:
    final, rounds, there = run.final, run.rounds, presence(run)
    ratios = [r.mean_ratio for r in rounds if r.mean_ratio is not None]
    facts = [
        ["rounds", str(len(rounds))],
        ["simulated time", seconds(rounds[-1].simulated_s)],
        ["latency per round, mean", seconds(float(np.mean([r.latency_s for r in rounds])))],
        ["final accuracy, weighted by samples", percent(final.accuracy)],
        ["final accuracy, unweighted", percent(final.accuracy_mean)],
        ["final accuracy, 10th percentile of devices", percent(final.accuracy_p10)],
        ["rounds of the device that took part in the fewest", f"{min(there.rounds, default=0)} of {len(rounds)}"],
        *([["left out for good", str(there)]] if str(there) else []),
        ["accuracy on a fresh device", percent(final.fresh_accuracy)],
        ["pruning ratio, mean", "-" if not ratios else f"{np.mean(ratios):.3f}"],
        ["pruned are", _granularity(run)],
        ["sent by all devices", f"{sum(r.bytes_up for r in rounds) / 1e6:.4g} MB"],
        ["energy of all devices", f"{sum(r.joules for r in rounds):.4g} J"],
    ]
    if begun := run.manifest["config"].get("branch"):
        facts.insert(1, ["a branch", f"of {begun['run']}, from its round {begun['round']} on"])
    if run.summary and run.summary["time_to_target_s"] is not None:
        facts.append(["time to the target accuracy", seconds(run.summary["time_to_target_s"])])
    return facts


def _granularity(run: Run) -> str:
    if all(not record.max_ratio for record in run.rounds):
        return "none"
    if run.manifest["config"]["pruner"]["granularity"] == "channel":
        return "whole channels: the model is smaller"
    return "single entries: the computation they save is modelled, masks save none"


def _certificate_facts(run: Run) -> list[list[str]]:
    status = [r.status for r in run.rounds]
    proofs = [(r.residual, abs(r.gap)) for r in run.rounds if r.residual is not None and r.gap is not None]
    facts = [["rounds " + name, str(status.count(name))] for name in dict.fromkeys(status)]
    if proofs:
        facts.append(["largest KKT residual", f"{max(residual for residual, _ in proofs):.2e}"])
        facts.append(["largest duality gap, relative", f"{max(gap for _, gap in proofs):.2e}"])
    elif gaps := [r.gap for r in run.rounds if r.gap is not None]:
        facts.append(["certificate", "a bound, and no optimality"])
        facts.append(["largest gap to the bound, relative", f"{max(gaps):.2e}"])
    else:
        facts.append(["certificate", "none: this allocator claims no optimality of P1"])
    return facts


def fault_sections(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Returns the section on faults and fail-safes, or nothing when no round of any run names one."""
    records_of = {name: [record for run in group for record in run.rounds] for name, group in runs.items()}
    counts = {name: fault_counts(records, list(FAULT_TITLES)) for name, records in records_of.items()}
    shown = [at for at in range(len(FAULT_TITLES)) if any(count[at] for count in counts.values())]
    if not shown:
        return []
    titles = list(FAULT_TITLES.values())
    rows = [[titles[at], *(str(count[at]) for count in counts.values())] for at in shown]
    waited = [sum(record.faults.waited_s for record in records if record.faults) for records in records_of.values()]
    rows.append(["waited for what did not come", *(seconds(value) for value in waited)])
    rules = "".join(f"<li>{html.escape(name)}: {html.escape(_rules(group[0]))}</li>" for name, group in runs.items())
    note = "<p class=note>Device-rounds. What the server did:</p>"
    return [html_section("Faults and fail-safes", html_table(["", *runs], rows) + f"{note}<ul>{rules}</ul>")]


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
