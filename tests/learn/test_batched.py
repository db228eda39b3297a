"""Devices side by side: the loop over devices is the reference, and company changes no bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_setup, run_to_end

from fedprune_cli.errors import ConfigError, DeviceError
from fedprune_cli.learn.batched import blocks, train_block
from fedprune_cli.learn.client import Learner, Task, train
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.prune import build_masks
from fedprune_cli.learn.schedule import by_steps
from fedprune_cli.round.setup import Setup, build_learner

PHASES = (Phase("personal", 2), Phase("shared", 5), Phase("both", 3))
SCENE = ("devices.count=12", "model.hidden=[32,16]", "training.block=10")


def tasks_of(setup: Setup, pruned: bool) -> list[Task]:
    """Twelve devices with different numbers of steps and, when `pruned`, different masks."""
    state = setup.initial
    ratios = np.linspace(0, 0.9, 12) * pruned
    masks = build_masks(setup.experiment.pruner, state, ratios, 0, setup.blueprint.layout)
    return [
        Task(
            "training", 0, device, state.shared, state.personal[device], masks.kept_by(device),
            by_steps([Phase(phase.kind, phase.steps + device % 3) for phase in PHASES], 100, 8),
        )
        for device in range(12)
    ]  # fmt: skip


def learner_of(setup: Setup) -> Learner:
    return build_learner(setup.experiment, setup.scenario)


@pytest.mark.parametrize(
    ("personal", "decay", "pruned"),
    [  # by default each with both decays, and each decay with and without masks
        pytest.param(personal, decay, pruned, marks=[pytest.mark.slow] * ((decay > 0) != (pruned ^ (at % 2 == 1))))
        for at, personal in enumerate(("none", "head", "input", "all"))
        for decay in (0.0, 0.01)
        for pruned in (False, True)
    ],
)
def test_a_block_trains_like_the_loop(personal: str, decay: float, pruned: bool) -> None:
    setup = make_setup(*SCENE, f"model.personal={personal}", f"training.weight_decay={decay}")
    learner, tasks = learner_of(setup), tasks_of(setup, pruned and personal != "all")
    alone = [train(learner, task) for task in tasks]
    together = {update.device: update for block in blocks(tasks, 10) for update in train_block(learner, block)}
    for one in alone:
        other = together[one.device]
        np.testing.assert_allclose(one.shared, other.shared, atol=2e-5)
        np.testing.assert_allclose(one.personal, other.personal, atol=2e-5)
        assert one.train_loss is not None
        assert np.isclose(one.train_loss, other.train_loss, atol=1e-5)


def test_a_device_does_not_depend_on_its_company() -> None:
    setup = make_setup(*SCENE)
    learner, tasks = learner_of(setup), tasks_of(setup, pruned=True)
    want = train_block(learner, [tasks[3]])[0]
    for company in ([tasks[3], tasks[0], tasks[11]], [*tasks[5:11], tasks[3]], tasks[:10]):
        got = next(update for update in train_block(learner, company) if update.device == 3)
        assert want.shared.tobytes() == got.shared.tobytes()
        assert want.personal.tobytes() == got.personal.tobytes()
        assert want.train_loss == got.train_loss


@pytest.mark.parametrize("hidden", ["[10]", "[13]", "[30,7]", "[64]"])
@pytest.mark.parametrize("batch", [8, 10])
def test_a_device_does_not_depend_on_its_place(hidden: str, batch: int) -> None:
    """Whatever the widths: products depend on whether a matrix begins at a multiple of 16 bytes, and rows of odd ones would not."""
    setup = make_setup(*SCENE, f"model.hidden={hidden}", f"training.batch_size={batch}")
    learner, tasks = learner_of(setup), tasks_of(setup, pruned=True)
    found = set()
    for place in range(10):
        company = [*tasks[:place], tasks[11], *tasks[place:9]]
        found.add(next(one for one in train_block(learner, company) if one.device == 11).shared.tobytes())
    assert len(found) == 1


def test_one_by_one_and_side_by_side_agree_to_the_last_digits(tmp_path: Path) -> None:
    runs = [run_to_end(tmp_path / str(block), f"training.block={block}") for block in (1, 10)]
    for one, ten in zip(*runs, strict=True):
        assert np.isclose(one["train_loss"], ten["train_loss"], atol=1e-4)
        assert one["latency_s"] == ten["latency_s"]


def test_only_small_perceptrons_under_plain_sgd_are_batched() -> None:
    assert make_setup().batched
    for override in ("training.block=1", "training.momentum=0.9", "training.precision=bfloat16", "model.hidden=[4000]"):
        assert not make_setup(override).batched, override


def test_half_precision_trains_about_the_same_model(tmp_path: Path) -> None:
    full, half = (run_to_end(tmp_path / p, f"training.precision={p}", "rounds=4") for p in ("float32", "bfloat16"))
    assert full[-1]["train_loss"] != half[-1]["train_loss"]
    assert np.isclose(full[-1]["train_loss"], half[-1]["train_loss"], rtol=0.02)
    assert [r["latency_s"] for r in full] == [r["latency_s"] for r in half]  # the modelled devices are the same


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_trains_about_the_same_model(tmp_path: Path) -> None:
    cpu, gpu = (
        run_to_end(tmp_path / d, f"training.device={d}", "training.block=1", "rounds=4") for d in ("cpu", "cuda")
    )
    assert np.isclose(cpu[-1]["train_loss"], gpu[-1]["train_loss"], rtol=1e-3)
    sliced = run_to_end(tmp_path / "sliced", "training.device=cuda", "pruner.granularity=channel")
    assert sliced[-1]["train_loss"] < 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.device=cuda: must be .cpu.: PyTorch finds no CUDA device"):
        make_setup("training.device=cuda")


def test_a_loss_that_explodes_names_its_device() -> None:
    setup = make_setup(*SCENE, "training.lr=1e30")
    with pytest.raises(DeviceError, match=r"round 1, device \d+, training, shared steps: the training loss is"):
        train_block(learner_of(setup), tasks_of(setup, pruned=False)[:10])
