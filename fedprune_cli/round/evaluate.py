"""The test of a round: each device's own model on its own test samples, and what a device gets that never trained."""

from __future__ import annotations

from collections.abc import Mapping

from fedprune_cli.execute import Executor
from fedprune_cli.learn.client import Score, Task, evaluate
from fedprune_cli.learn.kept import Whole
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.prune import Masks
from fedprune_cli.learn.schedule import by_steps
from fedprune_cli.rng import stream
from fedprune_cli.round.setup import Setup
from fedprune_cli.store.state import State

Scores = Mapping[int, Score]


def evaluate_round(setup: Setup, new: State, masks: Masks, workers: Executor) -> Scores:
    """Returns each device's score with its own model (u * m_k, v_k), in the rounds that are tested; else nothing.

    Fresh devices, which never train, fine-tune v on the unpruned u first.
    """
    scenario, evaluation = setup.scenario, setup.experiment.evaluation
    if new.round % evaluation.every and new.round != setup.experiment.rounds:
        return {}
    own = [
        Task("test", new.round, device, new.shared, new.personal[device], masks.kept_by(device), ())
        for device in tested_devices(setup)
    ]
    steps = (Phase("personal", evaluation.fresh_steps),)
    batch_size, sizes = setup.experiment.training.batch_size, scenario.partition.train.sizes.tolist()
    start, diverging = setup.initial.personal.initial, setup.experiment.faulty
    fresh = [
        Task(
            "fresh-device test",
            new.round,
            device,
            new.shared,
            start,
            Whole(),
            by_steps(steps, sizes[device], batch_size),
            may_diverge=diverging,
        )
        for device in range(scenario.num_devices, len(scenario.partition.train))
    ]
    return {score.device: score for score in workers.map(evaluate, own + fresh)}


def tested_devices(setup: Setup) -> list[int]:
    """Returns the training devices whose models are tested: all, or the same `evaluation.devices` of them throughout the run."""
    count, wanted = setup.scenario.num_devices, setup.experiment.evaluation.devices
    if wanted is None or wanted >= count:
        return list(range(count))
    chosen = stream(setup.experiment.seed, "evaluation").choice(count, wanted, replace=False)
    return sorted(chosen.tolist())
