"""Local schedules: an epoch is one pass, no batch is larger than the data, and what is trained is what is paid for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_setup, run_to_end
from hypothesis import given
from hypothesis import strategies as st

from fedprune_cli.learn.batched import train_block
from fedprune_cli.learn.client import Task, batch_positions, train
from fedprune_cli.learn.kept import Whole
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.schedule import LocalPhase, by_epochs, by_steps
from fedprune_cli.round.setup import Setup, build_learner

SIZES = st.integers(1, 300)


def positions_of(phase: LocalPhase, num_samples: int) -> list[np.ndarray]:
    """Returns the positions of each batch, as a device draws them."""
    nothing = np.zeros(0, dtype=np.float32)
    task = Task("training", 0, 0, nothing, nothing, Whole(), (phase,))
    drawn = batch_positions(0, task, 0, num_samples, phase.samples)
    return np.split(drawn, np.cumsum(phase.sizes)[:-1])


def tasks_of(setup: Setup) -> list[Task]:
    state = setup.initial
    return [
        Task("training", 0, device, state.shared, state.personal[device], Whole(), setup.schedule(device))
        for device in range(setup.scenario.num_devices)
    ]


@given(num_samples=SIZES, batch_size=SIZES, passes=st.integers(1, 4))
def test_in_an_epoch_every_sample_is_used_once(num_samples: int, batch_size: int, passes: int) -> None:
    (phase,) = by_epochs([Phase("shared", 7)], passes, num_samples, batch_size)
    batches = positions_of(phase, num_samples)
    assert len(batches) == phase.steps == passes * -(-num_samples // batch_size)
    each = len(batches) // passes
    for at in range(passes):
        own = batches[at * each : (at + 1) * each]
        assert sorted(np.concatenate(own).tolist()) == list(range(num_samples))
        assert all(len(batch) == min(batch_size, num_samples) for batch in own[:-1])  # only the last one is short


@given(num_samples=SIZES, batch_size=SIZES, epochs=st.floats(0.01, 5))
def test_a_part_of_an_epoch_is_that_part_of_the_samples(num_samples: int, batch_size: int, epochs: float) -> None:
    (phase,) = by_epochs([Phase("both", 0)], epochs, num_samples, batch_size)
    assert epochs * num_samples - 1e-6 <= phase.samples < epochs * num_samples + 1
    assert sum(phase.sizes) == phase.samples
    assert len(phase.sizes) == phase.steps
    assert max(phase.sizes) <= min(batch_size, num_samples)
    assert min(phase.sizes) >= 1


@given(num_samples=SIZES, batch_size=SIZES, steps=st.integers(0, 50))
def test_with_steps_a_batch_is_never_larger_than_the_data(num_samples: int, batch_size: int, steps: int) -> None:
    (phase,) = by_steps([Phase("personal", steps)], num_samples, batch_size)
    assert phase.steps == steps
    assert phase.sizes == [min(batch_size, num_samples)] * steps
    if num_samples <= batch_size and steps:
        for batch in positions_of(phase, num_samples):
            assert sorted(batch.tolist()) == list(range(num_samples))


@pytest.mark.parametrize("batch_size", [5, 32, 512, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 8))])
def test_blocks_train_like_the_loop_whatever_is_left_of_a_batch(batch_size: int) -> None:
    setup = make_setup("devices.count=6", "training.block=10", f"training.batch_size={batch_size}", "training.epochs=2")
    learner, tasks = build_learner(setup.experiment, setup.scenario), tasks_of(setup)
    together = {update.device: update for update in train_block(learner, tasks)}
    for task in tasks:
        alone, other = train(learner, task), together[task.device]
        np.testing.assert_allclose(alone.shared, other.shared, atol=5e-5)
        np.testing.assert_allclose(alone.personal, other.personal, atol=5e-5)
        assert alone.train_loss is not None
        assert np.isclose(alone.train_loss, other.train_loss, atol=2e-5)


def test_a_device_s_short_batch_does_not_depend_on_its_company() -> None:
    torch.set_num_threads(1)  # as every executor does: with two, sums depend on the place in the block
    setup = make_setup("devices.count=6", "training.block=10", "training.batch_size=64", "training.epochs=1.5")
    learner, tasks = build_learner(setup.experiment, setup.scenario), tasks_of(setup)
    want = train_block(learner, [tasks[2]])[0]
    got = next(update for update in train_block(learner, tasks[::-1]) if update.device == 2)
    assert want.shared.tobytes() == got.shared.tobytes()
    assert want.train_loss == got.train_loss


@pytest.mark.parametrize(
    "extra",
    [
        (),
        *(
            pytest.param(of, marks=pytest.mark.slow)
            for of in (("training.block=1",), ("pruner.granularity=channel",), ("method=fedsim",))
        ),
    ],
    ids=str,
)
def test_an_epoch_costs_the_same_whatever_the_batch(tmp_path: Path, extra: tuple[str, ...]) -> None:
    """FLOPs, joules and seconds count samples; a device pays for one pass and no more."""
    fixed = ("training.epochs=1", "rounds=1", "allocator=fixed", "allocator.ratio=0", *extra)
    sizes = (1, 32, 512)
    lines = [run_to_end(tmp_path / str(size), *fixed, f"training.batch_size={size}")[0] for size in sizes]
    for key in ("flops", "joules", "latency_s"):
        values = [line[key] for line in lines]
        assert values == pytest.approx([values[0]] * 3, rel=1e-12), key
    setup = make_setup(*fixed)
    per_sample = sum(sum(setup.blueprint.cost.flops[phase.kind]) for phase in setup.schedule(0))
    trained = setup.scenario.partition.train.sizes[: setup.scenario.num_devices].sum()
    assert lines[0]["flops"] == pytest.approx(per_sample * trained)
