"""Whole channels in training and in runs: what a slice learns, and what cannot be sliced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_experiment, make_setup, run_to_end
from torch import nn

from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.client import Task, train
from fedprune_cli.learn.cost import ModelCost
from fedprune_cli.learn.kept import Channels, Entries, Whole
from fedprune_cli.learn.parts import split_model
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.prune import PRUNERS, build_masks
from fedprune_cli.learn.schedule import by_steps
from fedprune_cli.learn.structured import find_channels
from fedprune_cli.round.setup import build_learner, prepare

CHANNEL = "pruner.granularity=channel"


def test_training_a_slice_is_training_with_dropped_channels_frozen_at_zero() -> None:
    """The same steps on the same batches, by the masked model of weight granularity: an independent reference."""
    setup = make_setup(CHANNEL)
    learner = build_learner(setup.experiment, setup.scenario)
    assert setup.blueprint.layout.slices
    state = setup.initial
    masks = build_masks(setup.experiment.pruner, state, np.full(4, 0.6), 0, setup.blueprint.layout)
    phases = by_steps((Phase("personal", 2), Phase("shared", 5), Phase("both", 2)), 100, 8)
    small, masked = (
        train(learner, Task("training", 0, 1, state.shared, state.personal[1], kept, phases))
        for kept in (Channels(masks.kept_units(1)), Entries(np.packbits(masks[1])))
    )
    np.testing.assert_allclose(small.shared, masked.shared, atol=1e-5)
    np.testing.assert_allclose(small.personal, masked.personal, atol=1e-5)
    _, personal_mask, _ = setup.blueprint.layout.masks(masks.kept_units(1))
    assert (small.personal[~personal_mask] == state.personal[1][~personal_mask]).all()
    dense = Task("training", 0, 1, state.shared, state.personal[1], Whole(), phases)
    after = train(learner, dense)  # a slice leaves nothing behind
    fresh = train(build_learner(setup.experiment, setup.scenario), dense)
    np.testing.assert_array_equal(after.shared, fresh.shared)


def test_nothing_dropped_is_the_dense_run_to_the_bit(tmp_path: Path) -> None:
    runs = [
        run_to_end(tmp_path / g, "allocator=fixed", "allocator.ratio=0", f"pruner.granularity={g}")
        for g in ("weight", "channel")
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_run_of_slices_keeps_its_deadline_and_is_the_same_from_every_executor(pruner: str, tmp_path: Path) -> None:
    overrides = (CHANNEL, f"pruner={pruner}", "allocator.on_infeasible=stretch")
    records = run_to_end(tmp_path / "serial", *overrides)
    if pruner == "taylor":  # two worker processes take ten seconds to start
        run_to_end(tmp_path / "processes", *overrides, "execution.kind=processes", "execution.workers=2")
        for name in ("state.safetensors", "rounds.jsonl"):
            assert (tmp_path / "serial" / name).read_bytes() == (tmp_path / "processes" / name).read_bytes()
    for record in records:
        assert max(record["devices"]["prune_ratio"]) > 0.2
        assert record["latency_s"] <= record["deadline_s"] * (1 + 1e-9)
        assert record["flops"] > 0
    weight = run_to_end(tmp_path / "weight", f"pruner={pruner}")
    assert records[0]["bytes_up"] <= weight[0]["bytes_up"]
    assert records[0]["flops"] <= weight[0]["flops"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pruner.granularity=filter",), "pruner.granularity=filter: must be 'weight' or 'channel'"),
        (
            (CHANNEL, "model.hidden=[]", "model.personal=none", "method=pruned"),
            "granularity=channel with model=mlp: the shared part has no channels",
        ),
    ],
)
def test_what_cannot_be_sliced_is_refused_in_one_line(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        prepare(make_experiment(*overrides))


def test_an_unknown_layer_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x], 1)

    def refuse(layer: nn.Module, message: str) -> None:
        model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(8, 2))
        parts = split_model(model, "none")
        cost = ModelCost(parts.shared.numel(), 0, 4, {}, ())
        with pytest.raises(ConfigError, match=message):
            find_channels(parts, cost)

    refuse(Odd(), "cat is not known")
    refuse(nn.GLU(), r"layer 1 \(GLU\) is not known")


def test_methods_that_never_prune_need_no_channels() -> None:
    assert not make_setup(CHANNEL, "method=personalized").blueprint.layout.slices
    assert make_setup(CHANNEL).blueprint.layout.slices


@pytest.mark.parametrize("bits", [8, 16])
def test_what_is_left_of_whole_channels_is_rounded_too(tmp_path: Path, bits: int) -> None:
    words = (CHANNEL, "allocator=fixed", "allocator.ratio=0.5", "rounds=2")
    plain, rounded = (run_to_end(tmp_path / word, *words, f"payload.bits=[{word}]") for word in ("32", str(bits)))
    assert plain[0]["max_ratio"] > 0.3
    assert 0 < rounded[0]["rounding_error"] < (1e-6 if bits == 16 else 1)
    assert [len(one["devices"]["id"]) for one in rounded] == [len(one["devices"]["id"]) for one in plain]
    assert rounded[0]["bytes_up"] < plain[0]["bytes_up"]
