"""How a model is cut, what kinds of layers its FLOPs are of, and what no model may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedprune_cli.contracts.inputs import MODEL_CASES, config_of
from fedprune_cli.contracts.test_models import parts_of
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.cost import count_cost
from fedprune_cli.learn.models import MODELS, build_model
from fedprune_cli.learn.parts import personal_blocks

each_model = pytest.mark.parametrize("name", MODEL_CASES)


def test_every_registered_model_is_among_the_cases() -> None:
    assert {name.split()[0].removeprefix("model=") for name in MODEL_CASES} == set(MODELS)


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
