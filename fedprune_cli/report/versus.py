"""Arm against arm: how much sooner each of a comparison reaches the target than each other one."""

from __future__ import annotations

from fedprune_cli.report.comparison import Comparison
from fedprune_cli.report.estimate import BY_KEY, Estimate, csv_cells, mean_over_seeds
from fedprune_cli.report.page import csv_text, html_section, html_table
from fedprune_cli.report.read import Run, crossing

QUANTITY = BY_KEY["time_reduction"]
NOTE = (
    "How much less simulated time to the target the arm of the row takes than that of the column, in %: paired over seeds, half the 95 % "
    "interval behind ±. -: one of them misses the target on a seed."
)


def less_time(comparison: Comparison, arm: str, other: str) -> Estimate | None:
    """Returns the share of `other`'s seconds to the target that `arm` saves, paired over seeds; None where either misses it on a seed."""
    pairs = zip(comparison.runs[arm], comparison.runs[other], strict=True)
    return mean_over_seeds([_saved(one, two, comparison.targets[one.seed]) for one, two in pairs])


def _saved(run: Run, other: Run, target: float) -> float | None:
    at, others = crossing(run, target), crossing(other, target)
    if at is None or others is None:
        return None
    return 1 - run.rounds[at].simulated_s / other.rounds[others].simulated_s


def versus_csv(comparison: Comparison) -> str:
    """Returns every pair of arms as CSV: mean, half width of the 95 % interval, seeds; empty where one misses the target."""
    arms = [*comparison.runs]
    rows = [
        [arm, other, *csv_cells(less_time(comparison, arm, other))] for arm in arms for other in arms if arm != other
    ]
    return csv_text(["arm", "than", "mean", "half_width_95", "seeds"], rows)


def versus_section(comparison: Comparison) -> list[str]:
    """Returns the pairs as a section of a page; nothing where the comparison has no target, or no third arm."""
    arms = [*comparison.runs]
    if comparison.reference is None or len(arms) < 3:
        return []
    rows = [
        [arm, *("" if arm == other else QUANTITY.cell(less_time(comparison, arm, other)) for other in arms)]
        for arm in arms
    ]
    return [
        html_section(
            "Less time to the target, arm against arm", html_table(["", *arms], rows) + f"<p class=note>{NOTE}</p>"
        )
    ]
