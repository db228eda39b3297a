"""Allocation problems for tests: wild ones, and the literature's scenario."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedprune_cli.allocate.deadline import dense_deadline, least_feasible
from fedprune_cli.allocate.inverse import rate
from fedprune_cli.allocate.limits import Limits
from fedprune_cli.allocate.problem import Problem


def draw(rng: np.random.Generator, count: int, limited: bool = False, capped: bool = False) -> Problem:
    """Returns a random feasible problem: gains over up to 12 decades, deadlines from barely feasible to slack, and degenerate devices.

    limited: with bandwidth limits and energy budgets, some of which bind; capped: with caps on signal-to-noise ratios.
    """
    wild = rng.random() < 0.5
    snr_hz = 10 ** rng.uniform(3, 15, count) if wild else 10 ** rng.uniform(6, 9, count)
    compute_s = rng.uniform(0, 1, count) * (rng.random() < 0.8)
    bits = 10 ** rng.uniform(3, 9) * rng.uniform(0.1, 1, count)
    weight = rng.random(count) * (rng.random(count) < 0.9)
    fixed_s = rng.uniform(0, 0.1, count)
    if rng.random() < 0.1:  # identical devices
        snr_hz, compute_s, bits, weight, fixed_s = (
            np.full(count, values[0]) for values in (snr_hz, compute_s, bits, weight, fixed_s)
        )
    if rng.random() < 0.1:
        bits[rng.integers(count)] = 0.0
    ratio = np.full(count, rng.choice([0.5, 0.9, 1.0]))
    if rng.random() < 0.2:
        ratio = rng.uniform(0, 1, count)
    problem = Problem(compute_s, bits, fixed_s, snr_hz, weight, ratio, 20e6, np.inf)
    problem = with_energies(problem)
    if limited:
        problem = with_limits(rng, problem)
    if capped:
        problem = with_caps(rng, problem)
    low = least_feasible(problem)
    high = max(dense_deadline(problem)[0], 1.5 * low if limited else 0.0)
    return replace(problem, deadline_s=low + (high - low) * rng.choice([1e-6, 1e-3, 0.1, 0.3, 0.5, 0.9, 1.1]))


def with_energies(problem: Problem) -> Problem:
    """Returns the problem with what computing and sending cost: a watt and a fifth of one, and no limit."""
    nothing = np.zeros(len(problem.weight))
    endless = nothing + np.inf
    costs = Limits(nothing, endless, endless, problem.shared_compute_s, problem.fixed_s, nothing + 0.2)
    return replace(problem, energies=costs)


def with_limits(rng: np.random.Generator, problem: Problem) -> Problem:
    """Returns the problem with limits that its devices can keep at some deadline."""
    count = len(problem.weight)
    share_hz = problem.bandwidth_hz / count
    least_hz = share_hz * rng.uniform(0, 0.5, count) * (rng.random(count) < 0.3)
    most_hz = np.where(
        rng.random(count) < 0.4, np.maximum(least_hz, share_hz * 10 ** rng.uniform(-1, 1, count)), np.inf
    )
    shared_j, fixed_j = rng.uniform(0, 1, count) * (rng.random() < 0.8), rng.uniform(0, 0.1, count)
    power_w = 10 ** rng.uniform(-2, 0, count)
    r = np.maximum(rate(np.full(count, share_hz), problem.snr_hz), 1e-300)
    dense_j = shared_j + power_w * problem.payload_bits / r
    budget_j = np.where(rng.random(count) < 0.7, fixed_j + dense_j * 10 ** rng.uniform(-0.5, 0.2, count), np.inf)
    while True:
        limited = replace(problem, limits=Limits(least_hz, most_hz, budget_j, shared_j, fixed_j, power_w))
        if np.isfinite(least_feasible(limited)):
            return limited
        budget_j = budget_j * 1.5


def with_caps(rng: np.random.Generator, problem: Problem) -> Problem:
    """Returns the problem with caps on the ratios of signal to noise, one for all or of each device's own, that some deadline allows."""
    count = len(problem.weight)
    alone = rng.random() < 0.7
    usual = problem.snr_hz / (problem.bandwidth_hz / count) * 10 ** rng.uniform(-2, 2, count)
    snr = np.maximum(usual, 1e-6) if alone else np.full(count, 10 ** rng.uniform(-2, 1))
    snr = np.where(rng.random(count) < 0.8, snr, np.inf)
    while True:
        capped = replace(problem, max_snr=snr)
        if np.isfinite(least_feasible(capped)):
            return capped
        snr = snr * 10


def literature(fraction: float, seed: int, count: int = 10) -> Problem:
    """Returns the literature's scenario at a fraction of its dense optimum: devices in a 500 m disk, 20 MHz, 23 dBm, 8 dB shadowing."""
    rng = np.random.Generator(np.random.PCG64(seed))
    distance_km = np.sqrt(rng.uniform(0.02**2, 0.5**2, count))
    loss_db = 128.1 + 37.6 * np.log10(distance_km) + 8 * rng.normal(size=count)
    snr_hz = 10 ** ((23 - 30 - loss_db + 174 + 30) / 10) * rng.exponential(size=count)
    problem = Problem(
        rng.uniform(0.5, 2, count), np.full(count, 1e7), rng.uniform(0.01, 0.1, count), snr_hz, np.full(count, 1 / count),
        np.full(count, 0.95), 20e6, np.inf,
    )  # fmt: skip
    return replace(with_energies(problem), deadline_s=fraction * dense_deadline(problem)[0])
