"""P1 said to cvxpy, as an independent check of kkt.py. The only place that imports cvxpy."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np

from fedprune_cli.allocate.inverse import LN2
from fedprune_cli.allocate.limits import SMALLEST
from fedprune_cli.allocate.problem import Problem, kept_fraction, resources
from fedprune_cli.errors import CertificateError
from fedprune_cli.store.state import Array


def solve_p1_cvxpy(problem: Problem) -> tuple[float, Array]:
    """Returns the optimal sum w x and the bandwidth [K] of a feasible P1 by Clarabel, from the DCP form of model.md section 4.

    Bandwidth is scaled by B / K and times by the deadline; unscaled, the conic solver fails. Raises CertificateError when it does.
    """
    kept, bandwidth_hz = _solve_shares(problem, fair=False)
    return float(problem.weight @ kept), bandwidth_hz


def solve_fair_cvxpy(problem: Problem) -> tuple[float, Array]:
    """Returns the optimal sum w ln x and the bandwidth [K] on P1's constraints; raises CertificateError."""
    kept, bandwidth_hz = _solve_shares(problem, fair=True)
    return float(problem.weight @ np.log(np.maximum(kept, SMALLEST))), bandwidth_hz


def _solve_shares(problem: Problem, *, fair: bool) -> tuple[Array, Array]:
    """Returns x [K] and b [K] of P1, or with w ln x in place of w x; raises CertificateError."""
    competes = (problem.payload_bits > 0) & (problem.snr_hz > 0)
    sends = np.flatnonzero(np.logical_and.reduce([competes, *(resource.left > 0 for resource in resources(problem))]))
    bandwidth_hz = problem.least_hz.copy()
    kept = np.minimum(1.0, kept_fraction(problem, bandwidth_hz))  # of those that send nothing
    if not len(sends):
        return kept, bandwidth_hz
    p = problem.take(sends)
    bandwidth_hz[sends] = 0.0
    unit_hz = (p.bandwidth_hz - bandwidth_hz.sum()) / len(sends)
    solution, x, b = dcp_p1(p, unit_hz, fair=fair)
    clarabel(solution)
    if b.value is None or solution.status not in ("optimal", "optimal_inaccurate"):
        raise CertificateError(f"cvxpy ended with status {solution.status}")
    bandwidth_hz[sends] = np.clip(b.value * unit_hz, p.least_hz, p.most_hz)
    kept[sends] = x.value
    return kept, bandwidth_hz * min(problem.bandwidth_hz / bandwidth_hz.sum(), 1.0)


def dcp_p1(p: Problem, unit_hz: float, *, fair: bool = False) -> tuple[cp.Problem, cp.Variable, cp.Variable]:
    """Returns P1 for devices that all send, and its variables: x, and b in units of `unit_hz`, which sum to K; fair: of w ln x."""
    size = len(p.weight)
    s, x, b = p.snr_hz / unit_hz, cp.Variable(size), cp.Variable(size)
    constraints = [
        cp.sum(b) <= size,
        b >= p.least_hz / unit_hz,
        b <= p.most_hz / unit_hz,
        x <= 1,
        x >= p.min_kept,
    ]
    for resource in resources(p):
        # in units of what is left: x (a + c / r) <= 1
        a, c = resource.work / resource.left, resource.transfer / unit_hz / resource.left
        for k in np.flatnonzero(np.isfinite(resource.left)):
            # b log2(1 + s/b) = -rel_entr(b, b + s) / ln 2, divided by c so that the numbers stay near 1
            shannon = -cp.rel_entr(b[k], b[k] + s[k]) / (LN2 * c[k])
            capped = [] if p.log_cap is None or np.isinf(p.log_cap[k]) else [b[k] * (p.log_cap[k] / (LN2 * c[k]))]
            for bps in (shannon, *capped):
                constraints.append(x[k] <= (bps if a[k] == 0 else (1 - cp.inv_pos(1 + a[k] * bps)) / a[k]))
    solution = (
        cp.Problem(cp.Maximize(p.weight @ (cp.log(x) if fair else x) / p.weight.max()), constraints)
        if p.weight.max() > 0
        else cp.Problem(cp.Minimize(0), constraints)
    )
    return solution, x, b


def solve_energy_cvxpy(problem: Problem, kept: Array, theta: float | None = None) -> float:
    """Returns the fewest joules of sending x = `kept` [K] by the deadline; theta: plus so many per second, at the best of all deadlines.

    With v(T) the time that is left to send, r(b) >= bits / v is concave above convex. Raises CertificateError.
    """
    bits, spends = kept * problem.payload_bits, problem.spends
    sends = np.flatnonzero(bits > 0)
    if spends is None or not len(sends):
        return (theta or 0.0) * problem.deadline_s
    silent_hz = np.delete(problem.least_hz, sends).sum()
    unit_hz, unit_s = (problem.bandwidth_hz - silent_hz) / len(sends), problem.deadline_s
    b, T = cp.Variable(len(sends)), cp.Variable()
    work_s = problem.fixed_s + kept * problem.shared_compute_s
    constraints = [cp.sum(b) <= len(sends), b >= problem.least_hz[sends] / unit_hz, b <= problem.most_hz[sends] / unit_hz,
                   (T <= 1) if theta is None else (work_s.max() / unit_s <= T)]  # fmt: skip
    cost_j = []
    for at, k in enumerate(sends):
        # in units of what it sends in the unit of time
        unit = LN2 * bits[k] / unit_hz / unit_s
        bps = -cp.rel_entr(b[at], b[at] + problem.snr_hz[k] / unit_hz) / unit
        if problem.log_cap is not None and np.isfinite(problem.log_cap[k]):
            bps = cp.minimum(bps, b[at] * (problem.log_cap[k] / unit))
        constraints.append(bps >= cp.inv_pos(T - work_s[k] / unit_s))
        left_j = spends.energy_budget_j[k] - spends.fixed_energy_j[k] - kept[k] * spends.shared_energy_j[k]
        if np.isfinite(left_j):
            constraints.append(bps * (left_j / spends.tx_power_w[k] / unit_s) >= 1)
        cost_j.append(spends.tx_power_w[k] * unit_s * cp.inv_pos(bps))
    unit_j = float(spends.tx_power_w[sends].sum()) * unit_s
    cost = (cp.sum(cp.hstack(cost_j)) + (theta or 0.0) * unit_s * T) / unit_j
    solution = cp.Problem(cp.Minimize(cost), constraints)
    clarabel(solution)
    if solution.status not in ("optimal", "optimal_inaccurate"):
        raise CertificateError(f"cvxpy ended with status {solution.status}")
    return float(solution.value) * unit_j


CLARABEL_OPTIONS = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}


def clarabel(solution: cp.Problem) -> None:
    """Solves in place; raises CertificateError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            solution.solve(solver=cp.CLARABEL, **CLARABEL_OPTIONS)
        except cp.SolverError as error:
            raise CertificateError(f"cvxpy could not solve the round: {error}") from None


def clarabel_alone(solution: cp.Problem) -> Callable[[], object]:
    """Returns the solver's own work on the problem, which cvxpy compiles here and not when it is called."""
    data, chain, _ = solution.get_problem_data(cp.CLARABEL)
    return lambda: chain.solver.solve_via_data(data, False, False, CLARABEL_OPTIONS)
