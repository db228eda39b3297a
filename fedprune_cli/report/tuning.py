"""How the arms of a comparison were tuned: what each tried on a seed of its own, what it took, and why, as tables and for programs."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedprune_cli.report.comparison import TARGET_MARGIN, run_figures
from fedprune_cli.report.estimate import BY_KEY
from fedprune_cli.report.page import csv_text, html_section, html_table
from fedprune_cli.report.read import HELD_ROUNDS, Run, held_accuracy
from fedprune_cli.terminal import Table

KEYS = ("time_to_target_s", "accuracy", "latency_s", "accuracy_p10", "least_rounds", "mean_ratio")
TITLES = ("seconds to target", "acc. %", "s per round", "p10 %", "least rounds", "mean ratio")
UNCHANGED = "as it is"  # a setting without overrides


@dataclass(frozen=True)
class Trial:
    """A setting that an arm tried: its run, or why it has none."""

    arm: str
    setting: str
    run: Run | None
    failure: str | None = None


@dataclass(frozen=True)
class Tuned:
    """What came of the trials on the tuning seed.

    reference: the arm that set the `target`, at the first of its own settings; chosen: arm -> the setting that it took, of those that
    had more than one to choose from.
    """

    seed: int
    reference: str
    target: float
    trials: tuple[Trial, ...]
    chosen: Mapping[str, str]


def target_of(base: Run) -> float:
    """Returns the target that a run of the reference sets: what it holds, minus the margin (model.md, section 7)."""
    return held_accuracy(base) - TARGET_MARGIN


def best_of(trials: Sequence[Trial], target: float) -> Trial | None:
    """Returns the trial with the least simulated time to the target; None where every one failed.

    Of equal ones, and where all miss the target, it is the most accurate, and of those the first.
    """

    def cost(trial: Trial) -> tuple[float, float]:
        figures = _figures(trial, target)
        time_s, accuracy = figures["time_to_target_s"], figures["accuracy"]
        return math.inf if time_s is None else time_s, -(accuracy or 0.0)

    return min((trial for trial in trials if trial.run is not None), key=cost, default=None)


def _figures(trial: Trial, target: float) -> Mapping[str, float | None]:
    return dict.fromkeys(KEYS) if trial.run is None else run_figures(trial.run, None, target)


def _took(tuned: Tuned, trial: Trial) -> bool:
    return tuned.chosen.get(trial.arm) == trial.setting


def _rows(tuned: Tuned) -> list[list[str]]:
    """Returns a row a trial, its figures as text."""
    rows = []
    for trial in tuned.trials:
        cells = _figures(trial, tuned.target)
        shown = ["-" if (value := cells[key]) is None else BY_KEY[key].show(value) for key in KEYS]
        if trial.run is not None and cells["time_to_target_s"] is None:
            shown[0] = "missed"
        if trial.failure is not None:
            shown[0] = "failed"
        rows.append([trial.arm, trial.setting, "taken" if _took(tuned, trial) else "", *shown])
    return rows


def tuning_table(tuned: Tuned) -> Table:
    """Returns the trials for the terminal, a row each."""
    title = f"tried on seed {tuned.seed}, to reach {100 * tuned.target:.2f} %"
    return Table.of(title, ["", "setting", "taken", *TITLES], _rows(tuned), folding=["setting", "taken"])


def tuning_csv(tuned: Tuned) -> str:
    """Returns the trials as CSV, unrounded."""
    rows = [
        [trial.arm, trial.setting, _took(tuned, trial), trial.failure, *map(_figures(trial, tuned.target).get, KEYS)]
        for trial in tuned.trials
    ]
    return csv_text(["arm", "setting", "taken", "failure", *KEYS], rows)


def tuning_json(tuned: Tuned | None) -> dict[str, object] | None:
    """Returns the trials for programs; None where nothing was tuned."""
    if tuned is None:
        return None
    trials = [
        {"arm": trial.arm, "setting": trial.setting, "taken": _took(tuned, trial), "failure": trial.failure}
        | {key: _figures(trial, tuned.target)[key] for key in KEYS}
        | {"run": None if trial.run is None else str(trial.run.path)}
        for trial in tuned.trials
    ]
    return {"seed": tuned.seed, "target": tuned.target, "trials": trials}


def tuning_section(tuned: Tuned | None) -> list[str]:
    """Returns the section of a page on the trials, or nothing where nothing was tuned."""
    if tuned is None:
        return []
    note = (
        f"Each arm was compared at the setting with which it reached the target soonest on seed {tuned.seed}, which is not reported. "
        f"The target there, {100 * tuned.target:.2f} %, is what {tuned.reference} held over its last {HELD_ROUNDS} rounds at the first of "
        f"its own settings, minus {100 * TARGET_MARGIN} points. Who misses it loses; among equals, and where all miss it, the more "
        "accurate is taken."
    )
    table = html_table(["", "setting", "taken", *TITLES], _rows(tuned))
    failures = [[f"{one.arm}, {one.setting}", one.failure] for one in tuned.trials if one.failure is not None]
    failed = html_table(["", "failed"], failures) if failures else ""
    return [html_section("How each arm was tuned", f"{table}{failed}<p class=note>{html.escape(note)}</p>")]
