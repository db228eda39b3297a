"""The other problems on P1's equations: min-max, P2 and the frontier P3 (model.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedprune_cli.allocate.deadline import dense_deadline, least_feasible
from fedprune_cli.allocate.kkt import solve_p1
from fedprune_cli.allocate.policy import solve_under_policy
from fedprune_cli.allocate.problem import TIGHT, Problem, kept_on, most_kept, required_bandwidth, resources
from fedprune_cli.errors import InfeasibleError
from fedprune_cli.store.state import Array


def min_max(problem: Problem) -> tuple[Array, float]:
    """Returns the bandwidth [K] that makes the largest ratio as small as possible, and no price (0)."""
    most = most_kept(problem) * (1 - TIGHT)  # of a limit its own root is the last digit too much

    def needs(common: float) -> Array:
        return required_bandwidth(
            problem, np.minimum(np.maximum(problem.min_kept, common), np.maximum(most, problem.min_kept))
        )

    low, high = 0.0, 1.0
    if needs(1.0).sum() > problem.bandwidth_hz:
        while high - low > 1e-15:
            middle = 0.5 * (low + high)
            low, high = (middle, high) if needs(middle).sum() <= problem.bandwidth_hz else (low, middle)
            if middle in (low, high) and high - low <= np.spacing(high):
                break
    else:
        low = 1.0
    bandwidth_hz = needs(low)
    share = min(problem.bandwidth_hz / max(bandwidth_hz.sum(), 1e-300), 1 / TIGHT)
    return np.minimum(bandwidth_hz * share, problem.most_hz), 0.0


def min_latency(problem: Problem, budget: float) -> float:
    """Returns P2's deadline: the smallest T at which the weighted mean ratio of P1 is at most `budget`.

    Raises InfeasibleError when energy budgets keep the mean ratio above it at any deadline.
    """
    total = problem.weight.sum()
    low, high = least_feasible(problem), dense_deadline(problem)[0]

    def mean_ratio(deadline_s: float) -> float:
        at = replace(problem, deadline_s=deadline_s)
        b, _ = solve_p1(at)
        return float(at.weight @ (1 - kept_on(at, b))) / total if total else 0.0

    if mean_ratio(low) <= budget:
        return low
    if len(resources(problem)) > 1:
        high = max(low, high) * 2**20  # only the energy budgets bind that late
        if mean_ratio(high) > budget:
            raise InfeasibleError(
                f"no deadline brings the weighted mean ratio to {budget:g}: the energy budgets alone cost {mean_ratio(high):.4g}; "
                "raise devices.energy_budget_j or allocator.mean_ratio"
            )
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if mean_ratio(middle) <= budget else (middle, high)
    return high


def frontier(problem: Problem, fractions: Sequence[float]) -> tuple[Array, Array]:
    """Returns P3: deadlines in seconds, given as fractions of the dense optimum, and the least mean ratio; NaN where infeasible."""
    dense_s = dense_deadline(problem)[0]
    deadlines = np.array([fraction * dense_s for fraction in fractions])
    ratios = np.full(len(deadlines), np.nan)
    for i, deadline_s in enumerate(deadlines):
        at = replace(problem, deadline_s=float(deadline_s))
        if least_feasible(at) <= deadline_s * (1 + TIGHT):
            ratios[i] = (
                1
                - solve_under_policy(at, "fail", solve_p1, least_feasible, exact=True).objective / problem.weight.sum()
            )
    return deadlines, ratios
