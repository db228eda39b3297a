"""Whole resource blocks: the greedy against dynamic programming, brute force, a linear program and the continuous optimum."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from conftest import configured
from scipy.optimize import linprog

from fedprune_cli.allocate.blocks import (
    Grid,
    LeastOnBlocks,
    certify_blocks,
    dual_bound,
    kept_at,
    smooth_counts,
    solve_blocks,
    solve_table,
    table_of,
)
from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.kkt import solve_p1
from fedprune_cli.allocate.problem import Problem, kept_on
from fedprune_cli.allocate.whole import Blocks
from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.problems import draw, literature
from fedprune_cli.errors import ConfigError, InfeasibleError

COUNTS = (5, 24, 51, 106, 273)


def instances(count: int, seed: int, sizes: tuple[int, ...]) -> list[tuple[Problem, Grid]]:
    """Returns wild problems that their blocks suffice for, every third one with limits."""
    rng = np.random.Generator(np.random.PCG64(seed))
    found = []
    for at in range(count):
        problem = draw(rng, int(rng.choice(sizes)), limited=at % 3 == 2)
        grid = Grid(problem.bandwidth_hz / (blocks := int(rng.choice(COUNTS))), blocks)
        if not grid.fits(problem):
            late_s = LeastOnBlocks(grid)(problem)
            if not np.isfinite(late_s):
                continue
            problem = replace(problem, deadline_s=late_s * rng.choice([1.0, 1.01, 1.5]))
        found.append((problem, grid))
    return found


def check_certified(problem: Problem, grid: Grid) -> np.ndarray:
    """Returns the optimal counts; fails unless residuals and the integer dual gap are 0 to 1e-12."""
    count, price = solve_blocks(problem, grid)
    assert count.sum() <= grid.count
    kept = kept_on(problem, count * grid.block_hz)
    proof = certify_blocks(problem, grid, kept, count * grid.block_hz, price / grid.block_hz)
    assert max(proof.stationarity, proof.dual, proof.slackness, abs(proof.gap)) <= 1e-12
    assert proof.primal <= 1e-9
    return count


def worth(problem: Problem, grid: Grid, count: np.ndarray) -> float:
    return float(problem.weight @ kept_at(problem, grid.block_hz, count))


def check_against_programming(problem: Problem, grid: Grid) -> None:
    count, (_, best) = check_certified(problem, grid), solve_table(table_of(problem, grid), grid.count)
    assert abs(worth(problem, grid, count) - best) <= 1e-12 * max(problem.weight.sum(), 1e-300)


def test_the_greedy_is_dynamic_programming_and_has_no_gap() -> None:
    found = instances(60, 0, (1, 2, 3, 10))
    assert len(found) > 40
    for problem, grid in found:
        check_against_programming(problem, grid)


@pytest.mark.slow
def test_10000_instances_have_no_gap_and_1000_are_dynamic_programming() -> None:
    found = instances(15_000, 1, (1, 2, 3, 10, 40, 200))
    assert len(found) >= 10_000
    small = [(problem, grid) for problem, grid in found if len(problem.weight) <= 40][:1000]
    assert len(small) == 1000
    for problem, grid in small:
        check_against_programming(problem, grid)
    for problem, grid in found:
        check_certified(problem, grid)


def test_brute_force() -> None:
    rng = np.random.Generator(np.random.PCG64(2))
    for at in range(20):
        problem = draw(rng, int(rng.choice((2, 3))), limited=at % 3 == 2)
        grid = Grid(problem.bandwidth_hz / 7, 7)
        problem = replace(problem, deadline_s=1.2 * max(problem.deadline_s, LeastOnBlocks(grid)(problem)))
        if not np.isfinite(problem.deadline_s):
            continue
        least, most = grid.least(problem), grid.most(problem)
        tried = [
            np.array(counts)
            for counts in itertools.product(*(range(low, high + 1) for low, high in zip(least, most, strict=True)))
            if sum(counts) <= grid.count
        ]
        assert np.isclose(
            worth(problem, grid, solve_blocks(problem, grid)[0]),
            max(worth(problem, grid, one) for one in tried),
            rtol=1e-12,
        )


def test_a_linear_program_over_single_blocks_agrees() -> None:
    """Concave worths make the program over the gains of single blocks whole by itself: an independent reference, HiGHS's."""
    for problem, grid in instances(8, 3, (3, 10)):
        least = grid.least(problem)
        table = table_of(problem, grid).worth
        steps = [
            (k, table[k, n + 1] - table[k, n])
            for k in range(len(least))
            for n in range(least[k], grid.most(problem)[k])
        ]
        base = sum(table[k, n] for k, n in enumerate(least))
        answer = linprog([-gain for _, gain in steps], [[1.0] * len(steps)], [grid.count - least.sum()], bounds=(0, 1))
        assert np.isclose(base - answer.fun, worth(problem, grid, solve_blocks(problem, grid)[0]), rtol=1e-7)


def test_one_hertz_blocks_are_the_continuous_optimum() -> None:
    for seed in range(3):
        problem = literature(0.5, seed)
        exact = float(problem.weight @ kept_on(problem, solve_p1(problem)[0]))
        grid = Grid(1.0, int(problem.bandwidth_hz))
        count = check_certified(problem, grid)
        assert abs(worth(problem, grid, count) - exact) <= 1e-9 * problem.weight.sum()


def test_more_blocks_of_less_are_never_worse_and_never_better_than_no_blocks() -> None:
    problem = literature(0.5, 0)
    exact = float(problem.weight @ kept_on(problem, solve_p1(problem)[0]))
    values = [
        worth(problem, grid, solve_blocks(problem, grid)[0]) for grid in (Grid(20e6 / n, n) for n in (25, 50, 100, 200))
    ]
    assert values == sorted(values)
    assert values[-1] <= exact + 1e-12


def test_the_least_deadline_is_one_below_which_the_blocks_do_not_suffice() -> None:
    rng = np.random.Generator(np.random.PCG64(4))
    for at in range(30):
        problem = draw(rng, int(rng.choice((1, 3, 10))), limited=at % 3 == 2)
        grid = Grid(problem.bandwidth_hz / 24, 24)
        late_s = LeastOnBlocks(grid)(problem)
        assert late_s >= least_feasible(problem) * (1 - 1e-9)
        if np.isfinite(late_s):
            assert grid.fits(replace(problem, deadline_s=late_s * (1 + 1e-9)))
            assert not grid.fits(replace(problem, deadline_s=late_s * (1 - 1e-8)))


def test_smooth_counts_are_optimal_among_themselves_and_their_gap_is_stated() -> None:
    assert set(smooth_counts(30).tolist()) == {0, *range(1, 7), 8, 9, 10, 12, 15, 16, 18, 20, 24, 25, 27, 30}
    problem = literature(0.4, 1, count=3)
    grid = Grid(20e6 / 23, 23, smooth_counts(23))
    table = table_of(problem, grid)
    counts, best = solve_table(table, grid.count)
    possible = [range(len(table.counts))] * 3
    brute = max(
        sum(table.worth[k, at] for k, at in enumerate(ats))
        for ats in itertools.product(*possible)
        if table.counts[list(ats)].sum() <= grid.count
    )
    assert np.isclose(best, brute, rtol=1e-14)
    assert {*counts.tolist()} <= {*smooth_counts(23).tolist()}
    assert dual_bound(table, grid.count) >= best - 1e-12
    whole = Grid(20e6 / 23, 23)
    assert best <= worth(problem, whole, solve_blocks(problem, whole)[0]) + 1e-15
    allocation = Blocks("blocks", "stretch", 20e6 / 23, smooth=True).solve(problem, 0, 0)
    assert "optimal among the allowed counts" in allocation.message
    assert np.isclose(allocation.objective, best, rtol=1e-12)


def test_a_group_is_a_larger_block_and_a_band_without_one_is_refused() -> None:
    problem = literature(0.5, 2)
    grouped, large = Blocks("b", "stretch", 180e3, group=4), Blocks("b", "stretch", 720e3, count=27)
    a, b = (one.solve(problem, 0, 0) for one in (grouped, large))
    np.testing.assert_array_equal(a.bandwidth_hz, b.bandwidth_hz)
    for allocator, words in (
        (Blocks("b", "stretch", 21e6), "has no block of 21000 kHz"),
        (Blocks("b", "stretch", 180e3, group=112), "has no group of 112 blocks"),
        (Blocks("b", "stretch", 180e3, count=112), r"allocator.count=112: the band of 20 MHz holds 111 blocks"),
        (Blocks("b", "stretch", 1e-4), "more than 1000000000 blocks"),
        (Blocks("b", "stretch", 180.0, smooth=True), "at most 10000"),
    ):
        with pytest.raises(ConfigError, match=words):
            allocator.solve(problem, 0, 0)


def test_more_devices_than_blocks_is_said_by_the_policy() -> None:
    problem = literature(0.5, 3, count=12)
    with pytest.raises(InfeasibleError, match="no deadline is late enough"):
        Blocks("b", "fail", 2e6).solve(problem, 0, 0)
    dropped = Blocks("b", "drop", 2e6).solve(problem, 0, 0)
    assert 0 < dropped.admitted.sum() <= 10
    assert dropped.certificate
    assert dropped.certificate.holds
    assert Blocks("b", "stretch", 2e6).solve(problem, 0, 0).admitted.sum() == 10


def test_yaml_speaks_of_kilohertz() -> None:
    assert build_experiment(configured("allocator=blocks", "allocator.block_khz=360")).allocator == Blocks(
        "blocks", "stretch", 360e3
    )
