"""P1 by a conic solver, as an allocator: the independent reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprune_cli.allocate.baselines import AimsAtDeadline
from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.policy import as_freedom, solve_under_policy
from fedprune_cli.allocate.problem import Allocation, Problem, kept_fraction
from fedprune_cli.errors import CertificateError, ConfigError
from fedprune_cli.store.state import Array

LOOSE = 1e-4  # of the whole model: how far below its least a conic solver may leave a device


@dataclass(frozen=True)
class Cvxpy(AimsAtDeadline):
    """P1 by cvxpy and Clarabel: the independent reference, slower and less exact than `kkt`, and not able to solve every round.

    Raises ConfigError when the conic solver fails or ends with a device more than LOOSE of the model below its least.
    """

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        if as_freedom(self.clock, self.power):
            raise ConfigError(
                f"allocator.name={self.name}: cvxpy chooses no clock and no power; choose allocator=kkt", key="name"
            )
        return solve_under_policy(problem, self.policy, self._solve, least_feasible)

    def _solve(self, problem: Problem) -> tuple[Array, float]:
        from fedprune_cli.allocate.reference import solve_p1_cvxpy

        try:
            _, bandwidth_hz = solve_p1_cvxpy(problem)
        except CertificateError as error:
            raise ConfigError(f"allocator.name={self.name}: {error}; choose allocator=kkt", key="name") from None
        short = problem.min_kept - kept_fraction(problem, bandwidth_hz)
        if not (short <= LOOSE).all():
            raise ConfigError(
                f"allocator.name={self.name}: cvxpy leaves device {problem.called[int(np.argmax(short))]} {short.max():.3g} of the model "
                "below its least; choose allocator=kkt",
                key="name",
            )
        return bandwidth_hz, 0.0
