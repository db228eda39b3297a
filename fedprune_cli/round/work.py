"""The work of a round: masks, one task per device, what fate has in store for it, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from fedprune_cli.execute import Executor
from fedprune_cli.learn.batched import blocks, train_some
from fedprune_cli.learn.client import Task, Update
from fedprune_cli.learn.private import Noised
from fedprune_cli.learn.prune import Masks, build_masks
from fedprune_cli.round.plan import Plan
from fedprune_cli.round.protect import expected_of, sum_order
from fedprune_cli.round.roster import Roster
from fedprune_cli.round.setup import Setup
from fedprune_cli.round.summed import Summing, SumOrder, TotalOf
from fedprune_cli.serve.deliver import Expected
from fedprune_cli.store.state import Array, State
from fedprune_cli.wire.quantize import BITS_PER_PARAM
from fedprune_cli.world.faults import Fates, Moment


@dataclass(frozen=True)
class Work:
    """What the devices of a round are to do.

    masks: of every device; tasks: of those that train u [A]; personal_tasks: of the frozen; fates: what befalls the former, at this
    moment; pruning_error: ||u - u m_k||^2 of the former and then the latter, float64; expected: what their sum is made with where who
    they are is a secret; summed: the secure sum that nodes are to make, None where none is.
    """

    masks: Masks
    tasks: Sequence[Task]
    personal_tasks: Sequence[Task]
    moment: Moment
    fates: Fates
    pruning_error: Array
    expected: Expected | None = None
    summed: SumOrder | None = None


@dataclass(frozen=True)
class Results:
    """What came of it, in the order of the tasks: updates of u and v, and what the frozen made of their v alone.

    total_of: what makes the sum of updates that nodes handed in under masks, None where updates are as they are.
    """

    updates: Sequence[Update]
    personal_updates: Sequence[Update]
    total_of: TotalOf | None = None

    @property
    def all(self) -> list[Update]:
        """Of those that trained u and then of the frozen."""
        return [*self.updates, *self.personal_updates]


def assign(setup: Setup, state: State, roster: Roster, plan: Plan) -> Work:
    """Returns the round's work."""
    experiment, devices = setup.experiment, plan.devices
    masks = build_masks(experiment.pruner, state, plan.ratios, experiment.seed, setup.blueprint.layout)
    due_s = experiment.failsafe.wait_factor * plan.deadline_s if experiment.execution.by_clock else None
    moment = Moment(experiment.seed, state.round, experiment.rounds, setup.scenario.num_devices, devices)
    return Work(
        masks,
        [
            replace(training_task(setup, state, masks, *of), due_s=due_s)
            for of in zip(devices.tolist(), plan.sent_bits.tolist(), strict=True)
        ],
        personal_tasks(setup, state, masks, roster.frozen),
        moment,
        experiment.faults.draw(moment),
        masks.dropped_norms(state.shared, np.concatenate([devices, roster.frozen])),
        expected_of(setup, state, plan) if experiment.secret_draw else None,
        sum_order(setup, state.round, masks, devices.tolist()),
    )


def training_task(setup: Setup, state: State, masks: Masks, device: int, bits: int) -> Task:
    """Returns a device's training task."""
    return Task(
        "training", state.round, device, state.shared, state.personal[device], masks.kept_by(device),
        setup.schedule(device), bits, setup.experiment.faulty, noised=noised_steps(setup),
    )  # fmt: skip


def noised_steps(setup: Setup) -> Noised | None:
    """Returns how local steps are noised, None where samples are not protected one by one."""
    privacy, budget = setup.experiment.privacy, setup.budget
    if privacy.dp != "example" or budget is None or privacy.clip is None:
        return None
    return Noised(privacy.clip, budget.one.noise)


def personal_tasks(setup: Setup, state: State, masks: Masks, frozen: Array) -> list[Task]:
    """Returns the tasks of frozen devices, on what each kept of u when it last trained it."""
    return [
        replace(training_task(setup, state, masks, device, BITS_PER_PARAM), schedule=setup.personal_schedule(device))
        for device in frozen.tolist()
    ]


def train_round(setup: Setup, work: Work, workers: Executor) -> Results:
    """Returns what the devices made of their tasks; who died in mid-round keeps nothing of it."""
    total_of = cast(Summing, workers).agree(work.summed) if work.summed else None
    trained = zip(train_devices(setup, workers, work.tasks), work.tasks, work.fates.died, strict=True)
    updates = [_without_training(update, task) if died else update for update, task, died in trained]
    if setup.experiment.privacy.hides_scores:
        updates = [replace(update, train_loss=None) for update in updates]
    return Results(updates, train_devices(setup, workers, work.personal_tasks), total_of)


def train_devices(setup: Setup, workers: Executor, tasks: Sequence[Task]) -> list[Update]:
    """Returns the devices' updates in the order of the tasks: small models side by side, others and slices one by one.

    A device that diverged keeps its old personal part; that is an error except where faults may have led to it.
    """
    together = [task for task in tasks if setup.batched and task.kept.batchable]
    side_by_side = {task.device for task in together}
    work: list[Task | list[Task]] = [*blocks(together, setup.experiment.training.block)]
    work += [task for task in tasks if task.device not in side_by_side]
    done = {update.device: update for some in workers.map(train_some, work, _steps) for update in some} if work else {}
    updates = [done[task.device] for task in tasks]
    return [
        _without_training(update, task) if _diverged(update) else update
        for update, task in zip(updates, tasks, strict=True)
    ]


def _steps(work: Task | list[Task]) -> int:
    return work.steps if isinstance(work, Task) else len(work) * work[-1].steps


def _without_training(update: Update, task: Task) -> Update:
    """Returns the update of a device that keeps nothing of what it trained: its personal part is the old one."""
    return replace(update, personal=task.personal, train_loss=None, rounding_error=None)


def _diverged(update: Update) -> bool:
    return not (np.isfinite(update.personal).all() and np.isfinite(update.shared).all())
