"""Laws over every registered model."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import MODEL_CASES, model_inputs

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.cost import count_cost
from fedprune_cli.learn.models import MODELS, ModelConfig, build_model
from fedprune_cli.learn.parts import Parts, personal_blocks, split_model

each_model = pytest.mark.parametrize("name", MODEL_CASES)


@functools.cache
def config_of(name: str) -> ModelConfig:
    return build_experiment(compose_config([*name.split()])).model


def parts_of(name: str, personal: str) -> Parts:
    return split_model(build_model(config_of(name), MODEL_CASES[name], 10, seed=0), personal)


def test_every_registered_model_is_among_the_cases() -> None:
    assert {name.split()[0].removeprefix("model=") for name in MODEL_CASES} == set(MODELS)


@each_model
def test_the_parts_are_a_disjoint_cover_and_views_of_the_model(name: str) -> None:
    whole = sum(p.numel() for p in build_model(config_of(name), MODEL_CASES[name], 10, seed=0).parameters())
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
    whole = count_cost(parts_of(name, "none"), MODEL_CASES[name])
    assert whole.flops["personal"] == (0, 0)
    for personal in ("head", "input", "all"):
        cost = count_cost(parts_of(name, personal), MODEL_CASES[name])
        assert sum(cost.flops["both"]) == sum(whole.flops["shared"])
        assert cost.shared_params + cost.personal_params == whole.shared_params
        if personal == "head":  # its backward pass stops at the features; the frozen base runs forward only
            assert cost.flops["personal"][0] <= cost.flops["both"][0] / 2


@each_model
def test_all_flops_are_those_of_layers_of_a_known_kind(name: str) -> None:
    parts = parts_of(name, "head")
    cost = count_cost(parts, MODEL_CASES[name])
    kinds = np.array(cost.kinds)
    assert [kind for kind, (at, _) in zip(cost.kinds, parts.names, strict=True) if at.startswith("head")] == [
        "dense"
    ] * 2
    assert cost.param_flops["both"][kinds == "elementwise"].sum() == 0
    own = {
        "cnn": {"conv"},
        "resnet18": {"conv"},
        "mobilenet": {"conv", "depthwise"},
        "cnn1d": {"conv"},
        "gru": {"recurrent"},
    }
    counted = {"dense"} | own.get(name.split()[0].removeprefix("model="), set())
    assert set(kinds) - {"elementwise"} == counted
    assert all(cost.param_flops["both"][kinds == kind].sum() > 0 for kind in counted)


@each_model
def test_the_flops_of_a_step_are_those_of_three_forward_passes_less_gradients_that_nobody_needs(name: str) -> None:
    parts = parts_of(name, "none")
    flops, unneeded = 0, 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal flops, unneeded
        weight, of_state, steps = getattr(module, "weight", None), 0, 0
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
    parts.model(torch.zeros(1, *MODEL_CASES[name]))
    assert count_cost(parts_of(name, "none"), MODEL_CASES[name]).flops["shared"][0] == 3 * flops - unneeded


@each_model
def test_the_seed_alone_decides_the_initial_model(name: str) -> None:
    vectors = []
    for seed in (0, 0, 1):
        torch.rand(3)
        vectors.append(split_model(build_model(config_of(name), MODEL_CASES[name], 10, seed), "none").shared.numpy())
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert (vectors[0] != vectors[2]).any()


def test_a_model_is_cut_by_name_or_depth() -> None:
    blocks = ["conv1", "conv2", "fc1", "head"]
    assert personal_blocks(blocks, "last_2") == {"fc1", "head"}
    assert personal_blocks(blocks, "input") == {"conv1"}
    assert personal_blocks(blocks, "conv1+head") == {"conv1", "head"}
    assert personal_blocks(blocks, "all") == set(blocks)
    for wrong in ("last_0", "last_5", "haed", "conv1+", ""):
        with pytest.raises(ConfigError, match="unknown personalized part"):
            personal_blocks(blocks, wrong)


def test_the_cnn_refuses_images_that_are_too_small() -> None:
    with pytest.raises(ConfigError, match="8x8 pixels are too small"):
        build_model(config_of("model=cnn"), (1, 8, 8), 10, seed=0)


def test_running_buffers_are_refused_by_name() -> None:
    from collections import OrderedDict
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Normed:
        name: str = "normed"
        personal: str = "head"

        def blocks(self, shape: tuple[int, int, int], num_classes: int) -> OrderedDict[str, torch.nn.Module]:
            return OrderedDict(norm=torch.nn.BatchNorm2d(shape[0]), head=torch.nn.Flatten())

    with pytest.raises(ConfigError, match=r"norm\.running_mean"):
        build_model(Normed(), (1, 8, 8), 10, seed=0)
