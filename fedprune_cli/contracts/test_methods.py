"""Laws of methods: a device's work learns, and moves only what it should."""

from __future__ import annotations

import numpy as np

from fedprune_cli.contracts.parts import each, make_setup, steps_of
from fedprune_cli.learn.client import Task, train
from fedprune_cli.learn.kept import Entries
from fedprune_cli.round.setup import build_learner

each_method = each("methods")


@each_method
def test_training_learns_and_only_moves_what_it_should(name: str) -> None:
    setup = make_setup(
        f"method={name}",
        "rounds=5",
        "training.shared_steps=20",
        "training.personal_steps=20",
        "training.lr=0.1",
        "training.personal_lr=0.1",
    )
    assert setup.blueprint.cost.shared_params + setup.blueprint.cost.personal_params == 64 * 16 + 16 + 16 * 10 + 10
    first, *_, last = steps_of(setup, 5)
    assert float(last.record.train_loss or 0) < float(first.record.train_loss or 0), (
        "five rounds of training do not lower the loss"
    )
    assert float(last.record.accuracy or 0) > float(first.record.accuracy or 0), "five rounds of training teach nothing"
    for state in (first.after, last.after):
        assert np.isfinite(state.shared).all()
        assert np.isfinite(np.stack(list(state.personal))).all()
    if setup.blueprint.cost.shared_params == 0:
        assert last.record.bytes_up == 0
        assert last.record.simulated_s > 0
    else:
        assert (first.after.shared != setup.initial.shared).any()
        assert last.record.bytes_up > 0


@each_method
def test_a_dropped_entry_never_moves_on_the_device_that_dropped_it(name: str) -> None:
    setup = make_setup(f"method={name}", "training.momentum=0.9", "training.weight_decay=0.1")
    learner = build_learner(setup.experiment, setup.scenario)
    mask = np.arange(setup.blueprint.cost.shared_params) % 3 == 0
    kept, initial = Entries(np.packbits(mask)), setup.initial
    update = train(learner, Task("test", 0, 1, initial.shared, initial.personal[1], kept, setup.schedule(1)))
    whole = learner.parts.shared.numpy()
    assert (whole[~mask] == 0).all()
    np.testing.assert_array_equal(update.shared, whole[mask])
