"""How the arms of a comparison were tuned: what each tried on seeds of their own, what it took, and why, as tables and for programs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
    """A setting that an arm tried: its runs, one on each tuning seed in their order, or why it has none."""

    arm: str
    setting: str
    runs: tuple[Run, ...]
    failure: str | None = None


@dataclass(frozen=True)
class Tuned:
    """What came of the trials on the tuning seeds.

    reference: the arm that sets the targets, at the first of its own settings; bases: tuning seed -> its run; chosen: arm -> the setting
    that it took, of those that had more than one to choose from.
    """

    reference: str
    bases: Mapping[int, Run]
    trials: tuple[Trial, ...]
    chosen: Mapping[str, str]

    @property
    def on(self) -> str:
        """Returns the tuning seeds in words."""
        return ("seed " if len(self.bases) == 1 else "seeds ") + ", ".join(map(str, self.bases))

    @property
    def targets(self) -> str:
        """Returns the targets in words."""
        return ", ".join(f"{100 * target_of(base):.2f}" for base in self.bases.values()) + " %"


def target_of(base: Run) -> float:
    """Returns the target that a run of the reference sets: what it holds, minus the margin (model.md, section 7)."""
    return held_accuracy(base) - TARGET_MARGIN


def round_s(run: Run) -> float:
    """Returns a run's median seconds per round."""
    return float(np.median([record.latency_s for record in run.rounds]))


def best_of(trials: Sequence[Trial], bases: Mapping[int, Run]) -> Trial | None:
    """Returns the trial that misses the target on the fewest seeds, of these the soonest one; None where every one failed.

    How soon is the mean over the seeds that reach it of the simulated time to the target in the reference's median seconds per round there,
    since sites differ. Of equal ones, and where all miss it, it is the most accurate, and of those the first.
    """

    def cost(trial: Trial) -> tuple[int, float, float]:
        of = [run_figures(run, None, target_of(base)) for run, base in zip(trial.runs, bases.values(), strict=True)]
        took = [
            time_s / round_s(base)
            for figures, base in zip(of, bases.values(), strict=True)
            if (time_s := figures["time_to_target_s"]) is not None
        ]
        soon = sum(took) / len(took) if took else 0.0
        return len(of) - len(took), soon, -sum(figures["accuracy"] or 0.0 for figures in of)

    return min((trial for trial in trials if trial.runs), key=cost, default=None)


def _figures(trial: Trial, tuned: Tuned) -> tuple[Mapping[str, float | None], int]:
    """Returns the means over the tuning seeds, None where a seed has none, and on how many seeds the target is missed."""
    of = [run_figures(run, None, target_of(base)) for run, base in zip(trial.runs, tuned.bases.values(), strict=False)]
    means = {key: _mean([figures[key] for figures in of]) for key in KEYS}
    return means, sum(figures["time_to_target_s"] is None for figures in of)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if values and len(there) == len(values) else None


def _took(tuned: Tuned, trial: Trial) -> bool:
    return tuned.chosen.get(trial.arm) == trial.setting


def _rows(tuned: Tuned) -> list[list[str]]:
    """Returns a row a trial, its figures as text."""
    rows = []
    for trial in tuned.trials:
        cells, missed = _figures(trial, tuned)
        shown = ["-" if (value := cells[key]) is None else BY_KEY[key].show(value) for key in KEYS]
        if missed:
            shown[0] = "missed" if len(tuned.bases) == 1 else f"missed on {missed} of {len(tuned.bases)}"
        if trial.failure is not None:
            shown[0] = "failed"
        rows.append([trial.arm, trial.setting, "taken" if _took(tuned, trial) else "", *shown])
    return rows


def tuning_table(tuned: Tuned) -> Table:
    """Returns the trials for the terminal, a row each."""
    title = f"tried on {tuned.on}, to reach {tuned.targets}"
    return Table.of(title, ["", "setting", "taken", *TITLES], _rows(tuned), folding=["setting", "taken"])


def tuning_csv(tuned: Tuned) -> str:
    """Returns the trials as CSV, unrounded."""
    rows = [
        [trial.arm, trial.setting, _took(tuned, trial), trial.failure, missed, *map(cells.get, KEYS)]
        for trial in tuned.trials
        for cells, missed in [_figures(trial, tuned)]
    ]
    return csv_text(["arm", "setting", "taken", "failure", "missed", *KEYS], rows)


def tuning_json(tuned: Tuned | None) -> dict[str, object] | None:
    """Returns the trials for programs; None where nothing was tuned."""
    if tuned is None:
        return None
    trials = [
        {"arm": trial.arm, "setting": trial.setting, "taken": _took(tuned, trial), "failure": trial.failure}
        | {"missed": missed, **{key: cells[key] for key in KEYS}}
        | {"runs": [str(run.path) for run in trial.runs]}
        for trial in tuned.trials
        for cells, missed in [_figures(trial, tuned)]
    ]
    return {
        "seeds": [*tuned.bases],
        "targets": [target_of(base) for base in tuned.bases.values()],
        "trials": trials,
    }


def tuning_section(tuned: Tuned | None) -> list[str]:
    """Returns the section of a page on the trials, or nothing where nothing was tuned."""
    if tuned is None:
        return []
    note = (
        f"Each arm was compared at the setting with which it reached the target soonest on {tuned.on}, not reported: by the mean of its "
        f"times, each in the reference's median seconds per round there. The target, {tuned.targets}, is what {tuned.reference} held over "
        f"its last {HELD_ROUNDS} rounds at the first of its own settings, minus {100 * TARGET_MARGIN} points. Who misses it on more seeds "
        "loses; among equals, and where all miss it, the more accurate is taken. Figures are means over these seeds."
    )
    table = html_table(["", "setting", "taken", *TITLES], _rows(tuned))
    failures = [[f"{one.arm}, {one.setting}", one.failure] for one in tuned.trials if one.failure is not None]
    failed = html_table(["", "failed"], failures) if failures else ""
    return [html_section("How each arm was tuned", f"{table}{failed}<p class=note>{html.escape(note)}</p>")]
