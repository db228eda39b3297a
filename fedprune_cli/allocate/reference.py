"""P1 said to cvxpy, as an independent check of kkt.py. The only place that imports cvxpy."""

from __future__ import annotations

import warnings

import cvxpy as cp
import numpy as np

from fedprune_cli.allocate.problem import LN2, Problem, kept_fraction
from fedprune_cli.errors import CertificateError
from fedprune_cli.state import Array


def solve_p1_cvxpy(problem: Problem) -> tuple[float, Array]:
    """Returns the optimal sum w x and the bandwidth [K] of a feasible P1 by Clarabel, from the DCP form of model.md section 4.

    Bandwidth is scaled by B / K and times by the deadline; unscaled, the conic solver fails. Raises CertificateError when it does.
    """
    sends = np.flatnonzero((problem.payload_bits > 0) & (problem.snr_hz > 0) & (problem.deadline_s > problem.fixed_s))
    bandwidth_hz = np.zeros(len(problem.weight))
    silent = np.setdiff1d(np.arange(len(problem.weight)), sends)
    kept = np.minimum(1.0, kept_fraction(problem, bandwidth_hz))  # of those that send nothing
    if not len(sends):
        return float(problem.weight @ kept), bandwidth_hz
    p = problem.take(sends)
    unit_hz = p.bandwidth_hz / len(sends)
    s, c = p.snr_hz / unit_hz, p.payload_bits / unit_hz / p.deadline_s
    a, time = p.shared_compute_s / p.deadline_s, 1 - p.fixed_s / p.deadline_s
    x, b = cp.Variable(len(sends)), cp.Variable(len(sends))
    constraints = [cp.sum(b) <= len(sends), b >= 0, x <= 1, x >= p.min_kept]
    for k in range(len(sends)):
        # b log2(1 + s/b) = -rel_entr(b, b + s) / ln 2, divided by c so that the numbers stay near 1
        rate = -cp.rel_entr(b[k], b[k] + s[k]) / (LN2 * c[k])
        phi = time[k] * rate if a[k] == 0 else time[k] / a[k] * (1 - cp.inv_pos(1 + a[k] * rate))
        constraints.append(x[k] <= phi)
    solution = (
        cp.Problem(cp.Maximize(p.weight @ x / p.weight.max()), constraints)
        if p.weight.max() > 0
        else cp.Problem(cp.Minimize(0), constraints)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            solution.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
        except cp.SolverError as error:
            raise CertificateError(f"cvxpy could not solve the round: {error}") from None
    if b.value is None or solution.status not in ("optimal", "optimal_inaccurate"):
        raise CertificateError(f"cvxpy ended with status {solution.status}")
    bandwidth_hz[sends] = np.maximum(b.value, 0) * unit_hz
    objective = float(p.weight @ x.value + problem.weight[silent] @ kept[silent])
    return objective, bandwidth_hz * min(problem.bandwidth_hz / bandwidth_hz.sum(), 1.0)
