"""Devices side by side: the loop over devices is the reference, and company changes no bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_setup, run_to_end

from fedprune_cli import run
from fedprune_cli.errors import DeviceError
from fedprune_cli.learn.batched import blocks, train_block
from fedprune_cli.learn.client import Learner, Unit, train
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.prune import build_masks

PHASES = (Phase("personal", 2), Phase("shared", 5), Phase("both", 3))
SCENE = ("devices.count=12", "model.hidden=[32,16]", "training.block=10")


def units_of(setup: run.Setup, pruned: bool) -> list[Unit]:
    """Twelve devices with different numbers of steps and, when `pruned`, different masks."""
    state = setup.initial
    ratios = np.linspace(0, 0.9, 12) * pruned
    masks = build_masks(setup.experiment.pruner, state, ratios, 0)
    return [
        Unit(
            "training", 0, device, state.shared, state.personal[device], run.kept_of(masks, device),
            tuple(Phase(phase.kind, phase.steps + device % 3) for phase in PHASES),
        )
        for device in range(12)
    ]  # fmt: skip


def learner_of(setup: run.Setup) -> Learner:
    return run.build_learner(setup.experiment, setup.scenario)


@pytest.mark.parametrize("personal", ["none", "head", "input", "all"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_block_trains_like_the_loop(personal: str, decay: float, pruned: bool) -> None:
    setup = make_setup(*SCENE, f"model.personal={personal}", f"training.weight_decay={decay}")
    learner, units = learner_of(setup), units_of(setup, pruned and personal != "all")
    alone = [train(learner, unit) for unit in units]
    together = {update.device: update for block in blocks(units, 10) for update in train_block(learner, block)}
    for one in alone:
        other = together[one.device]
        np.testing.assert_allclose(one.shared, other.shared, atol=2e-5)
        np.testing.assert_allclose(one.personal, other.personal, atol=2e-5)
        assert one.train_loss is not None
        assert np.isclose(one.train_loss, other.train_loss, atol=1e-5)


def test_a_device_does_not_depend_on_its_company() -> None:
    setup = make_setup(*SCENE)
    learner, units = learner_of(setup), units_of(setup, pruned=True)
    want = train_block(learner, [units[3]])[0]
    for company in ([units[3], units[0], units[11]], [*units[5:11], units[3]], units[:10]):
        got = next(update for update in train_block(learner, company) if update.device == 3)
        assert want.shared.tobytes() == got.shared.tobytes()
        assert want.personal.tobytes() == got.personal.tobytes()
        assert want.train_loss == got.train_loss


def test_one_by_one_and_side_by_side_agree_to_the_last_digits(tmp_path: Path) -> None:
    runs = [run_to_end(tmp_path / str(block), f"training.block={block}") for block in (1, 10)]
    for one, ten in zip(*runs, strict=True):
        assert np.isclose(one["train_loss"], ten["train_loss"], atol=1e-4)
        assert one["latency_s"] == ten["latency_s"]


def test_only_small_perceptrons_under_plain_sgd_are_batched() -> None:
    assert make_setup().batched
    for override in ("training.block=1", "training.momentum=0.9", "model.hidden=[4000]"):
        assert not make_setup(override).batched, override


def test_a_loss_that_explodes_names_its_device() -> None:
    setup = make_setup(*SCENE, "training.lr=1e30")
    with pytest.raises(DeviceError, match=r"round 1, device \d+, training, shared steps: the training loss is"):
        train_block(learner_of(setup), units_of(setup, pruned=False)[:10])
