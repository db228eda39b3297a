"""Bits per value for each device: brute force, one width for all, and a bound that no choice exceeds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fedprune_cli.allocate.bits import Widths, solve_widths
from fedprune_cli.allocate.kkt import solve_p1
from fedprune_cli.allocate.problem import kept_on
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
