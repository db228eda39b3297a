"""An allocator of my own: the exact optimum on a part of the band.

fedprune train --plugin FILE allocator=mine allocator.reserve=0.2
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.kkt import solve_p1
from fedprune_cli.allocate.policy import as_policy, solve_under_policy
from fedprune_cli.allocate.problem import Allocation, Problem
from fedprune_cli.errors import require


@dataclass(frozen=True)
class Mine:
    """Solves P1 on the share 1 - reserve of the band. Its fields are its keys: `allocator.reserve=0.2`."""

    name: str
    reserve: float = 0.1  # share of the band that stays free
    on_infeasible: str = "stretch"  # of a round that cannot meet its deadline: stretch, drop or fail
    prunes: ClassVar[bool] = True  # False for one that never drops anything

    def __post_init__(self) -> None:
        require(0 <= self.reserve < 1, "reserve", self.reserve, "in [0, 1)")
        as_policy(self.on_infeasible)

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        """Returns the allocation of round `number`; randomness comes from rng.stream(seed, "allocator", number) alone."""
        smaller = replace(problem, bandwidth_hz=(1 - self.reserve) * problem.bandwidth_hz)
        return solve_under_policy(smaller, as_policy(self.on_infeasible), solve_p1, least_feasible)


ALLOCATORS = {"mine": Mine}
