"""The measures by hand, and attacks on gradients that are known to the last digit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.privacy import leak_attacks as attacks
from fedprune_cli.privacy.leak_attacks import FirstLayer
from fedprune_cli.privacy.leak_matching import Dummies, Steps, matched
from fedprune_cli.privacy.leak_metrics import MAX_DB, auc, best_match, jaccard, psnr_db, ssim
from fedprune_cli.rng import stream

RNG = stream(0, "leak_samples", 0)


def mse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array(np.square(a - b).mean())


# --- measures -------------------------------------------------------------------------------------------------------


def test_psnr_by_hand() -> None:
    a = RNG.random((1, 8, 8))
    assert psnr_db(mse(a, a), 1.0) == MAX_DB
    assert psnr_db(mse(a, a + 0.1), 1.0) == pytest.approx(20.0)
    assert psnr_db(mse(a, a + 25.5), 255.0) == pytest.approx(20.0)


def test_ssim_by_hand_and_by_its_window() -> None:
    a, b = RNG.random((2, 1, 9, 9))
    assert ssim(a, a, 1.0) == pytest.approx(1.0)
    assert ssim(a, b, 1.0) == pytest.approx(ssim(b, a, 1.0))
    assert ssim(a, b, 1.0) == pytest.approx(ssim(5 * a, 5 * b, 5.0))
    x, y = np.full((1, 8, 8), 0.2), np.full((1, 8, 8), 0.6)  # flat: what is left is the luminance's term
    assert ssim(x, y, 1.0) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4))
    c, d = RNG.random((2, 1, 5, 5))  # smaller than the window: one window of all pixels
    cov = np.cov(c.ravel(), d.ravel(), bias=True)
    m, n = c.mean(), d.mean()
    by_hand = (2 * m * n + 1e-4) * (2 * cov[0, 1] + 9e-4) / ((m**2 + n**2 + 1e-4) * (cov[0, 0] + cov[1, 1] + 9e-4))
    assert ssim(c, d, 1.0) == pytest.approx(by_hand)
    assert ssim(a, 1 - a, 1.0) < 0 < ssim(a, a + 0.01 * b, 1.0)


def test_jaccard_counts_repeated_labels() -> None:
    assert jaccard([1, 1, 2], [1, 1, 2]) == 1
    assert jaccard([1, 1, 2], [3]) == 0
    assert jaccard([1, 1], [1]) == 0.5


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_auc_is_the_share_of_pairs(members: list[int], others: list[int]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    assert auc(np.array(members), np.array(others)) == pytest.approx(np.mean(pairs))


def test_the_match_gives_no_guess_twice_and_each_its_own() -> None:
    originals = RNG.random((4, 1, 3, 3))
    order = np.array([2, 0, 3, 1])
    chosen, errors = best_match(originals, originals[order])
    assert np.array_equal(order[chosen], np.arange(4))
    assert errors.max() == 0
    twice = np.concatenate([originals[:1], originals[:1] + 0.1, originals[:1] + 0.5])
    assert len({*best_match(np.repeat(originals[:1], 2, 0), twice)[0].tolist()}) == 2
    assert best_match(originals, originals[:1])[0].tolist() == [0, 0, 0, 0]  # fewer guesses than originals


# --- analytic inversion ---------------------------------------------------------------------------------------------


def layer(x: np.ndarray, g: np.ndarray, kept: float = 1.0) -> FirstLayer:
    """Returns the gradient of a layer that saw samples [n, inputs] with errors [n, units], a share of it kept."""
    weight, bias = g.T @ x, g.sum(0)
    rng = stream(1, "leak_samples", int(1000 * kept))
    known, bias_known = rng.random(weight.shape) < kept, rng.random(len(bias)) < kept
    return FirstLayer(weight * known, bias * bias_known, known, bias_known)


FILL = np.full(30, 7.0)


def test_a_lone_sample_is_read_whatever_its_errors() -> None:
    x, g = RNG.normal(size=(1, 30)), RNG.normal(size=(1, 20)) * (RNG.random((1, 20)) < 0.6)
    for attack in (attacks.strongest, attacks.completed):
        assert attack(layer(x, g), FILL) == pytest.approx(x)
    found = attacks.quotients(layer(x, g), FILL)
    assert len(found) == np.count_nonzero(g)
    assert found == pytest.approx(np.repeat(x, len(found), 0))


def test_the_strongest_unit_that_knows_an_input_tells_it() -> None:
    x, g = RNG.normal(size=(1, 30)), RNG.normal(size=(1, 20)) * (np.arange(20) % 3 > 0)
    pruned = layer(x, g, kept=0.5)
    biased = FirstLayer(pruned.weight, g[0], pruned.weight_known, np.ones(20, dtype=bool))
    told = (biased.weight_known & (g[0] != 0)[:, None]).any(0)
    assert told.sum() > 25
    assert attacks.strongest(biased, FILL)[0] == pytest.approx(np.where(told, x[0], FILL))


def test_completion_reads_what_quotients_cannot() -> None:
    """With 0.8 of a layer pruned every input is in some unit's row, and hardly any row is whole."""
    x, g = RNG.normal(size=(1, 30)), RNG.normal(size=(1, 60))
    pruned = layer(x, g, kept=0.2)
    assert attacks.completed(pruned, FILL) == pytest.approx(x)
    assert not np.allclose(attacks.strongest(pruned, FILL), x)


def test_what_no_kept_entry_tells_is_filled() -> None:
    x, g = RNG.normal(size=(1, 30)), RNG.normal(size=(1, 20))
    seen = layer(x, g)
    seen.weight[:, 3], seen.weight_known[:, 3] = 0, False
    for attack in (attacks.strongest, attacks.completed, attacks.quotients):
        found = attack(seen, FILL)
        assert np.all(found[:, 3] == 7.0)
        assert np.delete(found, 3, 1) == pytest.approx(np.delete(np.repeat(x, len(found), 0), 3, 1))
    blind = FirstLayer(seen.weight * 0, seen.bias * 0, seen.weight_known & False, seen.bias_known & False)
    assert not len(attacks.quotients(blind, FILL))
    assert attacks.strongest(blind, FILL).tolist() == attacks.completed(blind, FILL).tolist() == [FILL.tolist()]


def test_without_any_bias_the_sample_is_known_up_to_its_size_and_nothing_is_claimed() -> None:
    seen = layer(RNG.normal(size=(1, 30)), RNG.normal(size=(1, 20)))
    none = FirstLayer(seen.weight, seen.bias * 0, seen.weight_known, seen.bias_known & False)
    assert attacks.completed(none, FILL).tolist() == [FILL.tolist()]


def test_of_a_sum_only_units_active_for_one_sample_tell_it() -> None:
    x = RNG.normal(size=(3, 30))
    apart = np.zeros((3, 9))
    apart[np.arange(9) % 3, np.arange(9)] = RNG.normal(size=9)
    assert best_match(x, attacks.quotients(layer(x, apart), FILL))[1].max() < 1e-20
    together = RNG.normal(size=(3, 9)) + 3
    assert best_match(x, attacks.quotients(layer(x, together), FILL))[1].min() > 0.05


def test_units_that_agree_tell_each_other_what_was_dropped() -> None:
    x = RNG.normal(size=(3, 30))
    apart = np.zeros((3, 60))
    apart[np.arange(60) % 3, np.arange(60)] = RNG.normal(size=60)
    pruned = layer(x, apart, kept=0.6)
    assert best_match(x, attacks.quotients(pruned, FILL))[1].max() < 1e-20
    alone = [np.square(attacks.quotients(FirstLayer(*(part[at : at + 1] for part in (
        pruned.weight, pruned.bias, pruned.weight_known, pruned.bias_known))), FILL) - x[at % 3]).mean() for at in range(60)
        if pruned.bias_known[at]]  # fmt: skip
    assert min(alone) > 1


# --- labels ---------------------------------------------------------------------------------------------------------


def head_bias(labels: list[int], classes: int) -> np.ndarray:
    """Returns the gradient of the head's bias of a model that knows nothing yet."""
    return np.full(classes, 1 / classes) - np.bincount(labels, minlength=classes) / len(labels)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_labels_are_read_from_a_head_that_knows_nothing(labels: list[int]) -> None:
    bias = head_bias(labels, 10)
    if len(labels) < 10:  # one of n samples weighs more than the mean softmax
        assert attacks.signed_labels(bias).tolist() == sorted({*labels})
    counted = attacks.counted_labels(bias, len(labels))
    assert len(counted) == len(labels)
    if len({*labels}) == 1:
        assert counted.tolist() == labels


# --- gradient matching ----------------------------------------------------------------------------------------------


def steps_of(x: torch.Tensor, labels: torch.Tensor, kept: float = 1.0, steps: int = 1) -> Steps:
    """Returns what is seen of steps that a small smooth network took on samples."""
    rng = stream(2, "leak_samples", 0)
    shapes, lr = ((12, 16), (12,), (4, 12)), 0.1
    shared = tuple(torch.from_numpy(rng.normal(0, 0.5, shape).astype(np.float32)) for shape in shapes)
    keep = tuple(torch.from_numpy((rng.random(shape) < kept).astype(np.float32)) for shape in shapes)

    def logits(u: tuple[torch.Tensor, ...], v: tuple[torch.Tensor, ...], of: torch.Tensor) -> torch.Tensor:
        return torch.tanh(of.flatten(1) @ u[0].T + u[1]) @ u[2].T

    now = [value.clone() for value in shared]
    for _ in range(steps):
        now = [value.detach().requires_grad_(True) for value in now]
        loss = torch.nn.functional.cross_entropy(logits(tuple(now), (), x), labels)
        now = [w - lr * k * g for w, k, g in zip(now, keep, torch.autograd.grad(loss, now), strict=True)]
    gradient = tuple((a - b.detach()) / (lr * steps) for a, b in zip(shared, now, strict=True))
    return Steps(logits, shared, (), keep, gradient, lr, steps)


@pytest.mark.parametrize("steps", [1, 3])
def test_matching_finds_a_sample_and_does_not_without_its_gradient(steps: int) -> None:
    torch.set_num_threads(1)
    x, label = torch.from_numpy(RNG.random((1, 1, 4, 4)).astype(np.float32)), torch.tensor([2])
    begin = Dummies(torch.zeros(1, 1, 4, 4), label, 4, lambda shown: shown, 200)
    seen = steps_of(x, label, steps=steps)
    found, again = matched(seen, begin), matched(seen, begin)
    assert np.array_equal(found, again)
    error = np.square(found - x.numpy()).mean()
    masked = steps_of(x, label, kept=0.0, steps=steps)
    assert error < 2e-3 < np.square(matched(masked, begin) - x.numpy()).mean()
    nothing = Dummies(begin.pixels, label, 4, begin.to_input, 0)
    assert matched(seen, nothing).tolist() == np.full((1, 1, 4, 4), 0.5).tolist()
