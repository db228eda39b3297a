"""What noise costs: against the closed form, another library's figures, and the least noise that a budget asks for."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest

from fedprune_cli.errors import ConfigError
from fedprune_cli.privacy.accounting import Budget, Release, draws_for, epsilon, noise_for, plan_budget
from fedprune_cli.privacy.settings import Privacy

SAMPLED = pytest.mark.skipif(find_spec("dp_accounting") is None, reason="needs the extra `privacy`")


def delta_of(mu: float, value: float) -> float:
    """Returns delta at epsilon of two unit Gaussians mu apart, by erfc."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return below(mu / 2 - value / mu) - math.exp(value) * below(-mu / 2 - value / mu)


@pytest.mark.parametrize(
    ("noise", "times", "delta"), [(5.0, 20, 1e-3), (1.0, 1, 1e-5), (20.0, 1000, 1e-5), (2.0, 40, 1e-3)]
)
def test_what_always_takes_part_has_the_closed_form(noise: float, times: int, delta: float) -> None:
    spent = epsilon(Release(noise, 1.0, times), delta)
    assert delta_of(math.sqrt(times) / noise, spent) == pytest.approx(delta, rel=1e-6)


@SAMPLED
@pytest.mark.slow
@pytest.mark.parametrize(("noise", "times"), [(5.0, 20), (1.0, 1)])
def test_the_closed_form_is_what_the_accountant_gives(noise: float, times: int) -> None:
    almost = 1 - 1e-12  # sampled by name, and always there
    assert epsilon(Release(noise, almost, times), 1e-3) == pytest.approx(
        epsilon(Release(noise, 1.0, times), 1e-3), rel=5e-3
    )


@SAMPLED
@pytest.mark.parametrize(
    ("rate", "noise", "times", "delta", "other"),
    [
        (0.5, 8.0, 400, 1e-3, 4.1828),
        pytest.param(0.46, 4.0, 400, 1e-3, 9.3056, marks=pytest.mark.slow),
        pytest.param(0.1, 1.0, 100, 1e-5, 7.0571, marks=pytest.mark.slow),
        pytest.param(0.01, 0.8, 1000, 1e-5, 3.1513, marks=pytest.mark.slow),
    ],
)
def test_drawn_batches_cost_what_opacus_says(rate: float, noise: float, times: int, delta: float, other: float) -> None:
    """Opacus 1.6.0, PRVAccountant: another method (Gopi et al., NeurIPS 2021) by other authors."""
    assert epsilon(Release(noise, rate, times), delta) == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize(("budget", "delta", "times"), [(3.0, 1e-3, 20), (8.0, 1e-5, 1), (0.5, 1e-6, 300)])
def test_noise_is_the_least_that_the_budget_allows(budget: float, delta: float, times: int) -> None:
    noise = noise_for(budget, delta, 1.0, times)
    assert epsilon(Release(noise, 1.0, times), delta) <= budget
    assert epsilon(Release(noise * 0.985, 1.0, times), delta) > budget


def test_draws_are_the_most_that_the_budget_allows() -> None:
    for most in (1, 7, 100):
        count = draws_for(3.0, 1e-3, Release(5.0, 1.0, 1), most)
        fits = [times for times in range(most + 1) if epsilon(Release(5.0, 1.0, times), 1e-3) <= 3.0]
        assert count == max(fits)


def test_a_budget_lasts_for_the_rounds_that_it_was_planned_for() -> None:
    private = Privacy(dp="client", epsilon=3.0, delta=1e-3, clip=1.0)
    budget = plan_budget(private, 1.0, 1, 20)
    assert budget == Budget(3.0, 1e-3, Release(4.64, 1.0, 1), 20)
    assert budget is not None
    assert 2.9 < budget.spent(20) <= 3.0 < budget.spent(21)
    assert plan_budget(Privacy(), 1.0, 1, 20) is None


def test_noise_that_affords_no_round_is_refused() -> None:
    with pytest.raises(ConfigError, match="one round spends epsilon"):
        plan_budget(Privacy(dp="client", epsilon=0.1, delta=1e-3, clip=1.0, noise=1.0), 1.0, 1, 20)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("threshold", {"threshold": 0.4}),
        ("threshold", {"threshold": 1.0}),
        ("least", {"least": 2}),
        ("spare", {"spare": -1}),
        ("bits", {"bits": 4}),
        ("max_change", {"max_change": math.inf}),
        ("dp", {"dp": "device"}),
        ("epsilon", {"dp": "client", "delta": 0.1, "clip": 1.0}),
        ("delta", {"dp": "client", "epsilon": 1.0, "delta": 0.0, "clip": 1.0}),
        ("clip", {"dp": "client", "epsilon": 1.0, "delta": 0.1, "clip": math.nan}),
        ("noise", {"noise": 0.0}),
    ],
)
def test_bad_settings_are_refused_by_name(key: str, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        Privacy(**values)  # type: ignore[arg-type]
    assert caught.value.key == key
