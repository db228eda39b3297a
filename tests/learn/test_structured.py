"""Laws of whole channels, over every registered model: what a slice has, what it costs, and that it computes the same."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL_CASES, make_experiment, make_setup, model_inputs, run_to_end
from torch import nn

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.client import Task, train
from fedprune_cli.learn.cost import ModelCost, count_cost
from fedprune_cli.learn.kept import Channels, Entries, Whole
from fedprune_cli.learn.models import build_model
from fedprune_cli.learn.parts import Parts, split_model
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.prune import PRUNERS, Masks, build_masks, least_kept, shares_by_level
from fedprune_cli.learn.schedule import by_steps
from fedprune_cli.learn.structured import Layout, find_channels
from fedprune_cli.round.setup import build_learner, prepare
from fedprune_cli.store.memory import Sizes
from fedprune_cli.store.state import State, untrained

each_model = pytest.mark.parametrize("name", MODEL_CASES)
CHANNEL = "pruner.granularity=channel"


def parts_of(name: str, personal: str = "head") -> Parts:
    config = build_experiment(compose_config([*name.split()])).model
    return split_model(build_model(config, MODEL_CASES[name], 10, seed=0), personal)


@functools.cache
def layout_of(name: str, personal: str = "head") -> tuple[Layout, ModelCost]:
    parts = parts_of(name, personal)
    cost = count_cost(parts, MODEL_CASES[name])
    return find_channels(parts, cost), cost


def masks_of(name: str, ratios: list[float], pruner: str = "magnitude") -> Masks:
    chosen = build_experiment(compose_config([f"pruner={pruner}", CHANNEL])).pruner
    shared = parts_of(name).shared.numpy()
    state = State(0, shared, untrained(np.zeros(0, np.float32), 0), chosen.slots(Sizes(0, shared.size)))
    return build_masks(chosen, state, np.array(ratios), 0, layout_of(name)[0])


def sliced(parts: Parts, layout: Layout, kept: tuple[np.ndarray, ...]) -> Parts:
    """Returns the model cut to a slice, with its own vectors."""
    mask, personal_mask, shapes = layout.masks(kept)
    shared, personal = parts.shared[torch.from_numpy(mask)], parts.personal[torch.from_numpy(personal_mask)]
    parts.point(shared, personal, shapes)
    return replace(parts, shared=shared, personal=personal)


@each_model
@pytest.mark.parametrize("pruner", PRUNERS)
def test_slices_are_nested_and_the_largest_within_their_share(name: str, pruner: str) -> None:
    ratios = [0.0, 0.1, 0.37, 0.5, 0.75, 0.9]
    layout, _ = layout_of(name)
    masks = masks_of(name, ratios, pruner)
    level = masks.rank
    entries = np.cumsum(np.bincount(level)) / len(level)
    costs = [entries, *shares_by_level(layout, level)]
    for device, ratio in enumerate(ratios):
        cutoff = masks.kept[device]
        assert masks[device].sum() <= round((1 - ratio) * len(level))
        assert all(share[cutoff - 1] <= (1 - ratio) * (1 + 1e-9) for share in costs)
        assert cutoff == len(entries) or any(share[cutoff] > (1 - ratio) * (1 - 1e-9) for share in costs)
        flags, _, _ = layout.masks(masks.kept_units(device))
        np.testing.assert_array_equal(flags, masks[device])  # units and entries say the same
        if device:
            assert (masks[device] <= masks[device - 1]).all()
    assert masks[0].all()


@each_model
def test_the_channels_are_thinned_in_step_and_none_is_lost(name: str) -> None:
    layout, _ = layout_of(name)
    masks = masks_of(name, [0.5, 1.0])
    left = [float(kept.mean()) for kept in masks.kept_units(0)]
    steps = [1 / group.units for group in layout.groups]
    assert max(left) - min(left) <= max(steps) + 1e-9
    assert [int(kept.sum()) for kept in masks.kept_units(1)] == [1] * len(layout.groups)
    assert 0 < least_kept(layout) < 0.1


@each_model
def test_the_flops_of_a_slice_are_those_counted_on_the_smaller_model(name: str) -> None:
    layout, cost = layout_of(name)
    kept = masks_of(name, [0.6]).kept_units(0)
    small = count_cost(sliced(parts_of(name), layout, kept), MODEL_CASES[name])
    predicted = cost.sliced(layout.kept_params(kept))
    for kind, counted in small.flops.items():
        np.testing.assert_allclose(predicted.flops[kind], counted, rtol=1e-12)
    assert small.shared_params == masks_of(name, [0.6])[0].sum()


@each_model
def test_a_slice_computes_what_zeroed_channels_do(name: str) -> None:
    """Exactly so without norms; a GroupNorm takes its statistics over what is left, so only the shapes are asked for there."""
    layout, _ = layout_of(name)
    masks = masks_of(name, [0.5])
    x = model_inputs(name, 4)
    whole = parts_of(name)
    small = sliced(parts_of(name), layout, masks.kept_units(0))
    normed = any(isinstance(module, nn.GroupNorm) for module in whole.model.modules())
    with torch.no_grad():
        whole.shared.mul_(torch.from_numpy(masks[0]))
        expected, got = whole.model(x), small.model(x)
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    if not normed:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


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
