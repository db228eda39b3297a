"""Arm against arm: how much sooner each of a comparison reaches the target than each other one."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune_cli.report.comparison import Comparison
from fedprune_cli.report.estimate import BY_KEY, Estimate, csv_cells, mean_over_seeds
from fedprune_cli.report.page import csv_text, html_section, html_table
from fedprune_cli.report.read import Run, crossing

QUANTITY = BY_KEY["time_reduction"]
NOTE = (
    "How much less simulated time to the target the arm of the row takes than that of the column, in %: paired over seeds, half the 95 % "
    "interval behind ±. At least: the arm of the column misses the target on a seed, and counts there as if its run had ended with it. "
    "-: the arm of the row misses it on a seed."
)


@dataclass(frozen=True)
class Versus:
    """How much of another arm's seconds to the target an arm saves, paired over seeds, None where the arm misses it on a seed.

    others_miss: on how many seeds the other misses it. There it counts with the seconds of its whole run, so that the saving is at least
    what is said.
    """

    saved: Estimate | None
    others_miss: int

    def cell(self) -> str:
        """Returns it as a table has it, in %."""
        return "at least " * (self.others_miss > 0 and self.saved is not None) + QUANTITY.cell(self.saved)


def versus(comparison: Comparison, arm: str, other: str) -> Versus:
    """Returns how much sooner an arm reaches the target than another."""
    pairs = [*zip(comparison.runs[arm], comparison.runs[other], strict=True)]
    targets = comparison.targets
    miss = sum(crossing(two, targets[two.seed]) is None for _, two in pairs)
    return Versus(mean_over_seeds([_saved(one, two, targets[one.seed]) for one, two in pairs]), miss)


def _saved(run: Run, other: Run, target: float) -> float | None:
    at, others = crossing(run, target), crossing(other, target)
    if at is None:
        return None
    return 1 - run.rounds[at].simulated_s / other.rounds[-1 if others is None else others].simulated_s


def versus_csv(comparison: Comparison) -> str:
    """Returns every pair of arms as CSV: mean, half width of the 95 % interval, seeds, empty where the arm misses the target on a seed, and
    on how many seeds the other does, with which the mean is the least that is saved.
    """
    arms = [*comparison.runs]
    pairs = [(arm, other, versus(comparison, arm, other)) for arm in arms for other in arms if arm != other]
    rows = [[arm, other, *csv_cells(one.saved), one.others_miss] for arm, other, one in pairs]
    return csv_text(["arm", "than", "mean", "half_width_95", "seeds", "others_miss"], rows)


def versus_section(comparison: Comparison) -> list[str]:
    """Returns the pairs as a section of a page; nothing where the comparison has no target, or no third arm."""
    arms = [*comparison.runs]
    if comparison.reference is None or len(arms) < 3:
        return []
    rows = [[arm, *("" if arm == other else versus(comparison, arm, other).cell() for other in arms)] for arm in arms]
    return [
        html_section(
            "Less time to the target, arm against arm", html_table(["", *arms], rows) + f"<p class=note>{NOTE}</p>"
        )
    ]
