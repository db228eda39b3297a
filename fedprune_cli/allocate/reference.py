"""P1 said to cvxpy, as an independent check of kkt.py. The only place that imports cvxpy."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np

from fedprune_cli.allocate.inverse import LN2
from fedprune_cli.allocate.problem import Problem, kept_fraction, resources
from fedprune_cli.errors import CertificateError
from fedprune_cli.store.state import Array


def solve_p1_cvxpy(problem: Problem) -> tuple[float, Array]:
    """Returns the optimal sum w x and the bandwidth [K] of a feasible P1 by Clarabel, from the DCP form of model.md section 4.

    Bandwidth is scaled by B / K and times by the deadline; unscaled, the conic solver fails. Raises CertificateError when it does.
    """
    competes = (problem.payload_bits > 0) & (problem.snr_hz > 0)
    sends = np.flatnonzero(np.logical_and.reduce([competes, *(resource.left > 0 for resource in resources(problem))]))
    bandwidth_hz = problem.least_hz.copy()
    silent = np.setdiff1d(np.arange(len(problem.weight)), sends)
    kept = np.minimum(1.0, kept_fraction(problem, bandwidth_hz))  # of those that send nothing
    if not len(sends):
        return float(problem.weight @ kept), bandwidth_hz
    p = problem.take(sends)
    bandwidth_hz[sends] = 0.0
    unit_hz = (p.bandwidth_hz - bandwidth_hz.sum()) / len(sends)
    solution, x, b = dcp_p1(p, unit_hz)
    clarabel(solution)
    if b.value is None or solution.status not in ("optimal", "optimal_inaccurate"):
        raise CertificateError(f"cvxpy ended with status {solution.status}")
    bandwidth_hz[sends] = np.clip(b.value * unit_hz, p.least_hz, p.most_hz)
    objective = float(p.weight @ x.value + problem.weight[silent] @ kept[silent])
    return objective, bandwidth_hz * min(problem.bandwidth_hz / bandwidth_hz.sum(), 1.0)


def dcp_p1(p: Problem, unit_hz: float) -> tuple[cp.Problem, cp.Variable, cp.Variable]:
    """Returns P1 for devices that all send, and its variables: x, and b in units of `unit_hz`, which sum to K."""
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
            bps = -cp.rel_entr(b[k], b[k] + s[k]) / (LN2 * c[k])
            constraints.append(x[k] <= (bps if a[k] == 0 else (1 - cp.inv_pos(1 + a[k] * bps)) / a[k]))
    solution = (
        cp.Problem(cp.Maximize(p.weight @ x / p.weight.max()), constraints)
        if p.weight.max() > 0
        else cp.Problem(cp.Minimize(0), constraints)
    )
    return solution, x, b


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
