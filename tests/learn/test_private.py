"""Noised steps: each sample's own gradient, clipped, among samples that are drawn as the accounting has it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_setup
from torch import nn
from torch.nn.functional import cross_entropy

from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.client import Learner, Task, samples, train
from fedprune_cli.learn.kept import Entries, Whole
from fedprune_cli.learn.parts import set_trained, split_model
from fedprune_cli.learn.private import Noised, drawn_batches, noised_mean, require_sample_gradients, sample_gradients
from fedprune_cli.learn.recurrent import Gru, Steps
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.rng import stream
from fedprune_cli.round.setup import build_learner


def learner_of(*overrides: str) -> Learner:
    setup = make_setup(*overrides)
    return build_learner(setup.experiment, setup.scenario)


def task_of(learner: Learner, mask: np.ndarray | None, phase: LocalPhase, noised: Noised | None) -> Task:
    shared, personal = (part.numpy().copy() for part in (learner.parts.shared, learner.parts.personal))
    kept = Whole() if mask is None else Entries(np.packbits(mask))
    return Task("training", 0, 0, shared, personal, kept, (phase,), noised=noised)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_sample_gradients_are_those_of_samples_one_by_one(model: str) -> None:
    learner = learner_of("model=cnn", "model.padding=2", "model.hidden=16") if model == "cnn" else learner_of()
    parts = learner.parts
    set_trained(parts, parts.all_params)
    params = dict(zip([name for name, _ in parts.names], parts.all_params, strict=True))
    x, y = samples(learner, learner.train[0][:5])
    grads, losses = sample_gradients(parts.model, params, x, y, None)
    for at in range(5):
        loss = cross_entropy(parts.model(x[at : at + 1]), y[at : at + 1])
        alone = torch.autograd.grad(loss, parts.all_params)
        assert torch.allclose(losses[at], loss, atol=1e-6)
        for together, one in zip(grads, alone, strict=True):
            assert torch.allclose(together[at], one, atol=1e-5)


def test_a_sample_moves_a_step_by_at_most_clip() -> None:
    rng = np.random.default_rng(0)
    grads = [torch.from_numpy(rng.normal(0, scale, (7, 5, 3)).astype(np.float32)) for scale in (0.01, 3.0)]
    all_in = noised_mean(grads, 1, Noised(0.5, 0.0), rng)
    for at in range(7):
        without = noised_mean([torch.cat([grad[:at], grad[at + 1 :]]) for grad in grads], 1, Noised(0.5, 0.0), rng)
        moved = torch.sqrt(sum((a - b).square().sum() for a, b in zip(all_in, without, strict=True)))
        own = torch.sqrt(sum(grad[at].square().sum() for grad in grads))
        assert moved == pytest.approx(min(0.5, float(own)), rel=1e-4)


def test_noise_is_as_wide_as_it_is_accounted_for() -> None:
    noised = noised_mean([torch.zeros(0, 400, 500)], 8, Noised(0.5, 3.0), stream(0, "privacy_noise", 0, 0, 0))[0]
    assert float(noised.std()) == pytest.approx(0.5 * 3.0 / 8, rel=0.01)
    assert abs(float(noised.mean())) < 5 * 0.5 * 3.0 / 8 / np.sqrt(200_000)


def test_samples_are_drawn_one_by_one() -> None:
    """Each with the same probability in each step, whatever the others do: the sizes spread as a binomial's."""
    batches = drawn_batches(np.random.default_rng(0), 40, LocalPhase("shared", 8 * 4000, 8))
    sizes = np.array([len(batch) for batch in batches])
    assert len(batches) == 4000
    assert sizes.mean() == pytest.approx(8, abs=0.2)
    assert sizes.var() == pytest.approx(40 * 0.2 * 0.8, rel=0.1)
    share = np.bincount(np.concatenate(batches), minlength=40) / 4000
    assert np.abs(share - 0.2).max() < 0.03


@pytest.mark.parametrize("kind", ["shared", "personal", "both"])
def test_without_noise_or_clipping_a_full_batch_is_a_plain_step(kind: str) -> None:
    learner = learner_of()
    size = len(learner.train[0])
    mask = np.random.default_rng(0).random(learner.parts.shared.numel()) < 0.6
    phase = LocalPhase(kind, 2 * size, size)  # type: ignore[arg-type]
    task = task_of(learner, mask, phase, Noised(1e9, 0.0))
    noised, plain = train(learner, task), train(learner, replace(task, noised=None))
    assert np.allclose(noised.shared, plain.shared, atol=1e-6)
    assert np.allclose(noised.personal, plain.personal, atol=1e-6)
    assert noised.train_loss == pytest.approx(plain.train_loss, rel=1e-5)


def test_both_parts_are_noised_and_what_is_dropped_stays_zero() -> None:
    learner = learner_of()
    mask = np.random.default_rng(0).random(learner.parts.shared.numel()) < 0.6
    task = task_of(learner, mask, LocalPhase("both", 8, 8), Noised(1e-9, 1e6))  # no signal
    update = train(learner, task)
    moved = update.shared - task.shared[mask]
    expected = 1e-3 / 8 * learner.training.lr
    assert moved.std() == pytest.approx(expected, rel=0.1)
    assert (update.personal - task.personal).std() == pytest.approx(1e-3 / 8 * learner.training.personal_lr, rel=0.2)
    assert not learner.parts.shared.detach().numpy()[~mask].any()
    assert np.array_equal(train(learner, task).shared, update.shared)


def test_a_model_without_gradients_of_samples_is_refused_by_name() -> None:
    model = nn.Sequential(OrderedDict(rnn=Steps(), gru=Gru(8, 4, last=True), head=nn.Linear(4, 10)))
    with pytest.raises(ConfigError, match="model=gru: not with privacy"):
        require_sample_gradients(split_model(model, "head"), (8, 1, 6), "gru")
    require_sample_gradients(learner_of().parts, (1, 8, 8), "mlp")
