"""Caps on the ratio of signal to noise, by power control or a modem's peak: the rate is b log2(1 + min(S, s / b))."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from fedprune_cli.allocate import ALLOCATORS
from fedprune_cli.allocate.blocks import Grid, solve_blocks, solve_table, table_of
from fedprune_cli.allocate.deadline import dense_deadline, least_feasible
from fedprune_cli.allocate.freedom import Freedom
from fedprune_cli.allocate.inverse import LN2, bandwidth_of, log_snr_for_rate, rate
from fedprune_cli.allocate.kkt import certify, solve_p1
from fedprune_cli.allocate.objectives import LeastEnergy, Proportional, Weighted
from fedprune_cli.allocate.policy import solve_under_policy
from fedprune_cli.allocate.problem import Allocation, Problem, energy, kept_on, latency, upload_s
from fedprune_cli.allocate.reference import solve_p1_cvxpy
from fedprune_cli.allocate.whole import Blocks
from fedprune_cli.contracts.problems import draw, literature, with_caps, with_limits
from fedprune_cli.contracts.test_allocators import allocator_of
from fedprune_cli.errors import ConfigError

AIMS = ("kkt", "proportional", "energy", "weighted", "blocks")


def answers(count: int, seed: int, sizes: tuple[int, ...] = (1, 2, 3, 10)) -> Iterator[tuple[str, Problem, Allocation]]:
    """Yields what each exact allocator says of random problems with caps, every second one with limits as well."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for at in range(count):
        problem = draw(rng, int(rng.choice(sizes)), limited=at % 2 == 1, capped=True)
        ratio, worth = float(rng.choice([0.0, 0.3, 0.7])), float(10 ** rng.uniform(-3, 3))
        chosen = (
            allocator_of("kkt"), Proportional("proportional", "stretch"), LeastEnergy("energy", "stretch", ratio),
            Weighted("weighted", ratio, worth), Blocks("blocks", "stretch"),
        )  # fmt: skip
        for allocator in chosen:
            if allocator.name != "blocks" or np.isfinite(problem.snr_hz).all():
                yield allocator.name, problem, allocator.solve(problem, 0, 0)


def check_answers(count: int, seed: int, sizes: tuple[int, ...] = (1, 2, 3, 10)) -> None:
    straight = nobody = 0
    for name, problem, answer in answers(count, seed, sizes):
        if not answer.admitted.any():  # too little energy for 0.7 of it, or limits between which no block fits
            assert name in ("energy", "weighted", "blocks"), name
            assert "no bandwidth helps" in answer.message
            nobody += 1
            continue
        proof = answer.certificate
        assert proof is not None
        assert proof.holds, (name, proof)
        b = answer.bandwidth_hz
        if problem.log_cap is not None:
            held = answer.admitted & np.isfinite(problem.log_cap) & (b > 0)
            most_bps = b[held] * problem.log_cap[held] / LN2
            assert (answer.rate_bps[held] <= most_bps * (1 + 1e-12)).all(), name
            straight += int((answer.rate_bps[held] >= most_bps * (1 - 1e-12)).sum())
        assert b.sum() <= problem.bandwidth_hz * (1 + 1e-9), name
        assert (answer.latency_s[answer.admitted] <= answer.deadline_s * (1 + 1e-9)).all(), name
        if problem.limits is not None:
            kept = 1 - answer.prune_ratio
            joules = energy(problem.limits, kept, upload_s(problem, kept, b))[answer.admitted]
            assert (joules <= problem.limits.energy_budget_j[answer.admitted] * (1 + 1e-9)).all(), name
    assert straight > count  # who is held by a cap
    assert nobody <= 0.05 * count  # of five times as many answers


def test_random_instances_are_certified() -> None:
    check_answers(12, seed=1)


@pytest.mark.slow
def test_2000_random_instances_are_certified_by_each_aim() -> None:
    check_answers(2000, seed=2, sizes=(1, 2, 3, 10, 30))


@pytest.mark.slow
def test_p1_is_certified_on_10000_random_instances() -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    for at in range(10_000):
        problem = draw(rng, int(rng.choice([1, 2, 3, 10, 50])), limited=at % 2 == 1, capped=True)
        answer = solve_under_policy(problem, "stretch", solve_p1, least_feasible, certify)
        assert answer.certificate is not None
        assert answer.certificate.holds, at


def test_the_rate_is_the_smaller_of_two_and_its_inverse_finds_it() -> None:
    rng = np.random.Generator(np.random.PCG64(4))
    snr_hz, cap = 10 ** rng.uniform(3, 15, 2000), np.log1p(10 ** rng.uniform(-3, 4, 2000))
    b = snr_hz / np.expm1(cap) * 10 ** rng.uniform(-6, 6, 2000)
    r = rate(b, snr_hz, cap)
    np.testing.assert_array_equal(r, np.minimum(rate(b, snr_hz), b * cap / LN2))
    np.testing.assert_allclose(rate(bandwidth_of(log_snr_for_rate(r, snr_hz, cap), snr_hz), snr_hz, cap), r, rtol=1e-12)


def check_against_cvxpy(count: int, seed: int) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    for at in range(count):
        size = int(rng.choice([1, 2, 5, 10]))
        problem = literature(float(rng.uniform(0.3, 0.9)), seed=int(rng.integers(2**32)), count=size)
        problem = replace(
            problem, weight=rng.uniform(0.1, 1, size), shared_compute_s=problem.shared_compute_s * (at % 3 != 2)
        )
        problem = with_caps(rng, with_limits(rng, problem) if at % 4 == 3 else problem)
        problem = replace(problem, deadline_s=max(problem.deadline_s, 1.01 * least_feasible(problem)))
        ours = solve_under_policy(problem, "fail", solve_p1, least_feasible, certify)
        assert abs(solve_p1_cvxpy(problem)[0] - ours.objective) <= 1e-6 * problem.weight.sum(), at
        for name in ("proportional", "energy", "weighted"):
            allocator = allocator_of(name)
            other = allocator.solve(problem, 0, 0)
            there = np.flatnonzero(other.admitted)  # without whoever cannot keep half of it on its energy
            if not len(there):
                assert name == "weighted", at
                continue
            of_them = replace(problem, deadline_s=other.deadline_s).take(there)
            assert allocator.apart(of_them, 1 - other.prune_ratio[there], other.bandwidth_hz[there]) < 1e-5, (at, name)  # type: ignore[attr-defined]


def test_cvxpy_agrees() -> None:
    check_against_cvxpy(2, seed=5)


@pytest.mark.slow
def test_cvxpy_agrees_on_200_problems() -> None:
    check_against_cvxpy(200, seed=6)


def test_brute_force_on_a_grid() -> None:
    """Two devices: no split of the band is better."""
    rng = np.random.Generator(np.random.PCG64(7))
    for at in range(12):
        problem = draw(rng, 2, limited=at % 2 == 1, capped=True)
        ours = solve_under_policy(problem, "stretch", solve_p1, least_feasible, certify)
        problem = replace(problem, deadline_s=ours.deadline_s)
        for share in np.linspace(0, 1, 101):
            b = np.clip(problem.bandwidth_hz * np.array([share, 1 - share]), problem.least_hz, problem.most_hz)
            kept = kept_on(problem, b)
            sound = (
                latency(problem, kept, b) <= problem.deadline_s * (1 + 1e-12)
            ).all() and b.sum() <= problem.bandwidth_hz
            if problem.limits is not None:
                spent = energy(problem.limits, kept, upload_s(problem, kept, b))
                sound = sound and bool((spent <= problem.limits.energy_budget_j * (1 + 1e-12)).all())
            assert not sound or problem.weight @ kept <= ours.objective + 1e-9 * problem.weight.sum(), at


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("kkt", "blocks", "fixed")))
        for name in ALLOCATORS
        if name not in ("cvxpy", "selective")
    ],
)
def test_a_cap_that_is_infinite_changes_no_digit(name: str) -> None:
    rng = np.random.Generator(np.random.PCG64(8))
    for at in range(3):
        problem = draw(rng, 5, limited=at % 2 == 1 and name not in ("dense", "dense_equal", "fixed"))
        answer = allocator_of(name).solve(problem, 0, 0)
        same = allocator_of(name).solve(replace(problem, max_snr=np.full(5, np.inf)), 0, 0)
        for field in ("prune_ratio", "bandwidth_hz", "rate_bps", "latency_s", "price_per_hz", "deadline_s"):
            np.testing.assert_array_equal(getattr(same, field), getattr(answer, field))
        huge = allocator_of(name).solve(replace(problem, max_snr=np.full(5, 1e39)), 0, 0)
        np.testing.assert_allclose(huge.objective, answer.objective, atol=1e-9)
        np.testing.assert_allclose(huge.deadline_s, answer.deadline_s, rtol=1e-9)


def test_blocks_of_their_own_refuse_a_cap() -> None:
    problem = replace(draw(np.random.Generator(np.random.PCG64(8)), 5), max_snr=np.full(5, 1.0))
    with pytest.raises(
        ConfigError, match=r"channel\.p0_dbm and channel\.max_bits_per_hz: not with a gain for every block"
    ):
        allocator_of("selective").solve(problem, 0, 0)


def test_devices_without_computation_are_a_knapsack() -> None:
    """With a = 0 and every device below its cap, a hertz is worth the same from the first to the last: who gains most is served first."""
    rng = np.random.Generator(np.random.PCG64(9))
    for at in range(40):
        count = int(rng.choice([1, 2, 6]))
        problem = replace(draw(rng, count), shared_compute_s=np.zeros(count), max_ratio=np.ones(count))
        problem = replace(problem, payload_bits=np.full(count, 1e7), deadline_s=0.2, fixed_s=np.zeros(count))
        problem = replace(
            problem, snr_hz=np.full(count, 1e15), max_snr=rng.choice([0.5, 1.0, 3.0], count), bandwidth_hz=count * 1e7
        )
        if at % 3 == 0:
            problem = replace(
                problem, weight=np.ones(count), max_snr=np.ones(count)
            )  # who is served first is no matter
        answer = solve_under_policy(problem, "fail", solve_p1, least_feasible, certify)
        worth = problem.weight * 0.2 * np.log2(1 + problem.max_snr) / 1e7  # type: ignore[operator]
        left, best = problem.bandwidth_hz, 0.0
        for k in np.argsort(-worth):
            taken = min(left, problem.weight[k] / worth[k]) if worth[k] > 0 else 0.0
            best, left = best + worth[k] * taken, left - taken
        np.testing.assert_allclose(answer.objective, best, rtol=1e-9, atol=1e-12)
        if left == 0:
            np.testing.assert_allclose(answer.bandwidth_hz.sum(), problem.bandwidth_hz, rtol=1e-12)


def test_the_greedy_is_dynamic_programming() -> None:
    rng = np.random.Generator(np.random.PCG64(10))
    for _ in range(15):
        problem = draw(rng, int(rng.choice([2, 5])), capped=True)
        grid = Grid(problem.bandwidth_hz / 40, 40)
        if not grid.fits(problem):
            continue
        count, _ = solve_blocks(problem, grid)
        best = solve_table(table_of(problem, grid), 40)[1]
        kept = np.clip(kept_on(problem, count * grid.block_hz), problem.min_kept, 1)
        np.testing.assert_allclose(problem.weight @ kept, best, rtol=1e-12)


def test_a_dense_round_ends_together_and_no_earlier_one_fits() -> None:
    rng = np.random.Generator(np.random.PCG64(11))
    for _ in range(30):
        problem = draw(rng, 6, capped=True)
        deadline_s, b = dense_deadline(problem)
        t, sends = latency(problem, np.ones(6), b), problem.payload_bits > 0
        np.testing.assert_allclose(t[sends], deadline_s, rtol=1e-9)
        np.testing.assert_allclose(b.sum(), problem.bandwidth_hz, rtol=1e-9)
        assert deadline_s >= dense_deadline(replace(problem, max_snr=None))[0] * (1 - 1e-12)


def test_a_lower_cap_is_never_better() -> None:
    rng = np.random.Generator(np.random.PCG64(12))
    for _ in range(15):
        problem = draw(rng, 5, capped=True)
        lower = replace(problem, max_snr=problem.max_snr * rng.uniform(0.3, 1, 5))  # type: ignore[operator]
        lower = replace(lower, deadline_s=max(problem.deadline_s, 1.01 * least_feasible(lower)))
        values = [
            allocator_of("kkt").solve(replace(one, deadline_s=lower.deadline_s), 0, 0).objective
            for one in (problem, lower)
        ]
        assert values[0] >= values[1] - 1e-9 * problem.weight.sum()


@pytest.mark.parametrize("snr", [0.0, -1.0, np.nan, 1e-50])
def test_a_cap_that_is_none_is_refused_by_name(snr: float) -> None:
    with pytest.raises(ConfigError, match=r"device 1, max_snr=.*: must be > 0"):
        replace(literature(0.5, 0, 3), max_snr=np.array([1.0, snr, np.inf]))


def test_clock_and_power_are_not_chosen_under_a_cap() -> None:
    rng = np.random.Generator(np.random.PCG64(13))
    problem = with_limits(rng, literature(0.5, 0, 5))
    problem = replace(problem, limits=replace(problem.limits, energy_budget_j=np.ones(5)), max_snr=np.ones(5))  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"allocator.clock and allocator.power are not chosen under a cap"):
        replace(problem, freedom=Freedom(clock=True))
    replace(problem, freedom=Freedom(clock=True), max_snr=np.full(5, np.inf))
