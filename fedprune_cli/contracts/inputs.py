"""What models are tried on: the cases of those built in, each with the shape of its inputs, and inputs that one from outside may take."""

from __future__ import annotations

import functools

import pytest
import torch

from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.parts import configured, names
from fedprune_cli.learn.models import MODELS, ModelConfig, Shape, build_model

MODEL_CASES: dict[str, Shape] = {
    "model=mlp": (1, 8, 8),
    "model=cnn": (1, 28, 28),
    "model=resnet18": (3, 32, 32),
    "model=mobilenet": (3, 32, 32),
    "model=cnn1d": (6, 1, 21),
    "model=gru": (6, 1, 12),
    "model=gru model.hidden=[24,16] model.embedding=8 model.vocabulary=30": (1, 1, 9),
}
LARGE = ("model=resnet18",)  # takes as long as all the others together
CANDIDATES: tuple[Shape, ...] = ((1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 1, 1), (6, 1, 21), (1, 1, 64))


def model_cases() -> list[object]:
    """Returns the cases for `parametrize`: those built in, or the models asked about with their defaults."""
    outside = [name for name in names("models") if name not in MODELS]
    if outside:
        return [pytest.param(f"model={name}", marks=pytest.mark.foreign) for name in outside]
    return [pytest.param(case, marks=pytest.mark.slow) if case in LARGE else case for case in MODEL_CASES]


@functools.cache
def config_of(case: str) -> ModelConfig:
    """Returns the model of a case."""
    return build_experiment(configured(*case.split())).model


@functools.cache
def shape_of(case: str) -> Shape:
    """Returns the shape of a case's inputs: of a model from outside the first candidate that it takes."""
    refused = ""
    for shape in (MODEL_CASES[case],) if case in MODEL_CASES else CANDIDATES:
        try:
            build_model(config_of(case), shape, 10, seed=0)(torch.zeros(1, *shape))
        except Exception as error:
            refused = str(error)
        else:
            return shape
    pytest.fail(f"it takes inputs of none of the shapes {CANDIDATES}: {refused}", pytrace=False)


def model_inputs(case: str, count: int) -> torch.Tensor:
    """Returns random inputs of a case, [count, C, H, W]."""
    generator, shape = torch.Generator().manual_seed(0), (count, *shape_of(case))
    tokens = "embedding" in case
    return torch.randint(30, shape, generator=generator).float() if tokens else torch.randn(shape, generator=generator)
