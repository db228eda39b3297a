"""Epsilon from below: an attack tells runs with a canary from runs without it, and never better than is claimed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make_setup
from scipy.stats import beta

from fedprune_cli.learn.private import Noised, noised_mean
from fedprune_cli.privacy.accounting import Release, epsilon
from fedprune_cli.rng import stream
from fedprune_cli.round import protect
from fedprune_cli.round.protect import Ranked

TRIALS, SURE, DELTA = 4000, 1e-3, 1e-3
CLIENT = (
    "devices.count=8", "model.hidden=[24]", "privacy.dp=client", "privacy.epsilon=2", "privacy.delta=1e-3", "privacy.clip=0.5",
    "privacy.public_scores=true", "weights=uniform", "rounds=1",
)  # fmt: skip


def least_epsilon(without: np.ndarray, canary: np.ndarray) -> float:
    """Returns what epsilon is at least, surely but for SURE, from an attack's scores of two neighbours.

    The threshold is chosen on the first half of the scores and judged on the second: e^epsilon >= (TPR - delta) / FPR, by the limits
    of Clopper and Pearson.
    """
    half = len(without) // 2
    cuts = np.quantile(without[:half], np.linspace(0.5, 0.995, 60))

    def bound(cut: float, part: slice) -> float:
        hits, false, count = (canary[part] > cut).sum(), (without[part] > cut).sum(), half
        least = beta.ppf(SURE / 2, hits, count - hits + 1) if hits else 0.0
        most = beta.ppf(1 - SURE / 2, false + 1, count - false)
        return math.log((least - DELTA) / most) if least > DELTA else 0.0

    best = max(cuts, key=lambda cut: bound(cut, slice(0, half)))
    return bound(best, slice(half, None))


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True])
def test_a_device_is_told_apart_no_better_than_claimed(*, secure: bool) -> None:
    """A canary's whole change is in a direction of its own, as long as clip, and nobody else's is in it."""
    setup = make_setup(*CLIENT, f"privacy.secure={str(secure).lower()}")
    assert setup.budget is not None
    size, canary = 8, np.eye(8)[0] * 0.5
    scores = {}
    for name, own in (("without", np.zeros(size)), ("canary", 100 * canary)):
        changes = {device: protect.clipped(own if device == 0 else np.zeros(size), 0.5) for device in range(8)}
        ranked, found = Ranked(np.arange(size), range(8), [size] * 8, changes), []
        for trial in range(TRIALS):
            number = 2 * trial + (name == "canary")
            if secure:
                point = protect.fixed_point(setup, range(8))
                parts = protect._whole(setup, number, ranked, point)
                found.append(
                    sum(parts[device][0] for device in list(parts)[:6]) * point.step
                )  # two are gone: as many as may be
            else:
                found.append(protect._noised_total(setup, number, ranked)[0])
        scores[name] = np.array(found)
    below, claimed = least_epsilon(scores["without"], scores["canary"]), setup.budget.spent(1)
    print(f"secure={secure}: epsilon is at least {below:.2f}, claimed {claimed:.2f}")
    assert 0.25 * claimed < below <= claimed


@pytest.mark.slow
def test_a_sample_is_told_apart_no_better_than_claimed() -> None:
    """Of ten steps in each of which it takes part; its gradient is in a direction of its own, and far longer than clip."""
    noised, steps, scores = Noised(0.5, 6.0), 10, {}
    for number, name in enumerate(("without", "canary")):
        own = [torch.zeros(1, 4)] if name == "without" else [torch.eye(4)[:1] * 1e3]
        rng = stream(0, "privacy_noise", number)
        scores[name] = np.array(
            [sum(float(noised_mean(own, 1, noised, rng)[0][0]) for _ in range(steps)) for _ in range(TRIALS)]
        )
    below, claimed = least_epsilon(scores["without"], scores["canary"]), epsilon(Release(6.0, 1.0, steps), DELTA)
    print(f"epsilon is at least {below:.2f}, claimed {claimed:.2f}")
    assert 0.25 * claimed < below <= claimed


def test_too_little_noise_is_found() -> None:
    """The attack is worth something: at half the noise that is claimed it sees through."""
    rng, claimed = np.random.default_rng(0), epsilon(Release(2.0, 1.0, 1), DELTA)
    without, canary = rng.normal(0, 0.6, 20_000), rng.normal(1, 0.6, 20_000)
    assert least_epsilon(without, canary) > claimed
