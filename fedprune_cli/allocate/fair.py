"""Proportional fairness: maximise sum w_k ln x_k under P1's constraints (model.md, section 4).

ln of a concave function is concave, so the price search of `kkt` carries over. With x = phi(b) it looks for

    w phi' / phi = (w / s) h(L) / (g(L) (1 + A g(L)))

which increases with L and does not know the deadline: time decides what a device can keep, not who gets the bandwidth.
A device that can keep nothing at any bandwidth has no part in it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedprune_cli.allocate.certificate import Certificate
from fedprune_cli.allocate.kkt import certify_on, curves_of, share_out
from fedprune_cli.allocate.problem import Problem
from fedprune_cli.allocate.stretches import Curves
from fedprune_cli.store.state import Array


def fair_curves(problem: Problem) -> Curves:
    """Returns the stretches of P1 with the marginal value of w ln x."""
    curves = curves_of(problem)
    with np.errstate(divide="ignore"):
        log_m = np.log(problem.weight[curves.index]) - np.log(curves.snr_hz)
    return replace(curves, log_m=log_m, alpha=1.0).ended()


def solve_fair(problem: Problem) -> tuple[Array, float]:
    """Returns the bandwidth [K] of the largest sum w ln x of a feasible problem, and the price per Hz."""
    return share_out(problem, fair_curves(problem))


def certify_fair(problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
    """Returns the certificate of x = `kept` [K], b [K] and a price for sum w ln x; its gap is relative to sum w + price B, as P1's."""
    return certify_on(fair_curves(problem), problem, kept, bandwidth_hz, price_per_hz)
