"""Fair shares, least energy, and energy against time: certificates, cvxpy, brute force, and what they are in the limit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_setup, run_to_end

from fedprune_cli.allocate.baselines import Allocator, Fixed, MinMax
from fedprune_cli.allocate.deadline import dense_deadline, least_deadline, least_feasible
from fedprune_cli.allocate.fair import certify_fair, solve_fair
from fedprune_cli.allocate.inverse import rate
from fedprune_cli.allocate.joules import Timed, certify_energy, falling_root, joules, sending, solve_energy, solve_timed
from fedprune_cli.allocate.objectives import LeastEnergy, Proportional, Weighted
from fedprune_cli.allocate.problem import Problem, kept_on, required_bandwidth
from fedprune_cli.allocate.reference import solve_energy_cvxpy, solve_fair_cvxpy
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.contracts.problems import draw, literature, with_limits
from fedprune_cli.errors import ConfigError

FAIR = Proportional("proportional", "fail")
DENSE, HALF = LeastEnergy("energy", "fail", 0.0), LeastEnergy("energy", "fail", 0.5)


def check_certified(allocators: tuple[Allocator, ...], count: int, seed: int, sizes: tuple[int, ...]) -> None:
    """Wild problems, every third one with limits: residuals and gap are some last digits."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for at in range(count):
        problem = draw(rng, int(rng.choice(sizes)), limited=at % 3 == 2)
        for allocator in allocators:
            allocation = allocator.solve(problem, 0, 0)
            proof = allocation.certificate
            assert proof is not None or not allocation.admitted.any()
            if proof is not None:
                assert proof.residual <= 1e-10, (at, allocator, proof)
                assert abs(proof.gap) <= 1e-10, (at, allocator, proof)


def test_random_instances_are_certified() -> None:
    check_certified((FAIR, HALF), 60, 1, (1, 2, 3, 10, 50))
    check_certified((DENSE, Weighted("weighted", 0.5, 1e-4), Weighted("weighted", 0.0, 10.0)), 6, 2, (1, 2, 3, 10))


@pytest.mark.slow
def test_2000_random_instances_are_certified() -> None:
    check_certified((FAIR, DENSE, HALF), 2000, 3, (1, 2, 3, 10, 50, 200))
    for seed, theta in enumerate((1e-4, 1.0, 1e3)):
        check_certified((Weighted("weighted", 0.5, theta),), 700, seed, (1, 2, 3, 10, 50))


def sane(count: int, seed: int, fractions: tuple[float, float]) -> list[Problem]:
    """Returns problems of the literature's scenario, every third one with limits."""
    rng = np.random.Generator(np.random.PCG64(seed))
    found = []
    for at in range(count):
        problem = literature(float(rng.uniform(*fractions)), int(rng.integers(2**32)), count=(1, 2, 5, 10)[at % 4])
        problem = replace(problem, weight=rng.uniform(0.1, 1, len(problem.weight)))
        if at % 3 == 2:
            problem = with_limits(rng, problem)
        found.append(replace(problem, deadline_s=max(problem.deadline_s, 1.01 * least_feasible(problem))))
    return found


def compare_with_cvxpy(count: int, seed: int) -> None:
    for problem in sane(count, seed, (0.4, 1.0)):
        ours = FAIR.solve(problem, 0, 0)
        value = float(problem.weight @ np.log(1 - ours.prune_ratio))
        assert abs(value - solve_fair_cvxpy(problem)[0]) <= 1e-6 * problem.weight.sum()
    for problem in sane(count, seed + 1, (1.1, 3.0)):
        for allocator in (DENSE, HALF):
            ours = allocator.solve(problem, 0, 0)
            kept = 1 - ours.prune_ratio
            spent_j = sending(problem, kept, ours.bandwidth_hz)
            assert abs(solve_energy_cvxpy(problem, kept) / spent_j - 1) <= 1e-5
        for theta in (1e-3, 0.1, 10.0):
            ours = Weighted("weighted", 0.3, theta).solve(problem, 0, 0)
            if not ours.admitted.all():
                continue
            kept = 1 - ours.prune_ratio
            cost_j = sending(problem, kept, ours.bandwidth_hz) + theta * ours.deadline_s
            at = replace(problem, deadline_s=ours.deadline_s)
            assert abs(solve_energy_cvxpy(at, kept, theta) / cost_j - 1) <= 1e-5


def test_cvxpy_agrees() -> None:
    compare_with_cvxpy(3, seed=4)


@pytest.mark.slow
def test_cvxpy_agrees_on_100_problems_each() -> None:
    compare_with_cvxpy(100, seed=6)


def test_a_wrong_answer_is_noticed() -> None:
    problem = literature(0.5, 0)
    bandwidth_hz, price = solve_fair(problem)
    moved = bandwidth_hz * np.where(np.arange(10) == 3, 0.99, 1.0)
    assert certify_fair(problem, kept_on(problem, bandwidth_hz), bandwidth_hz, price).holds
    assert not certify_fair(problem, kept_on(problem, moved), moved, price).holds
    assert not certify_fair(problem, kept_on(problem, bandwidth_hz), bandwidth_hz, 1.01 * price).holds
    late, half = replace(problem, deadline_s=3 * problem.deadline_s), np.full(10, 0.5)
    bandwidth_hz, price = solve_energy(late, half)
    assert certify_energy(late, half, bandwidth_hz, price).holds
    assert certify_energy(late, half, moved * (problem.bandwidth_hz / moved.sum()), price).gap > 1e-6
    assert not certify_energy(late, half, bandwidth_hz, 1.01 * price).holds
    timed = Weighted("weighted", 0.5, 1.0)
    ours = timed.solve(problem, 0, 0)
    later = replace(problem, deadline_s=1.01 * ours.deadline_s)
    assert timed.certify(later, half, ours.bandwidth_hz, ours.price_per_hz).gap > 1e-6


# --- fair shares ----------------------------------------------------------------------------------------------------


def test_equal_devices_get_equal_shares_and_the_deadline_does_not_move_the_others() -> None:
    problem = literature(0.3, 1).take(np.zeros(7, dtype=int))
    np.testing.assert_allclose(FAIR.solve(problem, 0, 0).bandwidth_hz, problem.bandwidth_hz / 7, rtol=1e-9)
    other = replace(literature(0.15, 2), max_ratio=np.ones(10))
    shares = [FAIR.solve(replace(other, deadline_s=other.deadline_s * factor), 0, 0) for factor in (0.8, 1.0)]
    assert all(max(one.binds) == "deadline" for one in shares)  # nobody is at an end of its ratio
    np.testing.assert_allclose(shares[0].bandwidth_hz, shares[1].bandwidth_hz, rtol=1e-9)


def test_no_exchange_is_fairer() -> None:
    """Moving a thousandth of what one device could spare to another raises no sum w ln x, and the price says what it costs."""
    for problem in sane(9, 9, (0.3, 0.9)):
        ours = FAIR.solve(problem, 0, 0)
        kept, b = 1 - ours.prune_ratio, ours.bandwidth_hz
        spare_hz = 1e-3 * (b - required_bandwidth(problem, problem.min_kept))
        for giver, taker in itertools.permutations(range(len(b)), 2):
            moved = b.copy()
            moved[giver] -= spare_hz[giver]
            moved[taker] = min(moved[taker] + spare_hz[giver], problem.most_hz[taker])
            gain = float(problem.weight @ np.log(kept_on(problem, moved) / kept))
            assert gain <= 1e-12
        more = FAIR.solve(replace(problem, bandwidth_hz=problem.bandwidth_hz * (1 + 1e-5)), 0, 0)
        gain = float(problem.weight @ np.log((1 - more.prune_ratio) / kept))
        assert np.isclose(gain, ours.price_per_hz * 1e-5 * problem.bandwidth_hz, rtol=1e-3, atol=1e-12)


# --- energy ---------------------------------------------------------------------------------------------------------


def test_energy_is_least_on_a_grid_and_what_a_hertz_saves_is_its_price() -> None:
    for seed in range(2):
        problem = literature(1.5, seed, count=2)
        ours = DENSE.solve(problem, 0, 0)
        assert ours.joules is not None
        shares = np.arange(1, 500) / 500
        tried = np.stack([shares, 1 - shares], 1) * problem.bandwidth_hz
        possible = [b for b in tried if (b >= required_bandwidth(problem, np.ones(2))).all()]
        best_j = min(float(joules(problem, np.ones(2), b).sum()) for b in possible)
        assert ours.joules.sum() <= best_j * (1 + 1e-12)
        assert ours.joules.sum() >= best_j * (1 - 1e-2)
        more = DENSE.solve(replace(problem, bandwidth_hz=problem.bandwidth_hz + 1e3), 0, 0)
        assert more.joules is not None
        assert np.isclose((ours.joules.sum() - more.joules.sum()) / 1e3, ours.price_per_hz, rtol=1e-3)


def test_energy_at_its_limits() -> None:
    """At the dense optimum there is no choice; before it all drop alike, as minmax; and late enough the deadline does not matter."""
    problem = literature(1.0, 3)
    dense_s, dense_hz = dense_deadline(problem)
    tight = DENSE.solve(replace(problem, deadline_s=dense_s * (1 + 1e-12)), 0, 0)
    np.testing.assert_allclose(tight.bandwidth_hz, dense_hz, rtol=1e-6)
    early = replace(problem, deadline_s=0.5 * dense_s)
    raised, fairest = DENSE.solve(early, 0, 0), MinMax("minmax", "fail").solve(early, 0, 0)
    np.testing.assert_allclose(raised.prune_ratio, fairest.prune_ratio.max(), rtol=1e-9)
    assert "no room for a ratio below" in raised.message
    assert HALF.solve(problem, 0, 0).message == ""
    late, later = (HALF.solve(replace(problem, deadline_s=factor * dense_s), 0, 0) for factor in (1e3, 1e6))
    np.testing.assert_allclose(late.bandwidth_hz, later.bandwidth_hz, rtol=1e-9)
    assert set(late.binds) == {"ratio"}
    r = rate(late.bandwidth_hz, problem.snr_hz)  # what a hertz saves, by differences
    step = rate(late.bandwidth_hz * (1 + 1e-6), problem.snr_hz)
    np.testing.assert_allclose(
        0.2 * 5e6 * (1 / r - 1 / step) / (1e-6 * late.bandwidth_hz), late.price_per_hz, rtol=1e-4
    )


def test_a_table_without_joules_is_refused() -> None:
    bare = replace(literature(0.5, 0), energies=None)
    for allocator in (DENSE, Weighted("weighted")):
        with pytest.raises(ConfigError, match=r"joules needs what they are: .* shared_energy_j and tx_power_w"):
            allocator.solve(bare, 0, 0)


# --- energy against time --------------------------------------------------------------------------------------------


def test_no_deadline_is_better_and_the_ends_are_the_shortest_round_and_the_least_energy() -> None:
    for seed in range(3):
        problem = literature(1.0, seed, count=5)
        half = np.full(5, 0.5)
        open_ = replace(problem, max_ratio=half, deadline_s=np.inf)
        for theta in (1e-3, 0.05, 2.0):
            timed = Timed(open_, theta)
            deadline_s, bandwidth_hz, _ = solve_timed(timed)
            best = theta * deadline_s + sending(problem, half, bandwidth_hz)
            for later_s in timed.least_s * np.geomspace(1 + 1e-9, 30, 20):
                b, _ = solve_energy(timed.at(later_s), half)
                assert best <= (theta * later_s + sending(problem, half, b)) * (1 + 1e-12)
        soon = Weighted("weighted", 0.5, 1e6).solve(problem, 0, 0)
        shortest = Fixed("fixed", 0.5).solve(problem, 0, 0)
        assert np.isclose(soon.deadline_s, shortest.deadline_s, rtol=1e-9)
        np.testing.assert_allclose(soon.bandwidth_hz, shortest.bandwidth_hz, rtol=1e-6)
        cheap = Weighted("weighted", 0.5, 1e-9).solve(problem, 0, 0)
        free_hz, _ = solve_energy(open_, half)
        np.testing.assert_allclose(cheap.bandwidth_hz, free_hz, rtol=1e-3)
        assert shortest.deadline_s == pytest.approx(least_deadline(problem, half)[0], rel=1e-12)


def test_the_root_of_a_falling_function_is_found_over_twenty_decades() -> None:
    for root in (1.5, 1e4, 3e15):
        assert falling_root(lambda x, at=root: at - x, 1.0, 1e20) == pytest.approx(root, rel=1e-14)
        assert falling_root(lambda x, at=root: 1 / x**2 - 1 / at**2, 1.0, 1e20) == pytest.approx(root, rel=1e-14)
    assert falling_root(lambda x: -1.0, 1.0, 2.0) == 1.0
    assert falling_root(lambda x: 1.0, 1.0, 2.0) == 2.0


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["proportional", "energy", "weighted"])
def test_a_run_is_verified_with_cvxpy(tmp_path: Path, name: str) -> None:
    overrides = (f"allocator={name}",)
    run_to_end(tmp_path / "run", *overrides)
    found = verify_run(make_setup(*overrides), tmp_path / "run", every=2)
    assert found.failures == ()
    assert found.certified == found.rounds == 3
    assert found.solved_again == 1
    assert found.difference <= 1e-5
