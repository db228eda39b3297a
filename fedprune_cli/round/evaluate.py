"""The test of a round: each device's own model on its own test samples, and what a device gets that never trained."""

from __future__ import annotations

from collections.abc import Mapping

from fedprune_cli.execute import Executor
from fedprune_cli.learn.client import Score, Task, evaluate
from fedprune_cli.learn.kept import Whole
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.prune import Masks
from fedprune_cli.learn.schedule import LocalPhase, by_steps
from fedprune_cli.rng import stream
from fedprune_cli.round.setup import Setup
from fedprune_cli.store.state import State

Scores = Mapping[int, Score]


def evaluate_round(setup: Setup, new: State, masks: Masks, workers: Executor) -> Scores:
    """Returns each device's score with its own model (u * m_k, v_k), in the rounds that are tested; else nothing.

    Fresh devices, which never train, fine-tune v on the unpruned u first.
    """
    if new.round % setup.experiment.evaluation.every and new.round != setup.experiment.rounds:
        return {}
    own = [own_test(new, masks, device) for device in tested_devices(setup)]
    fresh = range(setup.scenario.num_devices, len(setup.scenario.partition.train))
    tasks = own + [fresh_test(setup, new, device) for device in fresh]
    return {score.device: score for score in workers.map(evaluate, tasks)}


def own_test(new: State, masks: Masks, device: int) -> Task:
    """Returns the test of a training device's own model (u * m_k, v_k)."""
    return Task("test", new.round, device, new.shared, new.personal[device], masks.kept_by(device), ())


def fresh_test(setup: Setup, new: State, device: int) -> Task:
    """Returns the test of a device that never trained: it fine-tunes v on the unpruned u first."""
    samples = len(setup.scenario.partition.train[device])
    return Task(
        "fresh-device test", new.round, device, new.shared, setup.initial.personal.initial, Whole(),
        fresh_schedule(setup, samples), may_diverge=setup.experiment.faulty,
    )  # fmt: skip


def fresh_schedule(setup: Setup, samples: int) -> tuple[LocalPhase, ...]:
    """Returns the steps on v that a newcomer with so many training samples takes."""
    steps = (Phase("personal", setup.experiment.evaluation.fresh_steps),)
    return by_steps(steps, samples, setup.experiment.training.batch_size)


def tested_devices(setup: Setup) -> list[int]:
    """Returns the training devices whose models are tested: all, or the same `evaluation.devices` of them throughout the run."""
    count, wanted = setup.scenario.num_devices, setup.experiment.evaluation.devices
    if wanted is None or wanted >= count:
        return list(range(count))
    chosen = stream(setup.experiment.seed, "evaluation").choice(count, wanted, replace=False)
    return sorted(chosen.tolist())
