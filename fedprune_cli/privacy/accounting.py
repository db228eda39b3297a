"""What noise costs and buys: epsilon at delta of Gaussian noise, drawn many times, and the least noise for an epsilon.

Neighbours differ in what one device, or one sample, adds: it is there, or nothing is in its place that would count. So who takes part,
and how many samples a device has, is the same in both.

Noise on what always takes part has a closed form (Balle and Wang, ICML 2018): `times` draws of multiplier s are one of s / sqrt(times).
What takes part with a probability of its own in each draw is accounted by `dp-accounting`, whose one home this is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedprune_cli.errors import ConfigError
from fedprune_cli.privacy.settings import Privacy

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

LARGEST = 1e6  # epsilon, which nothing is beyond
SMALLEST_NOISE = 0.1  # multiplier, as privacy.noise has it
DIGITS = 3  # of a noise multiplier that follows from a budget, rounded up: the last ones would be the accountant's
GRID = 1e-4  # of the discretised privacy loss, as dp-accounting has it; it rounds up
COARSE_GRID = 1e-2  # where an answer begins to be looked for


@dataclass(frozen=True)
class Release:
    """What a data owner's values go through: Gaussian noise of `noise` times their largest norm, in `times` draws.

    rate: the probability with which they take part in a draw, independently of all others; 1: always.
    """

    noise: float
    rate: float
    times: int


@dataclass(frozen=True)
class Budget:
    """What a run may spend: epsilon at delta; one: what each of a device's rounds releases; rounds: how many of them it can afford."""

    epsilon: float
    delta: float
    one: Release
    rounds: int

    def spent(self, rounds: int) -> float:
        """Returns the epsilon that so many of a device's rounds have spent."""
        return epsilon(Release(self.one.noise, self.one.rate, rounds * self.one.times), self.delta)


def plan_budget(privacy: Privacy, rate: float, times: int, planned: int) -> Budget | None:
    """Returns the budget of a run, None where nothing is differentially private.

    In each of a device's rounds its values take part in `times` draws, in each with probability `rate`; planned: the rounds for which the
    budget is to last where the noise follows from it. Raises ConfigError where the noise that is asked for affords no round.
    """
    if privacy.epsilon is None or privacy.delta is None or privacy.dp is None:
        return None
    require_accountant(rate)
    noise = privacy.noise or noise_for(privacy.epsilon, privacy.delta, rate, times * planned)
    one = Release(noise, rate, times)
    rounds = planned if privacy.noise is None else draws_for(privacy.epsilon, privacy.delta, one, planned)
    if rounds < 1:
        least = epsilon(one, privacy.delta)
        raise ConfigError(
            f"privacy.noise={noise:g}: one round spends epsilon {least:.4g} at delta {privacy.delta:g}, the budget is "
            f"privacy.epsilon={privacy.epsilon:g}; take more noise, or null for the least with which it lasts"
        )
    return Budget(privacy.epsilon, privacy.delta, one, rounds)


def require_accountant(rate: float) -> None:
    """Raises ConfigError where a sampled release has to be accounted and the package for it is not installed."""
    if rate < 1:
        try:
            import dp_accounting  # noqa: F401
        except ImportError:
            drawn = "privacy.dp=example, or privacy.dp=client with participation.rate,"
            raise ConfigError(f"{drawn} needs an extra (dp-accounting): pip install 'fedprune[privacy]'") from None


def epsilon(release: Release, delta: float, grid: float = GRID) -> float:
    """Returns the epsilon that a release has spent at `delta`; 0 before the first draw.

    grid: in which losses are discretised, where some are drawn and some are not.

    >>> round(epsilon(Release(noise=5.0, rate=1.0, times=20), delta=1e-3), 4)
    2.7354
    """
    if release.times == 0:
        return 0.0
    if release.rate >= 1:
        return _gaussian(math.sqrt(release.times) / release.noise, delta)
    return _sampled(release, delta, grid)


def noise_for(budget: float, delta: float, rate: float, times: int) -> float:
    """Returns the least noise multiplier, in three digits and rounded up, with which `times` draws spend at most `budget`.

    >>> noise_for(budget=3.0, delta=1e-3, rate=1.0, times=20)
    4.64
    """

    def about(noise: float) -> float:
        """Returns epsilon by the central limit theorem for sampled Gaussians (Dong et al., 2022), which costs nothing."""
        return _gaussian(rate * math.sqrt(times * math.expm1(noise**-2)), delta)

    low, high = math.log(SMALLEST_NOISE), math.log(LARGEST)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if about(math.exp(middle)) <= budget else (middle, high)
    rough = math.exp(high)
    unit = 10.0 ** (math.floor(math.log10(rough)) + 1 - DIGITS)

    def least_from(near: int, width: int, grid: float) -> int:
        """Returns the least number of units that is enough, looked for from `near` on: fast where that is nearly it."""

        def enough(at: int) -> bool:
            return epsilon(Release(at * unit, rate, times), delta, grid) <= budget

        above = below = width
        while not enough(near + above):
            above *= 2
        while near - below > least and enough(near - below):
            below *= 2
        return _first(enough, max(near - below, least - 1), near + above)

    least = math.ceil(SMALLEST_NOISE / unit)
    near = least_from(round(rough / unit), 2, COARSE_GRID)
    return round(least_from(near, 1, GRID) * unit, 12)


def draws_for(budget: float, delta: float, one: Release, most: int) -> int:
    """Returns how often, at most `most` times, what one release draws can be drawn for `budget`."""

    def too_many(count: int) -> bool:
        return epsilon(Release(one.noise, one.rate, count * one.times), delta) > budget

    return _first(too_many, 0, most + 1) - 1


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Returns the first number in (low, high] at which something holds that holds from there on, `high` if at none before."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@functools.lru_cache(maxsize=1000)
def _sampled(release: Release, delta: float, grid: float) -> float:
    """As `epsilon`, where draws are sampled. All arms, runs and nodes of one process that have one privacy ask the same again."""
    return float(_one(release.noise, release.rate, grid).self_compose(release.times).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=4)
def _one(noise: float, rate: float, grid: float) -> PrivacyLossDistribution:
    """Returns the privacy loss of one draw."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(noise, value_discretization_interval=grid, sampling_prob=rate)


def _gaussian(distance: float, delta: float) -> float:
    """Returns epsilon of two unit Gaussians this far apart: the root of Phi(d/2 - e/d) - exp(e) Phi(-d/2 - e/d) = delta."""
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtr

    def above(value: float) -> float:
        shifted = value / distance
        return float(ndtr(distance / 2 - shifted) - math.exp(value + log_ndtr(-distance / 2 - shifted)) - delta)

    if above(0.0) <= 0:
        return 0.0
    high = 1.0
    while above(high) > 0 and high < LARGEST:
        high *= 2
    return float(brentq(above, 0.0, high, xtol=1e-12)) if high < LARGEST else math.inf
