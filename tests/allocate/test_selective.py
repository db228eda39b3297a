"""Blocks with gains of their own: the bound against cvxpy, whole blocks against brute force and dynamic programming."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fedprune_cli.allocate.blocks import Table, solve_table
from fedprune_cli.allocate.problem import Problem
from fedprune_cli.allocate.selective import Rates, rates_of, relax, select
from fedprune_cli.contracts.problems import literature
from fedprune_cli.errors import ConfigError


def drawn(seed: int, count: int, blocks: int, fraction: float = 0.5) -> tuple[Problem, np.ndarray]:
    """Returns a problem whose devices may drop everything, and Rayleigh gains of its blocks."""
    rng = np.random.Generator(np.random.PCG64(seed))
    problem = replace(literature(fraction, seed, count=count), max_ratio=np.ones(count))
    return replace(problem, weight=rng.uniform(0.1, 1, count)), rng.exponential(size=(count, blocks))


def relaxed_by_cvxpy(rates: Rates) -> float:
    import cvxpy as cp

    y, x = cp.Variable(rates.block_bps.shape), cp.Variable(len(rates.weight))
    constraints = [y >= 0, cp.sum(y, 0) <= 1, x <= 1]
    for k in range(len(rates.weight)):
        R = y[k] @ rates.block_bps[k] / rates.transfer[k]
        a = rates.work[k]
        constraints.append(x[k] / rates.budget[k] <= (1 - cp.inv_pos(1 + a * R)) / a)
    problem = cp.Problem(cp.Maximize(rates.weight @ x), constraints)
    problem.solve(solver=cp.CLARABEL)
    return float(problem.value)


def test_the_bound_is_the_relaxations_optimum() -> None:
    for seed, (count, blocks) in enumerate([(1, 4), (2, 6), (4, 10)]):
        problem, gain = drawn(seed, count, blocks)
        rates = rates_of(problem, gain)
        share, theta = relax(rates)
        np.testing.assert_allclose(share.sum(0), 1, rtol=1e-12)
        relaxed = float(rates.weight @ rates.kept((share * rates.block_bps).sum(1)))
        best, total = relaxed_by_cvxpy(rates), problem.weight.sum()
        assert relaxed <= best + 1e-7 * total
        assert rates.bound(theta) >= best - 1e-7 * total
        assert rates.bound(theta) - relaxed <= 1e-6 * total


def check_bounds(count: int, seed: int) -> None:
    """The bound closes on the relaxation, and whole blocks are below it by what few blocks cost."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for at in range(count):
        devices, blocks = int(rng.choice((1, 2, 5, 20))), int(rng.choice((6, 25, 50)))
        problem, gain = drawn(int(rng.integers(2**32)), devices, blocks, float(rng.uniform(0.2, 1.1)))
        found = select(problem, gain)
        total = problem.weight.sum()
        room = found.bound >= total * (1 - 1e-6)  # for all that anybody wants: the bound is known, the shares are any
        assert found.bound - found.relaxed <= (1e-3 if room else 1e-5) * total, at
        assert found.value <= found.bound + 1e-12 * total
        assert found.gap(problem.weight) <= max(devices, 2) / blocks


def test_the_bound_closes_on_the_relaxation() -> None:
    check_bounds(8, seed=1)


@pytest.mark.slow
def test_the_bound_closes_on_2000_relaxations() -> None:
    check_bounds(2000, seed=2)


def test_whole_blocks_against_brute_force() -> None:
    """Never better than the best of all choices, which the bound never is below; and mostly that best one."""
    best_found = 0
    for seed in range(6):
        count, blocks = (2, 7) if seed % 2 else (3, 5)
        problem, gain = drawn(seed, count, blocks)
        found, rates = select(problem, gain), rates_of(problem, gain)
        tried = []
        for owners in itertools.product(range(count), repeat=blocks):
            given = np.arange(count)[:, None] == np.array(owners)
            tried.append(float(rates.weight @ rates.kept((given * rates.block_bps).sum(1))))
        assert found.value <= max(tried) + 1e-12
        assert max(tried) <= found.bound + 1e-12
        assert found.value >= max(tried) - 0.05 * problem.weight.sum()
        best_found += found.value >= max(tried) - 1e-9
    assert best_found >= 3


def test_flat_gains_are_counts_of_blocks_to_the_optimum() -> None:
    """Which block it is does not matter then: dynamic programming over counts is exact, and so are exchanges of concave worths."""
    for seed in range(2):
        problem, gain = drawn(seed, 4, 15)
        rates = rates_of(problem, np.ones_like(gain))
        counts = np.arange(16)
        worth = rates.weight[:, None] * rates.kept(counts * rates.block_bps[:, :1])
        best = solve_table(Table(counts, worth), 15)[1]
        assert select(problem, np.ones_like(gain)).value == pytest.approx(best, rel=1e-12)


def test_who_must_keep_something_gets_it() -> None:
    problem, gain = drawn(3, 4, 30, fraction=1.0)
    problem = replace(problem, max_ratio=np.full(4, 0.6), weight=np.array([1.0, 1.0, 1e-6, 1.0]))
    found = select(problem, gain)
    assert (found.kept >= 0.4 - 1e-12).all()
    assert found.value <= found.bound + 1e-12


def test_what_is_not_offered_is_refused_by_name() -> None:
    problem, gain = drawn(0, 2, 4)
    with pytest.raises(ConfigError, match=r"block_gain: \(3, 4\) entries for 2 devices"):
        select(problem, np.ones((3, 4)))
    with pytest.raises(ConfigError, match=r"device 1, block_gain=-1\.0: must be finite"):
        select(problem, np.array([[1.0, 1.0], [1.0, -1.0]]))
    with pytest.raises(ConfigError, match="not with a gain for every block"):
        select(replace(problem, limits=problem.energies), gain)
