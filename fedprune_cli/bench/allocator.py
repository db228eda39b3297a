"""The exact solution of P1 measured: against Clarabel's own solve time, and how its time grows with the devices."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedprune_cli.allocate.blocks import Grid, solve_blocks
from fedprune_cli.allocate.deadline import dense_deadline
from fedprune_cli.allocate.freedom import Freedom
from fedprune_cli.allocate.kkt import solve_p1
from fedprune_cli.allocate.limits import Limits
from fedprune_cli.allocate.problem import Problem, kept_fraction
from fedprune_cli.allocate.selective import select
from fedprune_cli.bench.measure import Effort, Measure, Say, exact, ratio, seconds
from fedprune_cli.errors import CertificateError
from fedprune_cli.rng import stream


def literature_problem(count: int, fraction: float = 0.1) -> Problem:
    """Returns `count` devices in a 500 m disk with Rayleigh fading, 20 MHz, at a fraction of their dense optimum."""
    rng = stream(0, "fleet", count)
    distance_km = np.sqrt(rng.uniform(0.02**2, 0.5**2, count))
    loss_db = 128.1 + 37.6 * np.log10(distance_km) + 8 * rng.normal(size=count)
    snr_hz = 10 ** ((23 - 30 - loss_db + 174 + 30) / 10) * rng.exponential(size=count)
    problem = Problem(
        rng.uniform(0.5, 2, count), np.full(count, 1e7), rng.uniform(0.01, 0.1, count), snr_hz,
        np.full(count, 1 / count), np.full(count, 0.95), 20e6, np.inf,
    )  # fmt: skip
    return replace(problem, deadline_s=fraction * dense_deadline(problem)[0])


def measure_allocator(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Measures the exact solution of P1: against Clarabel's own solve time, and how its time grows with the devices."""
    return (*_against_clarabel(effort), *_growth(effort, say), *_in_blocks(effort, say), *_with_more(effort, say))


def _against_clarabel(effort: Effort) -> tuple[Measure, ...]:
    """cvxpy's compilation, many times the solve, is left out: the reference is the conic solver at its best."""
    from fedprune_cli.allocate.reference import clarabel, clarabel_alone, dcp_p1

    problem = literature_problem(1000)
    bandwidth_hz, _ = solve_p1(problem)
    kept = np.minimum(1.0, kept_fraction(problem, bandwidth_hz))
    objective = float(problem.weight @ kept)
    solution, x, _ = dcp_p1(problem, problem.bandwidth_hz / len(problem.weight))
    clarabel(solution)
    if abs(float(problem.weight @ x.value) - objective) > 1e-6 * objective:
        raise CertificateError(f"bench: P1 is {objective} and Clarabel finds {float(problem.weight @ x.value)}")
    alone = clarabel_alone(solution)
    turns = [(_solve_s(problem), seconds(alone, time.process_time)) for _ in range(2 + effort.repeats)]
    ours_s, solver_s = zip(*turns, strict=True)
    figure = statistics.median(solver_s)
    return (
        ratio("allocator/p1_vs_clarabel", "x Clarabel", "smaller", ours_s, solver_s, figure),
        exact("allocator/objective", "sum w x", objective, "larger"),
    )


def _growth(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """The time a device at each K as a ratio to that at K=1000, and the exponent e of the fit time = c (K log K)^e."""
    sizes = [10**power for power in (range(3, 6) if effort.quick else range(3, 7))]
    problems = [literature_problem(size) for size in sizes]
    for problem in problems[:2]:
        solve_p1(problem)
    # the sizes take turns, so that a busy spell of the machine meets them all; small ones are solved many times in each
    turns = [[_solve_s(problem) for problem in problems] for _ in range(2 + effort.repeats)]
    device_s = [[turn[at] / size for turn in turns] for at, size in enumerate(sizes)]
    work = np.log([size * math.log(size) for size in sizes])
    exponents = [float(np.polyfit(work, np.log(turn), 1)[0]) for turn in turns]
    for size, values in zip(sizes, device_s, strict=True):
        say(f"allocator: K=1e{round(math.log10(size))}: {statistics.median(values):.3g} s a device")
    say(f"allocator: time grows as (K log K)^{statistics.median(exponents):.3f}")
    growth = [
        ratio(
            f"allocator/device_s_1e{round(math.log10(size))}", "x K=1000", "smaller",
            values, device_s[0], statistics.median(device_s[0]),
        )
        for size, values in zip(sizes[1:], device_s[1:], strict=True)
    ]  # fmt: skip
    ones = [1.0] * len(exponents)
    return (*growth, ratio("allocator/exponent", "of K log K", "smaller", exponents, ones, 1.0))


def _in_blocks(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Whole blocks as a ratio to the continuous solution: 273 blocks for 1,000 devices, and 5,000 for 100,000."""
    measures = []
    for power, count in ((3, 273), (5, 5000)):
        problem = literature_problem(10**power)
        problem = replace(problem, max_ratio=np.ones(10**power))  # there are fewer blocks than devices
        again = functools.partial(_solve_blocks, problem, Grid(problem.bandwidth_hz / count, count))
        turns = [(seconds(again, time.process_time) / AGAIN, _solve_s(problem)) for _ in range(2 + effort.repeats)]
        ours_s, continuous_s = zip(*turns, strict=True)
        say(f"allocator: K=1e{power} on {count} blocks: {statistics.median(ours_s):.3g} s")
        figure = statistics.median(continuous_s)
        measures.append(
            ratio(f"allocator/blocks_1e{power}", "x without blocks", "smaller", ours_s, continuous_s, figure)
        )
    return tuple(measures)


def _with_more(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Capped signals, chosen clocks and powers, and who gets which block, as ratios to P1 without them on the same devices."""
    rows: list[tuple[str, int, Callable[[Problem], object]]] = [
        ("capped_1e5", 10**5, lambda problem: solve_p1(replace(problem, max_snr=np.full(10**5, 10.0)))),
        ("chosen_1e4", 10**4, lambda problem: solve_p1(free_problem(problem))),
        ("selective_20", 20, lambda problem: select(problem, stream(0, "fleet", 20).exponential(size=(20, 51)))),
    ]
    if not effort.quick:
        rows.append(("chosen_1e6", 10**6, lambda problem: solve_p1(free_problem(problem))))
    measures = []
    for name, count, solve in rows:
        problem = literature_problem(count)
        again = functools.partial(solve, problem)
        turns = [(seconds(again, time.process_time), _solve_s(problem)) for _ in range(1 + effort.repeats)]
        ours_s, plain_s = zip(*turns, strict=True)
        say(f"allocator: {name}: {statistics.median(ours_s):.3g} s")
        measures.append(ratio(f"allocator/{name}", "x P1", "smaller", ours_s, plain_s, statistics.median(plain_s)))
    return tuple(measures)


def free_problem(problem: Problem) -> Problem:
    """Returns the problem of devices that choose their clock and power within a budget of energy that binds most of them."""
    size = len(problem.weight)
    nothing, compute_s = np.zeros(size), 0.5 * problem.fixed_s
    limits = Limits(
        nothing, np.full(size, np.inf), problem.deadline_s * np.full(size, 0.1), problem.shared_compute_s, compute_s,
        np.full(size, 0.2), compute_s, nothing,
    )  # fmt: skip
    return replace(problem, limits=limits, freedom=Freedom(clock=True, power=True))


AGAIN = 3  # solutions of which the mean is taken


def _solve_blocks(problem: Problem, grid: Grid) -> None:
    for _ in range(AGAIN):
        solve_blocks(problem, grid)


def _solve_s(problem: Problem) -> float:
    """Returns the CPU seconds of one solution, the mean of as many as 50,000 devices make: what else runs matters less to them."""
    count = max(1, 50_000 // len(problem.weight))
    return seconds(lambda: [solve_p1(problem) for _ in range(count)], time.process_time) / count
