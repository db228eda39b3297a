"""A model of my own: a perceptron whose layers all have the same width.

fedprune train --plugin FILE model=mine model.width=64
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import prod

from torch import nn

from fedprune_cli.errors import require
from fedprune_cli.learn.models import Shape


@dataclass(frozen=True)
class Mine:
    """Fully connected layers with ReLU. Its fields are its keys: `model.width=64`."""

    name: str
    personal: str = (
        "head"  # which blocks are personalized: none, all, head, input, last_<k>, or block names joined by +
    )
    width: int = 32  # of every hidden layer
    depth: int = 2  # hidden layers

    def __post_init__(self) -> None:
        require(1 <= self.width <= 10_000, "width", self.width, "in 1..10000")
        require(1 <= self.depth <= 100, "depth", self.depth, "in 1..100")

    def blocks(self, shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
        """Returns the model as named blocks in forward order; the last one is called `head`. Norms are GroupNorm, not BatchNorm."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["fc1"] = nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), self.width), nn.ReLU())
        for number in range(2, self.depth + 1):
            layers[f"fc{number}"] = nn.Sequential(nn.Linear(self.width, self.width), nn.ReLU())
        layers["head"] = nn.Linear(self.width, num_classes)
        return layers


MODELS = {"mine": Mine}
