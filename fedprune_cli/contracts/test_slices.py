"""Laws of whole channels, of models and pruners: what a slice has, what it costs, and that it computes the same."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.inputs import MODEL_CASES, config_of, model_cases, model_inputs, shape_of
from fedprune_cli.contracts.parts import configured, parts
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.cost import ModelCost, count_cost
from fedprune_cli.learn.models import build_model
from fedprune_cli.learn.parts import Parts, split_model
from fedprune_cli.learn.prune import Masks, build_masks, least_kept, shares_by_level
from fedprune_cli.learn.structured import Layout, find_channels
from fedprune_cli.store.memory import Sizes
from fedprune_cli.store.state import Array, State, untrained

each_model = pytest.mark.parametrize("name", model_cases())
CHANNEL = "pruner.granularity=channel"


def parts_of(name: str, personal: str = "head") -> Parts:
    return split_model(build_model(config_of(name), shape_of(name), 10, seed=0), personal)


@functools.cache
def layout_of(name: str, personal: str = "head") -> tuple[Layout, ModelCost]:
    parts = parts_of(name, personal)
    cost = count_cost(parts, shape_of(name))
    try:
        return find_channels(parts, cost), cost
    except ConfigError as refused:
        if name in MODEL_CASES:
            raise
        pytest.skip(f"it is for single entries only: {refused}")


def masks_of(name: str, ratios: list[float], pruner: str = "magnitude") -> Masks:
    chosen = build_experiment(configured(f"pruner={pruner}", CHANNEL)).pruner
    shared = parts_of(name).shared.numpy()
    state = State(0, shared, untrained(np.zeros(0, np.float32), 0), chosen.slots(Sizes(0, shared.size)))
    return build_masks(chosen, state, np.array(ratios), 0, layout_of(name)[0])


def sliced(parts: Parts, layout: Layout, kept: tuple[Array, ...]) -> Parts:
    """Returns the model cut to a slice, with its own vectors."""
    mask, personal_mask, shapes = layout.masks(kept)
    shared, personal = parts.shared[torch.from_numpy(mask)], parts.personal[torch.from_numpy(personal_mask)]
    parts.point(shared, personal, shapes)
    return replace(parts, shared=shared, personal=personal)


@each_model
@pytest.mark.parametrize("pruner", parts("pruners"))
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
    small = count_cost(sliced(parts_of(name), layout, kept), shape_of(name))
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
