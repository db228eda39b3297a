"""The other problems on P1's equations: min-max, P2 and the frontier P3 (model.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedprune_cli.allocate.deadline import dense_deadline, least_feasible
from fedprune_cli.allocate.kkt import certify, solve_p1
from fedprune_cli.allocate.policy import can_meet, listed, settle, solve_under_policy
from fedprune_cli.allocate.problem import (
    TIGHT,
    Allocation,
    Problem,
    fit_band,
    kept_on,
    most_kept,
    required_bandwidth,
    resources,
)
from fedprune_cli.errors import ConfigError, InfeasibleError
from fedprune_cli.store.state import Array

MAX_FRACTION = 1e6  # of the dense optimum


def common_kept(problem: Problem, asked: float) -> Array:
    """Returns what all devices can keep alike [K], each within its own bounds: `asked`, or as much of it as the band has room for."""
    most = most_kept(problem) * (1 - TIGHT)  # of a limit its own root is the last digit too much

    def kept(common: float) -> Array:
        return np.minimum(np.maximum(problem.min_kept, common), np.maximum(most, problem.min_kept))

    def fits(common: float) -> bool:
        return bool(required_bandwidth(problem, kept(common)).sum() <= problem.bandwidth_hz)

    low, high = 0.0, asked
    if fits(asked):
        return kept(asked)
    while high - low > 1e-15:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if fits(middle) else (low, middle)
        if middle in (low, high) and high - low <= np.spacing(high):
            break
    return kept(low)


def min_max(problem: Problem) -> tuple[Array, float]:
    """Returns the bandwidth [K] that makes the largest ratio as small as possible, and no price (0)."""
    bandwidth_hz = required_bandwidth(problem, common_kept(problem, 1.0))
    total_hz = bandwidth_hz.sum()
    if total_hz <= problem.bandwidth_hz:  # what is left is shared in proportion
        bandwidth_hz = bandwidth_hz * min(problem.bandwidth_hz / max(total_hz, 1e-300), 1 / TIGHT)
    else:
        bandwidth_hz = fit_band(problem, bandwidth_hz)
    return np.minimum(bandwidth_hz, problem.most_hz), 0.0


def mean_ratio(problem: Problem, kept: Array) -> float:
    """Returns the weighted mean pruning ratio of devices that keep `kept` [K]; 0 when none has a weight."""
    total = problem.weight.sum()
    return float(problem.weight @ (1 - kept)) / total if total else 0.0


def min_latency(problem: Problem, budget: float) -> float:
    """Returns P2's deadline: the smallest T at which the weighted mean ratio of P1 is at most `budget`.

    Raises InfeasibleError when devices without a link or energy budgets keep the mean ratio above it at any deadline.
    """
    low, high = least_feasible(problem), dense_deadline(problem)[0]

    def ratio_at(deadline_s: float) -> float:
        at = replace(problem, deadline_s=deadline_s)
        return mean_ratio(at, kept_on(at, solve_p1(at)[0]))

    if ratio_at(low) <= budget:
        return low
    if len(resources(problem)) > 1 or not problem.linked.all():
        high = max(low, high) * 2**20  # only the energy budgets bind that late
        if (least_ratio := ratio_at(high)) > budget:
            lost = problem.names[~problem.linked]
            alone = f"devices {listed(lost)} without a link" if len(lost) else "the energy budgets alone"
            raise InfeasibleError(
                f"no deadline brings the weighted mean ratio to {budget:g}: {alone} cost {least_ratio:.4g}; "
                "raise devices.energy_budget_j or allocator.mean_ratio"
            )
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if ratio_at(middle) <= budget else (middle, high)
    return high


def deadlines_at(problem: Problem, fractions: Sequence[float]) -> Array:
    """Returns the deadlines, in seconds, that are these fractions of the dense optimum; raises ConfigError naming one that is not."""
    for fraction in fractions:
        if not 0 < fraction <= MAX_FRACTION:
            allowed = f"must be > 0 and at most {MAX_FRACTION:g}"
            raise ConfigError(f"fractions: {fraction:g} is not allowed: {allowed}", key="fractions")
    dense_s = dense_deadline(problem)[0]
    return np.array([fraction * dense_s for fraction in fractions])


def frontier_answers(problem: Problem, fractions: Sequence[float]) -> list[tuple[Problem, Allocation | None]]:
    """Returns P1 at deadlines that are fractions of the dense optimum, each with its optimum, None where it is infeasible.

    Devices that no deadline helps, for want of a link, are left out. Raises ConfigError naming a fraction that is none.
    """
    deadlines = deadlines_at(problem, fractions)
    settled = settle(replace(problem, deadline_s=np.inf), "stretch", least_feasible)
    answers = list[tuple[Problem, Allocation | None]]()
    for deadline_s in deadlines.tolist():
        at = replace(settled.feasible, deadline_s=deadline_s)
        possible = settled.admitted.any() and can_meet(at, least_feasible(at), least_feasible)
        best = solve_under_policy(at, "fail", solve_p1, least_feasible, certify) if possible else None
        answers.append((at, best))
    return answers


def frontier(problem: Problem, fractions: Sequence[float]) -> tuple[Array, Array]:
    """Returns P3: deadlines in seconds, given as fractions of the dense optimum, and the least mean ratio; NaN where infeasible.

    Devices that no deadline helps, for want of a link, are left out. Raises ConfigError naming a fraction that is none.
    """
    answers = frontier_answers(problem, fractions)
    ratios = [np.nan if best is None else least_mean(at, best) for at, best in answers]
    return np.array([at.deadline_s for at, _ in answers]), np.array(ratios)


def least_mean(problem: Problem, best: Allocation) -> float:
    """Returns the weighted mean ratio of P1's optimum; 0 when no device has a weight."""
    total = problem.weight.sum()
    return float(1 - best.objective / total) if total else 0.0
