"""Bits per value for each device: brute force, one width for all, and a bound that no choice exceeds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fedprune_cli.allocate.baselines import Kkt
from fedprune_cli.allocate.bits import Menu, Widths, allocate_bits, solve_widths
from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.kkt import solve_p1
from fedprune_cli.allocate.policy import Policy
from fedprune_cli.allocate.problem import Problem, kept_on
from fedprune_cli.contracts.problems import draw, literature
from fedprune_cli.errors import InfeasibleError

SHARE = np.array([4.03125, 8.03125, 32.0]) / 32
DISCOUNT = 1 / (1 + np.array([10 / 7**2, 10 / 127**2, 0.0]) / 4)


def drawn(seed: int, count: int) -> Widths:
    rng = np.random.Generator(np.random.PCG64(seed))
    problem = literature(float(rng.uniform(0.05, 0.6)), seed, count=count)
    return Widths(replace(problem, weight=rng.uniform(0.1, 1, count), max_ratio=np.ones(count)), SHARE, DISCOUNT)


def value_of(widths: Widths, width: np.ndarray) -> float:
    at = widths.at(width)
    return float(at.weight @ kept_on(at, solve_p1(at)[0]))


def test_no_choice_is_above_the_bound_and_none_much_better() -> None:
    best_found = 0
    for seed in range(4):
        widths = drawn(seed, 3)
        found, total = solve_widths(widths), widths.problem.weight.sum()
        best = max(value_of(widths, np.array(choice)) for choice in itertools.product(range(3), repeat=3))
        assert best <= found.bound + 1e-9 * total
        assert found.value <= best + 1e-12 * total
        assert found.value >= best - 0.02 * total
        assert np.isclose(found.value, value_of(widths, found.width))
        best_found += found.value >= best - 1e-9 * total
    assert best_found >= 2


def check_bounds(count: int, seed: int) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    for at in range(count):
        problem = draw(rng, int(rng.choice((1, 3, 10))), limited=at % 3 == 2)
        widths = Widths(problem, SHARE, DISCOUNT)
        found, total = solve_widths(widths), max(problem.weight.sum(), 1e-300)
        assert found.gap(problem.weight) >= -1e-9, at
        assert found.bandwidth_hz.sum() <= problem.bandwidth_hz * (1 + 1e-9)
        for width in range(3):
            if widths.fits(np.full(len(problem.weight), width)):
                assert found.value >= value_of(widths, np.full(len(problem.weight), width)) - 1e-9 * total


def test_it_is_never_worse_than_one_width_for_all() -> None:
    check_bounds(9, seed=1)


@pytest.mark.slow
def test_2000_are_never_worse_than_one_width_for_all() -> None:
    check_bounds(2000, seed=2)


def test_one_width_is_p1_without_a_gap() -> None:
    problem = literature(0.4, 3)
    found = solve_widths(Widths(problem, np.ones(1), np.ones(1)))
    bandwidth_hz, price = solve_p1(problem)
    np.testing.assert_array_equal(found.bandwidth_hz, bandwidth_hz)
    assert found.price_per_hz == price
    assert abs(found.gap(problem.weight)) <= 1e-9


def test_equal_devices_need_not_have_equal_bits_and_many_devices_close_the_gap() -> None:
    """Where two widths are as good, some devices take one and some the other: the gap falls with their number."""
    one = literature(0.2, 4, count=2).take(np.array([0]))
    gaps = []
    for count in (2, 8, 32):
        many = one.take(np.zeros(count, dtype=int))
        many = replace(many, bandwidth_hz=one.bandwidth_hz / 64 * count, max_ratio=np.ones(count))
        found = solve_widths(Widths(many, SHARE, DISCOUNT))
        gaps.append(found.gap(many.weight))
    assert gaps[2] <= max(gaps[0], 1e-9)
    assert gaps[2] <= 0.01


def test_no_room_is_said() -> None:
    problem = replace(literature(0.5, 0), max_ratio=np.zeros(10), deadline_s=1e-3)
    with pytest.raises(InfeasibleError, match="even the fewest bits leave no room"):
        solve_widths(Widths(problem, SHARE, DISCOUNT))


# --- the allocation of a round --------------------------------------------------------------------------------------

MENU = Menu(np.array([4, 8, 32]), SHARE, np.array([10 / 7**2, 10 / 127**2, 0.0]))


def worth_of(problem: Problem, kept: np.ndarray, bits: np.ndarray) -> float:
    omega = MENU.omega[np.searchsorted(MENU.bits, bits)]
    return float((problem.weight * kept / (1 + omega / len(kept))).sum())


def test_bits_of_its_own_are_never_worse_than_any_for_all_and_within_the_gap_of_any_choice() -> None:
    for seed in range(4):
        problem = replace(drawn(seed, 3).problem, max_ratio=np.full(3, 0.99))
        whole, found = allocate_bits(problem, "stretch", MENU)
        assert found.bits is not None
        assert found.gap is not None
        total, worth = problem.weight.sum(), worth_of(problem, 1 - found.prune_ratio, found.bits)
        for place in range(3):
            common = Kkt("kkt", "stretch").solve(Widths(problem, SHARE, np.ones(3)).all_at(place), 0, 0)
            if common.status == "optimal":
                assert worth >= worth_of(problem, 1 - common.prune_ratio, np.full(3, MENU.bits[place])) - 1e-9 * total
        widths = Widths(problem, SHARE, 1 / (1 + MENU.omega / 3))
        for choice in itertools.product(range(3), repeat=3):
            if widths.fits(np.array(choice)):
                assert value_of(widths, np.array(choice)) <= worth + (found.gap + 1e-9) * total
        assert found.objective == pytest.approx(problem.weight @ (1 - found.prune_ratio))
        proof = Kkt("kkt", "stretch").certify(whole, 1 - found.prune_ratio, found.bandwidth_hz, found.price_per_hz)
        assert proof.holds
        np.testing.assert_allclose(
            whole.payload_bits, problem.payload_bits * SHARE[np.searchsorted(MENU.bits, found.bits)]
        )


@pytest.mark.parametrize("policy", ["stretch", "drop", "fail"])
def test_a_round_is_infeasible_where_the_fewest_bits_are_too_many(policy: Policy) -> None:
    problem = replace(literature(0.5, 1), max_ratio=np.full(10, 0.2))
    few = replace(problem, payload_bits=problem.payload_bits * SHARE[0])
    problem, few = (replace(one, deadline_s=0.6 * least_feasible(few)) for one in (problem, few))
    if policy == "fail":
        with pytest.raises(InfeasibleError, match="too early"):
            allocate_bits(problem, policy, MENU)
        return
    found, known = allocate_bits(problem, policy, MENU)[1], Kkt("kkt", policy).solve(few, 0, 0)
    assert found.bits is not None
    assert (found.status, found.message, found.deadline_s) == (known.status, known.message, known.deadline_s)
    np.testing.assert_array_equal(found.admitted, known.admitted)
    if policy == "stretch":  # no room for anything else
        assert (found.bits == 4).all()
        np.testing.assert_allclose(found.prune_ratio, known.prune_ratio, atol=1e-9)


@pytest.mark.parametrize("seed", [2, 12, 18, 33])
def test_where_devices_differ_their_own_bits_are_the_best_of_all_choices_and_better_than_any_for_all(seed: int) -> None:
    problem = replace(drawn(seed, 3).problem, max_ratio=np.full(3, 0.99))
    found, widths = allocate_bits(problem, "stretch", MENU)[1], Widths(problem, SHARE, 1 / (1 + MENU.omega / 3))
    assert found.bits is not None
    values = {choice: value_of(widths, np.array(choice)) for choice in itertools.product(range(3), repeat=3)}
    total, worth = problem.weight.sum(), worth_of(problem, 1 - found.prune_ratio, found.bits)
    assert worth == pytest.approx(max(values.values()), rel=1e-9)
    assert worth >= max(values[place, place, place] for place in range(3)) + 1e-3 * total
