"""Allocators of other aims than P1's, each with a certificate of its own: fair shares, least energy, and energy against time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedprune_cli.allocate.certificate import Certificate
from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.fair import certify_fair, solve_fair
from fedprune_cli.allocate.joules import (
    Timed,
    certify_energy,
    certify_timed,
    joules,
    sending,
    solve_energy,
    solve_timed,
    spends_of,
)
from fedprune_cli.allocate.limits import SMALLEST
from fedprune_cli.allocate.policy import (
    Settled,
    as_policy,
    build_allocation,
    listed,
    nobody,
    settle,
    solve_under_policy,
    with_deadline,
)
from fedprune_cli.allocate.problem import TIGHT, Allocation, Problem
from fedprune_cli.allocate.variants import common_kept
from fedprune_cli.errors import InfeasibleError, require
from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class Proportional:
    """The largest weighted sum of ln x: nobody can keep a share more without others losing a larger share together."""

    name: str
    on_infeasible: str
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_policy(self.on_infeasible)

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        policy = as_policy(self.on_infeasible)
        return solve_under_policy(problem, policy, solve_fair, least_feasible, self._certified)

    def _certified(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
        certificate = self.certify(problem, kept, bandwidth_hz, price_per_hz)
        return _told(certificate, f"{self.name!r} cannot tell the fairest shares", problem)

    def certify(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
        """Returns the certificate of x [K] and b [K] of the admitted devices at a price."""
        return certify_fair(problem, kept, bandwidth_hz, price_per_hz)

    def apart(self, problem: Problem, kept: Array, bandwidth_hz: Array) -> float:
        """Returns how far cvxpy's optimum is from x [K], relative to the sum of weights; raises CertificateError."""
        from fedprune_cli.allocate.reference import solve_fair_cvxpy

        ours = float(problem.weight @ np.log(np.maximum(kept, SMALLEST)))
        return abs(solve_fair_cvxpy(problem)[0] - ours) / float(problem.weight.sum())


@dataclass(frozen=True)
class LeastEnergy:
    """The fewest joules under the deadline; every device drops `ratio`, or as much more, all alike, as the deadline demands.

    Fewer joules are had by dropping more, so it is for the user to say how much: 0 sends the whole model where there is time.
    """

    name: str
    on_infeasible: str
    ratio: float = 0.0
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_policy(self.on_infeasible)
        require(0 <= self.ratio <= 1, "ratio", self.ratio, "in [0, 1]")

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        spends_of(problem)
        settled = settle(with_deadline(problem), as_policy(self.on_infeasible), least_feasible)
        if not settled.admitted.any():
            return nobody(problem, settled)
        kept = common_kept(settled.feasible, 1 - self.ratio)
        bandwidth_hz, price = solve_energy(settled.feasible, kept)
        certificate = _told(
            self.certify(settled.feasible, kept, bandwidth_hz, price),
            f"{self.name!r} cannot tell the fewest joules",
            settled.feasible,
        )
        settled = _optimal(settled)
        common = float(kept.max())
        if settled.status == "optimal" and common < 1 - self.ratio - TIGHT:
            lowest = f"the deadline has no room for a ratio below {1 - common:.3g} for all alike"
            settled = replace(settled, message=f"{lowest}, which is more than the {self.ratio:g} asked for")
        return _with_joules(problem, build_allocation(problem, settled, kept, bandwidth_hz, price, certificate))

    def certify(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
        """Returns the certificate of b [K] of the admitted devices at a price, x [K] being what `ratio` says."""
        return certify_energy(problem, kept, bandwidth_hz, price_per_hz)

    def apart(self, problem: Problem, kept: Array, bandwidth_hz: Array) -> float:
        """Returns how far cvxpy's fewest joules of sending are from those on b [K], relative; raises CertificateError."""
        from fedprune_cli.allocate.reference import solve_energy_cvxpy

        ours = sending(problem, kept, bandwidth_hz)
        return abs(solve_energy_cvxpy(problem, kept) - ours) / max(ours, SMALLEST)


@dataclass(frozen=True)
class Weighted:
    """The least weighted sum of the round's time and of all joules, at one ratio for all; the round's own deadline is not looked at.

    joules_per_s: what a second of the round is worth. Who may not drop as much drops less.
    """

    name: str
    ratio: float = 0.5
    joules_per_s: float = 1.0
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.ratio <= 1, "ratio", self.ratio, "in [0, 1]")
        require(1e-12 <= self.joules_per_s <= 1e12, "joules_per_s", self.joules_per_s, "in [1e-12, 1e12]")

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        spends_of(problem)
        settled = settle(replace(self._at_its_ratio(problem), deadline_s=np.inf), "stretch", least_feasible)
        if not settled.admitted.any():
            return nobody(problem, replace(settled, feasible=replace(settled.feasible, deadline_s=0.0)))
        kept = settled.feasible.min_kept
        deadline_s, bandwidth_hz, price = solve_timed(Timed(settled.feasible, self.joules_per_s))
        at = replace(settled.feasible, deadline_s=deadline_s)
        settled = replace(settled, feasible=at)
        certificate = _told(
            self.certify(at, kept, bandwidth_hz, price),
            f"{self.name!r} cannot tell the best deadline",
            settled.feasible,
        )
        settled = _optimal(settled)
        return _with_joules(problem, build_allocation(problem, settled, kept, bandwidth_hz, price, certificate))

    def certify(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Certificate:
        """Returns the certificate of the problem's deadline, x [K] and b [K] of the admitted devices at a price."""
        at = self._at_its_ratio(problem)
        proof = certify_timed(Timed(at, self.joules_per_s), bandwidth_hz, price_per_hz)
        return replace(proof, primal=max(proof.primal, float(np.abs(kept - at.min_kept).max())))

    def apart(self, problem: Problem, kept: Array, bandwidth_hz: Array) -> float:
        """Returns how far cvxpy's least sum is from that of the problem's deadline and b [K], relative; raises CertificateError."""
        from fedprune_cli.allocate.reference import solve_energy_cvxpy

        ours = sending(problem, kept, bandwidth_hz) + self.joules_per_s * problem.deadline_s
        return abs(solve_energy_cvxpy(problem, kept, self.joules_per_s) - ours) / max(ours, SMALLEST)

    def _at_its_ratio(self, problem: Problem) -> Problem:
        """Returns the problem whose devices keep no less than they are told."""
        return replace(problem, max_ratio=np.minimum(problem.max_ratio, self.ratio))


def _told(certificate: Certificate, wanted: str, problem: Problem) -> Certificate:
    """Returns the certificate; raises InfeasibleError where rounding has not left digits enough for one.

    So it is with -70 dB beside 100 dB, and where an hour follows 10^12 seconds.
    """
    if not certificate.holds:
        of = f"of devices {listed(problem.called)} to the last digit that matters"
        raise InfeasibleError(f"allocator {wanted} {of}: their figures are too far apart")
    return certificate


def _optimal(settled: Settled) -> Settled:
    return replace(settled, status="optimal") if settled.status == "feasible" else settled


def _with_joules(problem: Problem, allocation: Allocation) -> Allocation:
    """Returns the allocation with its joules; who has time to spare is bound by the ratio that was asked for."""
    kept, admitted = 1 - allocation.prune_ratio, allocation.admitted
    early = allocation.latency_s < allocation.deadline_s * (1 - 1e3 * TIGHT)
    binds = tuple(
        "ratio" if word == "deadline" and spare else word for word, spare in zip(allocation.binds, early, strict=True)
    )
    spent_j = np.where(admitted, joules(problem, np.where(admitted, kept, 0.0), allocation.bandwidth_hz), 0.0)
    return replace(allocation, binds=binds, joules=spent_j)
