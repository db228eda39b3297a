"""Laws of models: their two parts, their counted cost, and their first parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from fedprune_cli.contracts.inputs import config_of, model_cases, model_inputs, shape_of
from fedprune_cli.learn.cost import count_cost
from fedprune_cli.learn.flops import RULES, FlopCounter
from fedprune_cli.learn.models import build_model
from fedprune_cli.learn.parts import Parts, split_model

each_model = pytest.mark.parametrize("name", model_cases())


CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward


def raw_rule(*args: object, **words: object) -> int:
    """As ours, and FlopCounterMode leaves the tensors to it, as it does for what has this mark."""
    return int(RULES[CONVOLUTION_BACKWARD](*args, **words))


raw_rule._get_raw = True  # type: ignore[attr-defined]


def parts_of(name: str, personal: str) -> Parts:
    return split_model(build_model(config_of(name), shape_of(name), 10, seed=0), personal)


@each_model
def test_the_parts_are_a_disjoint_cover_and_views_of_the_model(name: str) -> None:
    whole = sum(p.numel() for p in build_model(config_of(name), shape_of(name), 10, seed=0).parameters())
    for personal in ("none", "head", "input", "last_2", "all"):
        parts = parts_of(name, personal)
        assert parts.shared.numel() + parts.personal.numel() == whole
        for vector, params in ((parts.shared, parts.shared_params), (parts.personal, parts.personal_params)):
            vector.copy_(torch.arange(vector.numel()))
            entries = torch.cat([p.detach().flatten() for p in params]) if params else torch.zeros(0)
            assert torch.equal(entries.sort().values, torch.arange(vector.numel(), dtype=torch.float32))


@each_model
def test_splitting_changes_no_output_bit(name: str) -> None:
    x = model_inputs(name, 2)
    outputs = [parts_of(name, personal).model(x) for personal in ("none", "head", "all")]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert outputs[0].shape == (2, 10)


@each_model
def test_costs_add_up_over_every_split(name: str) -> None:
    whole = count_cost(parts_of(name, "none"), shape_of(name))
    assert whole.flops["personal"] == (0, 0)
    for personal in ("head", "input", "all"):
        cost = count_cost(parts_of(name, personal), shape_of(name))
        assert sum(cost.flops["both"]) == sum(whole.flops["shared"])
        assert cost.shared_params + cost.personal_params == whole.shared_params
        if personal == "head":  # its backward pass stops at the features; the frozen base runs forward only
            assert cost.flops["personal"][0] <= cost.flops["both"][0] / 2


@each_model
def test_the_flops_of_a_step_are_those_of_three_forward_passes_less_gradients_that_nobody_needs(name: str) -> None:
    parts = parts_of(name, "none")
    flops, unneeded = 0, 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal flops, unneeded
        weight: torch.Tensor = getattr(module, "weight", torch.zeros(0))
        of_state, steps = 0, 0
        if isinstance(module, torch.nn.Conv2d):
            here = 2 * output.numel() * weight[0].numel()
        elif isinstance(module, torch.nn.Linear):
            here = 2 * output.numel() * inputs[0].shape[1]
        elif isinstance(module, torch.nn.GRU):
            _, steps, fan_in = inputs[0].shape
            here = 2 * steps * fan_in * 3 * module.hidden_size
            of_state = (
                2 * module.hidden_size * 3 * module.hidden_size
            )  # in each step; the state before the first gets no gradient
        else:
            return
        unneeded += of_state + (here if flops == 0 and "embedding" not in name else 0)
        flops += here + steps * of_state

    for module in parts.model.modules():
        module.register_forward_hook(count)
    parts.model(torch.zeros(1, *shape_of(name)))
    assert count_cost(parts_of(name, "none"), shape_of(name)).flops["shared"][0] == 3 * flops - unneeded


@each_model
def test_products_are_counted_as_pytorch_counts_them(name: str) -> None:
    """Its own formula forgets the groups of a convolution, and that is corrected for it too."""
    parts, x = parts_of(name, "none"), model_inputs(name, 1)
    with ModuleTracker() as tracker, FlopCounter(tracker) as ours:
        parts.model(x).sum().backward()
    with FlopCounterMode(display=False, custom_mapping={CONVOLUTION_BACKWARD: raw_rule}) as theirs:
        parts.model(x).sum().backward()
    assert ours.flops == {name: sum(of.values()) for name, of in theirs.get_flop_counts().items() if of}


@each_model
def test_the_seed_alone_decides_the_initial_model(name: str) -> None:
    vectors = []
    for seed in (0, 0, 1):
        torch.rand(3)
        vectors.append(split_model(build_model(config_of(name), shape_of(name), 10, seed), "none").shared.numpy())
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert (vectors[0] != vectors[2]).any()
