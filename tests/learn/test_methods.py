"""The degenerate equalities of methods, against plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from conftest import make_setup, steps_of
from torch import nn
from torch.nn.functional import cross_entropy

from fedprune_cli.learn.client import Task, train
from fedprune_cli.learn.kept import Entries, Whole
from fedprune_cli.rng import stream
from fedprune_cli.round.setup import Setup, build_learner, build_parts
from fedprune_cli.serve.aggregate import Contribution, Mean


def reference_fedavg(setup: Setup, count: int) -> np.ndarray:
    """FedAvg as its authors wrote it: nn.Module, torch.optim.SGD, a weighted mean. Only the batches are shared with the code under test."""
    experiment, scenario = setup.experiment, setup.scenario
    dataset, split = scenario.dataset, scenario.partition
    images = (torch.from_numpy(dataset.inputs).float() / dataset.scale - dataset.mean[0]) / dataset.std[0]
    labels = torch.from_numpy(dataset.labels)
    model = build_parts(experiment, scenario).model
    u = torch.cat([p.detach().flatten() for p in model.parameters()])
    steps, size = experiment.training.shared_steps, experiment.training.batch_size
    for number in range(count):
        total, weight = torch.zeros(len(u), dtype=torch.float64), 0
        for device in range(scenario.num_devices):
            own = split.train[device]
            nn.utils.vector_to_parameters(u.clone(), model.parameters())
            for p in model.parameters():
                p.requires_grad_(True)
            optimizer = torch.optim.SGD(model.parameters(), lr=experiment.training.lr)
            phase = [p.kind for p in experiment.method.phases()].index("shared")
            rng = stream(experiment.seed, "batch", number, device, phase)
            order = np.concatenate([rng.permutation(len(own)) for _ in range(-(-steps * size // len(own)))])
            for step in range(steps):
                batch = own[order[step * size : (step + 1) * size]]
                optimizer.zero_grad()
                cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            total += len(own) * torch.cat([p.detach().flatten() for p in model.parameters()]).double()
            weight += len(own)
        u = (total / weight).float()
    return u.numpy()


def test_nothing_personal_and_nothing_pruned_is_fedavg_to_the_bit() -> None:
    for overrides in (
        ("method=fedavg",),
        ("method=pruned", "deadline.fraction=1.5"),
        ("method=proposed", "model.personal=none", "allocator=dense"),
    ):
        setup = make_setup(*overrides, "training.block=1")  # side by side, the last digits differ
        last = steps_of(setup, 3)[-1]
        assert last.record.max_ratio == 0
        np.testing.assert_array_equal(last.after.shared, reference_fedavg(setup, 3))


def test_one_device_is_centralised_sgd() -> None:
    setup = make_setup("method=fedavg", "devices.count=1", "partition=iid", "training.block=1")
    np.testing.assert_array_equal(steps_of(setup, 3)[-1].after.shared, reference_fedavg(setup, 3))


def test_everything_personal_is_local_training() -> None:
    """Each device's model depends on its own data alone: another device's data changes nothing."""
    few, many = (
        make_setup("method=local"),
        make_setup("method=proposed", "model.personal=all", "training.shared_steps=0"),
    )
    for a, b in zip(steps_of(few, 2), steps_of(many, 2), strict=True):
        np.testing.assert_array_equal(list(a.after.personal), list(b.after.personal))
    assert steps_of(few, 1)[0].record.bytes_up == 0


def test_fedper_is_fedsim_with_a_personal_head() -> None:
    a, b = make_setup("method=fedper"), make_setup("method=fedsim", "model.personal=head")
    np.testing.assert_array_equal(steps_of(a, 2)[-1].after.shared, steps_of(b, 2)[-1].after.shared)


def test_batched_masks_of_ones_change_no_bit() -> None:
    """A mask that keeps everything is the dense computation."""
    setup = make_setup("method=proposed")
    learner = build_learner(setup.experiment, setup.scenario)
    initial, schedule = setup.initial, setup.schedule(0)
    dense = train(learner, Task("test", 0, 0, initial.shared, initial.personal[0], Whole(), schedule))
    ones = Entries(np.packbits(np.ones(setup.blueprint.cost.shared_params, dtype=bool)))
    masked = train(learner, Task("test", 0, 0, initial.shared, initial.personal[0], ones, schedule))
    np.testing.assert_array_equal(dense.shared, masked.shared)
    np.testing.assert_array_equal(dense.personal, masked.personal)


def test_aggregation_is_a_mean_over_those_who_kept_an_entry() -> None:
    old = np.array([9, 9, 9, 9], np.float32)
    one = Contribution(np.array([1, 1, 0, 0], bool), np.array([1, 2], np.float32), 3, 0.1)
    other = Contribution(np.array([1, 0, 1, 0], bool), np.array([5, 6], np.float32), 1, 0.2)
    new, gradient = Mean().combine(old, [one, other])
    assert new.tolist() == [2, 2, 6, 9]
    assert new.dtype == np.float32
    np.testing.assert_allclose(gradient, [(3 * 8 / 0.1 + 1 * 4 / 0.2) / 4, 7 / 0.1, 3 / 0.2, 0])
    alone, _ = Mean().combine(old, [replace(one, weight=7, step_size=1)])
    np.testing.assert_array_equal(alone, [1, 2, 9, 9])
