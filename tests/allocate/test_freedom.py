"""Clock and power chosen exactly with ratio and bandwidth: against fixed ones on a grid, certificates, degenerate equalities, edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedprune_cli.allocate.baselines import Equal, Kkt, MinLatency, MinMax
from fedprune_cli.allocate.blocks import Grid, certify_blocks, kept_at, solve_blocks
from fedprune_cli.allocate.conic import Cvxpy
from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.freedom import FIXED, Freedom
from fedprune_cli.allocate.kkt import certify, solve_p1
from fedprune_cli.allocate.limits import Limits
from fedprune_cli.allocate.problem import Problem, kept_fraction, kept_on, limits_of, pace, required_bandwidth
from fedprune_cli.contracts.problems import draw, literature
from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array

FREEDOMS = (Freedom(clock=True), Freedom(power=True), Freedom(clock=True, power=True))


def free(rng: np.random.Generator, count: int, freedom: Freedom) -> Problem:
    """Returns a random feasible problem whose devices choose: budgets from tight to none, some computing that pruning does not touch."""
    problem = draw(rng, count, limited=True)
    limits = limits_of(problem)
    limits = replace(
        limits,
        fixed_compute_s=problem.fixed_s * rng.random(count) * (rng.random() < 0.7),
        circuit_w=limits.tx_power_w * rng.random(count) * (rng.random() < 0.5),
    )
    problem = replace(problem, limits=limits, freedom=freedom)
    if required_bandwidth(problem, problem.min_kept).sum() <= problem.bandwidth_hz * (1 - 1e-9):
        return problem
    return free(rng, count, freedom)


def fixed_at(problem: Problem, clock: float, power: float) -> Problem:
    """Returns the problem of devices whose clock and power are fixed at these shares of their tops: P1 as it always was."""
    limits = limits_of(problem)
    fixed_s, circuit_w = (
        np.zeros(len(problem.weight)) if of is None else of for of in (limits.fixed_compute_s, limits.circuit_w)
    )
    slow = np.where(fixed_s > 0, clock**2, 1.0)  # without any fixed computing the fixed joules are not computing's
    scaled = replace(
        limits,
        shared_energy_j=limits.shared_energy_j * np.where(problem.shared_compute_s + fixed_s > 0, clock**2, 1.0),
        fixed_energy_j=limits.fixed_energy_j * slow,
        tx_power_w=circuit_w + (limits.tx_power_w - circuit_w) * power,
        fixed_compute_s=None,
        circuit_w=None,
    )
    return replace(
        problem, limits=scaled, freedom=FIXED, shared_compute_s=problem.shared_compute_s / clock,
        fixed_s=problem.fixed_s + fixed_s * (1 / clock - 1), snr_hz=problem.snr_hz * power,
    )  # fmt: skip


def best_fixed(problem: Problem, bandwidth_hz: Array, steps: int) -> Array:
    """Returns the most that each device keeps [K] with the best of a grid of fixed clocks and powers."""
    shares = 10.0 ** -np.linspace(0, 3, steps)
    clocks = shares if problem.freedom.clock else shares[:1]
    powers = shares if problem.freedom.power else shares[:1]
    grid = [kept_fraction(fixed_at(problem, f, p), bandwidth_hz) for f in clocks for p in powers]
    return np.minimum(np.max(grid, axis=0), 1.0)


@pytest.mark.parametrize("freedom", FREEDOMS)
def test_no_fixed_clock_and_power_keep_more_and_the_best_of_them_nearly_as_much(freedom: Freedom) -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    for _ in range(6):
        problem = free(rng, 20, freedom)
        bandwidth_hz = problem.bandwidth_hz / 20 * 10 ** rng.uniform(-2, 0.5, 20)
        ours, grid = np.minimum(kept_fraction(problem, bandwidth_hz), 1.0), best_fixed(problem, bandwidth_hz, 31)
        assert (ours >= grid * (1 - 1e-9)).all()
        reached = grid > 1e-2  # where the grid's range of clocks and powers holds the best ones
        assert (ours <= grid * 1.3)[reached].all()


@pytest.mark.parametrize("freedom", FREEDOMS)
def test_what_is_chosen_keeps_the_deadline_and_the_energy(freedom: Freedom) -> None:
    rng = np.random.Generator(np.random.PCG64(2))
    for _ in range(6):
        problem = free(rng, 20, freedom)
        bandwidth_hz, _ = solve_p1(problem)
        kept = kept_on(problem, bandwidth_hz)
        clock, power = pace(problem, kept)
        assert ((clock > 0) & (clock <= 1) & (power > 0) & (power <= 1)).all()
        for k in range(20):
            alone = fixed_at(problem.take(np.array([k])), float(clock[k]), float(power[k]))
            assert kept_fraction(alone, bandwidth_hz[k : k + 1])[0] >= kept[k] * (1 - 1e-9) - 1e-12


def certify_many(count: int, seed: int, sizes: tuple[int, ...]) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    for at in range(count):
        problem = free(rng, int(rng.choice(sizes)), FREEDOMS[at % 3])
        bandwidth_hz, price = solve_p1(problem)
        kept = kept_on(problem, bandwidth_hz)
        certificate = certify(problem, kept, bandwidth_hz, price)
        assert certificate.residual <= 1e-9, (at, certificate)
        assert abs(certificate.gap) <= 1e-9, (at, certificate)
        fixed = replace(problem, freedom=FIXED)
        at_most = problem.weight @ kept_on(fixed, solve_p1(fixed)[0])
        assert problem.weight @ kept >= at_most * (1 - 1e-9), at


def test_clock_and_power_are_certified_on_random_instances() -> None:
    certify_many(12, 3, (1, 2, 3, 10, 50))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_clock_and_power_are_certified_on_10000_random_instances(part: int) -> None:
    certify_many(1000, 40 + part, (1, 2, 3, 5, 10, 20, 50, 100))


def never_worse(count: int, seed: int) -> None:
    """Against every split of the band between two devices with the best of a grid of clocks and powers."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for at in range(count):
        problem = free(rng, 2, FREEDOMS[at % 3])
        bandwidth_hz, price = solve_p1(problem)
        ours = problem.weight @ kept_on(problem, bandwidth_hz)
        for share in np.linspace(0.02, 0.98, 7):
            split = np.minimum(problem.bandwidth_hz * np.array([share, 1 - share]), problem.most_hz)
            grid = best_fixed(problem, split, 10)
            if (grid >= problem.min_kept).all() and (split >= problem.least_hz).all():
                assert problem.weight @ grid <= ours + 1e-9 * problem.weight.sum(), (at, share, price)


def test_a_dense_grid_is_never_better() -> None:
    never_worse(3, 5)


@pytest.mark.slow
def test_a_dense_grid_is_never_better_on_200_instances() -> None:
    never_worse(200, 6)


def limited(problem: Problem, budget_j: float) -> Problem:
    """Returns a problem with energy budgets, half of whose fixed time is computing and costs in proportion."""
    size, half_s = len(problem.weight), 0.5 * problem.fixed_s
    nothing, endless = np.zeros(size), np.full(size, np.inf)
    limits = Limits(
        nothing, endless, np.full(size, budget_j), problem.shared_compute_s, half_s, np.full(size, 0.2), half_s, nothing
    )
    return replace(problem, limits=limits)


def test_with_energy_to_spare_the_answer_is_that_of_p1_at_full_clock_and_power() -> None:
    for seed in range(3):
        problem = literature(0.5, seed)
        plain = Kkt("kkt", "fail").solve(problem, 0, 0)
        for budget_j in (1e9, np.inf):
            rich = Kkt("kkt", "fail", "chosen", "chosen").solve(limited(problem, budget_j), 0, 0)
            np.testing.assert_allclose(rich.prune_ratio, plain.prune_ratio, atol=1e-9)
            np.testing.assert_allclose(rich.price_per_hz, plain.price_per_hz, rtol=1e-9)
            assert (rich.clock == 1).all()
            assert (rich.power == 1).all()


def test_blocks_of_one_hertz_are_the_continuous_optimum() -> None:
    problem = replace(limited(literature(0.5, 0, count=3), 0.8), freedom=Freedom(clock=True, power=True))
    bandwidth_hz, _ = solve_p1(problem)
    grid = Grid(1.0, int(problem.bandwidth_hz))
    count, price = solve_blocks(problem, grid)
    kept = kept_at(problem, 1.0, count)
    np.testing.assert_allclose(problem.weight @ kept, problem.weight @ kept_on(problem, bandwidth_hz), rtol=1e-9)
    assert certify_blocks(problem, grid, kept, count * 1.0, price).holds


def test_each_freedom_helps_and_says_what_binds() -> None:
    problem = limited(literature(0.6, 1), 0.8)
    fixed, clock, power, both = (
        Kkt("kkt", "fail", *words).solve(problem, 0, 0)
        for words in (("fixed", "fixed"), ("chosen", "fixed"), ("fixed", "chosen"), ("chosen", "chosen"))
    )
    assert fixed.objective < min(clock.objective, power.objective)
    assert max(clock.objective, power.objective) < both.objective
    assert fixed.clock is None
    assert fixed.power is None
    assert clock.power is None
    assert {*both.binds} <= {"deadline", "energy", "deadline, energy", "dense", "max_ratio"}
    assert "deadline, energy" in both.binds
    assert (both.latency_s <= problem.deadline_s * (1 + 1e-9)).all()


@pytest.mark.slow
def test_the_other_allocators_choose_too_and_cvxpy_says_that_it_cannot() -> None:
    problem = limited(literature(0.6, 1, count=4), 0.8)
    best = Kkt("kkt", "fail", "chosen", "chosen").solve(problem, 0, 0)
    for allocator in (MinMax("minmax", "fail", "chosen", "chosen"), Equal("equal", "stretch", "chosen", "chosen")):
        other, before = (
            one.solve(problem, 0, 0) for one in (allocator, replace(allocator, clock="fixed", power="fixed"))
        )
        assert other.objective <= best.objective + 1e-9
        assert other.deadline_s <= before.deadline_s * (1 + 1e-9)
    ratio = 1 - best.objective / problem.weight.sum()
    least = MinLatency("minlatency", ratio, "chosen", "chosen").solve(problem, 0, 0)
    np.testing.assert_allclose(least.deadline_s, problem.deadline_s, rtol=1e-6)
    with pytest.raises(ConfigError, match="cvxpy chooses no clock and no power; choose allocator=kkt"):
        Cvxpy("cvxpy", "fail", "chosen", "fixed").solve(problem, 0, 0)
    with pytest.raises(ConfigError, match="'fixed' or 'chosen'"):
        Kkt("kkt", "fail", "free", "fixed")


def test_devices_that_choose_can_keep_an_earlier_deadline() -> None:
    problem = limited(literature(0.6, 1), 0.3)
    chosen = replace(problem, freedom=Freedom(clock=True, power=True))
    soonest_s, before_s = least_feasible(chosen), least_feasible(problem)
    assert soonest_s <= before_s
    at = replace(chosen, deadline_s=soonest_s)
    np.testing.assert_allclose(required_bandwidth(at, at.min_kept).sum(), at.bandwidth_hz, rtol=1e-6)
