"""Models as named blocks, their split into a shared and a personalized part, and their counted cost.

A model is a Sequential of blocks; whole blocks are shared (u) or personalized (v). Both parts live in one flat
float32 vector each; the parameters of the modules are views into them, so that pruning, averaging and checkpoints
are vector arithmetic and training is plain PyTorch.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from fedprune_cli.errors import ConfigError, require
from fedprune_cli.learn import recurrent
from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array

Shape = tuple[int, int, int]  # channels, height, width
MAX_WIDTH = 100_000  # of a layer, and channels
MAX_PARAMS = 10**9


class ModelConfig(Protocol):
    """A model plug-in: a frozen dataclass whose fields are its configuration."""

    @property
    def name(self) -> str: ...

    @property
    def personal(self) -> str: ...

    def blocks(self, shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
        """Returns the model as named blocks in forward order; the last one is called `head`."""


@dataclass(frozen=True)
class Mlp:
    """Fully connected layers with ReLU. `hidden` lists their widths."""

    name: str
    personal: str
    hidden: tuple[int, ...]

    def __post_init__(self) -> None:
        widths = len(self.hidden) <= 100 and all(0 < width <= MAX_WIDTH for width in self.hidden)
        require(widths, "hidden", list(self.hidden), f"a list of at most 100 widths in 1..{MAX_WIDTH}")

    def blocks(self, shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
        widths = [int(np.prod(shape)), *self.hidden]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), start=1):
            first = [nn.Flatten()] if i == 1 else []
            layers[f"fc{i}"] = nn.Sequential(*first, nn.Linear(fan_in, fan_out), nn.ReLU())
        layers["head"] = (
            nn.Linear(widths[-1], num_classes)
            if self.hidden
            else nn.Sequential(nn.Flatten(), nn.Linear(widths[0], num_classes))
        )
        return layers


@dataclass(frozen=True)
class Cnn:
    """The LEAF benchmark's CNN: two 5x5 convolutions, each with 2x2 max pooling, and one hidden layer.

    ReLU stands after the pooling: the same function (both are monotone) for a quarter of the work.
    """

    name: str
    personal: str
    channels: tuple[int, ...]
    hidden: int
    padding: int

    def __post_init__(self) -> None:
        widths = len(self.channels) == 2 and all(0 < width <= MAX_WIDTH for width in self.channels)
        require(widths, "channels", list(self.channels), f"two widths in 1..{MAX_WIDTH}")
        require(0 < self.hidden <= MAX_WIDTH, "hidden", self.hidden, f"in 1..{MAX_WIDTH}")
        require(0 <= self.padding <= 2, "padding", self.padding, "0, 1 or 2")

    def blocks(self, shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
        first, second = self.channels
        height, width = ((((side + 2 * self.padding - 4) // 2) + 2 * self.padding - 4) // 2 for side in shape[1:])
        if min(height, width) < 1:
            raise ConfigError(
                f"images of {shape[1]}x{shape[2]} pixels are too small for two 5x5 convolutions "
                f"with padding {self.padding}: allowed is padding=2 or model=mlp", key="padding",
            )  # fmt: skip
        conv = functools.partial(nn.Conv2d, kernel_size=5, padding=self.padding)
        return OrderedDict(
            conv1=nn.Sequential(conv(shape[0], first), nn.MaxPool2d(2), nn.ReLU()),
            conv2=nn.Sequential(conv(first, second), nn.MaxPool2d(2), nn.ReLU()),
            fc1=nn.Sequential(nn.Flatten(), nn.Linear(second * height * width, self.hidden), nn.ReLU()),
            head=nn.Linear(self.hidden, num_classes),
        )


def _group_norm(groups: int, channels: int) -> nn.Module:
    return nn.GroupNorm(groups if channels % groups == 0 else 1, channels)


@dataclass(frozen=True)
class ResNet18:
    """torchvision's ResNet-18 for 32x32 images: a 3x3 stem without pooling, GroupNorm instead of BatchNorm."""

    name: str
    personal: str
    groups: int

    def __post_init__(self) -> None:
        require(0 < self.groups <= MAX_WIDTH, "groups", self.groups, f"in 1..{MAX_WIDTH}")

    def blocks(self, shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
        from torchvision.models.resnet import BasicBlock, ResNet

        net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes, norm_layer=functools.partial(_group_norm, self.groups))
        stem = nn.Conv2d(shape[0], 64, kernel_size=3, padding=1, bias=False)
        layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(stem, net.bn1, nn.ReLU()))
        layers |= {name: getattr(net, name) for name in ("layer1", "layer2", "layer3", "layer4")}
        layers["head"] = nn.Sequential(net.avgpool, nn.Flatten(), net.fc)
        return layers


@dataclass(frozen=True)
class MobileNet:
    """A small MobileNetV2 (torchvision's inverted residuals, GroupNorm, no dropout) for 28x28 to 64x64 images."""

    name: str
    personal: str
    width: float
    groups: int

    def __post_init__(self) -> None:
        require(0 < self.width <= 4, "width", self.width, "in (0, 4]")
        require(0 < self.groups <= MAX_WIDTH, "groups", self.groups, f"in 1..{MAX_WIDTH}")

    def blocks(self, shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
        from torchvision.models import MobileNetV2

        # expansion, channels, repeats, stride: a third of MobileNetV2's depth and an eighth of its stride
        setting = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 40, 2, 2], [4, 80, 1, 2]]
        norm = functools.partial(_group_norm, self.groups)
        net = MobileNetV2(num_classes, self.width, setting, norm_layer=norm, dropout=0.0)
        old = net.features[0][0]
        net.features[0][0] = nn.Conv2d(shape[0], old.out_channels, 3, stride=1, padding=1, bias=False)
        layers: OrderedDict[str, nn.Module] = OrderedDict((f"block{i}", layer) for i, layer in enumerate(net.features))
        layers["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.classifier[1])
        return layers


def _require_sequences(shape: Shape, name: str) -> None:
    if shape[1] != 1:
        raise ConfigError(
            f"inputs of shape {list(shape)} are not sequences: model={name} takes windows [axes, 1, length] or texts [1, 1, length]; "
            "for images take model=mlp, cnn, mobilenet or resnet18"
        )


@dataclass(frozen=True)
class Cnn1d:
    """A CNN over windows of time series: convolutions along the time, each with max pooling of two steps, and one hidden layer.

    Windows are images of height 1, so that everything that holds of the CNN holds here. ReLU stands after the pooling, as there.
    """

    name: str
    personal: str
    channels: tuple[int, ...]
    kernel: int
    hidden: int

    def __post_init__(self) -> None:
        widths = 1 <= len(self.channels) <= 8 and all(0 < width <= MAX_WIDTH for width in self.channels)
        require(widths, "channels", list(self.channels), f"a list of 1 to 8 widths in 1..{MAX_WIDTH}")
        require(1 <= self.kernel <= 99 and self.kernel % 2 == 1, "kernel", self.kernel, "odd, in 1..99")
        require(0 < self.hidden <= MAX_WIDTH, "hidden", self.hidden, f"in 1..{MAX_WIDTH}")

    def blocks(self, shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
        _require_sequences(shape, self.name)
        depth, least = len(self.channels), 2 ** len(self.channels)
        if shape[2] < least:
            most = shape[2].bit_length() - 1
            less = f"model.channels of at most {most} widths" if most else "model=mlp"
            raise ConfigError(
                f"windows of {shape[2]} steps are too short to halve {depth} times: allowed are at least {least} steps, or {less}"
            )
        conv = functools.partial(nn.Conv2d, kernel_size=(1, self.kernel), padding=(0, self.kernel // 2))
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise((shape[0], *self.channels)), start=1):
            layers[f"conv{i}"] = nn.Sequential(conv(fan_in, fan_out), nn.MaxPool2d((1, 2)), nn.ReLU())
        features = self.channels[-1] * (shape[2] // least)
        layers["fc1"] = nn.Sequential(nn.Flatten(), nn.Linear(features, self.hidden), nn.ReLU())
        layers["head"] = nn.Linear(self.hidden, num_classes)
        return layers


@dataclass(frozen=True)
class Gru:
    """One or two GRU layers over windows of time series, or over the embedded tokens of texts; the head reads the last step's state.

    vocabulary: how many tokens there are, None for as many as classes: the label is the next token.
    """

    name: str
    personal: str
    hidden: tuple[int, ...]
    embedding: int | None
    vocabulary: int | None

    def __post_init__(self) -> None:
        widths = 1 <= len(self.hidden) <= 2 and all(0 < width <= MAX_WIDTH for width in self.hidden)
        require(widths, "hidden", list(self.hidden), f"one or two widths in 1..{MAX_WIDTH}")
        for key, value in (("embedding", self.embedding), ("vocabulary", self.vocabulary)):
            require(value is None or 0 < value <= MAX_WIDTH, key, value, f"in 1..{MAX_WIDTH} or null")
        alone = self.vocabulary is not None and self.embedding is None
        require(not alone, "vocabulary", self.vocabulary, "null without model.embedding, which tokens need")

    def blocks(self, shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
        _require_sequences(shape, self.name)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if self.embedding is None:
            widths, first = (shape[0], *self.hidden), [recurrent.Steps()]
        elif shape[0] == 1:
            widths, first = (self.embedding, *self.hidden), []
            tokens = nn.Embedding(self.vocabulary or num_classes, self.embedding)
            layers["embed"] = nn.Sequential(recurrent.Tokens(), tokens)
        else:
            raise ConfigError(f"windows of {shape[0]} axes are not tokens: allowed is model.embedding=null")
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), start=1):
            layer = recurrent.Gru(fan_in, fan_out, last=i == len(self.hidden))
            layers[f"rnn{i}"] = nn.Sequential(*(first if i == 1 else ()), layer)
        layers["head"] = nn.Linear(self.hidden[-1], num_classes)
        return layers


MODELS: dict[str, type[ModelConfig]] = {
    "mlp": Mlp,
    "cnn": Cnn,
    "resnet18": ResNet18,
    "mobilenet": MobileNet,
    "cnn1d": Cnn1d,
    "gru": Gru,
}


# PyTorch's layers draw from one generator, also those of several nodes in one process
_one_at_a_time = threading.Lock()


def build_model(config: ModelConfig, shape: Shape, num_classes: int, seed: int) -> nn.Sequential:
    """Returns the model with PyTorch's default initialization drawn from stream (seed, "init").

    Raises ConfigError for one too large, and for a model with running buffers (BatchNorm): they are neither shared nor personal.
    """
    with torch.device("meta"):  # counted before any memory is taken
        size = sum(
            param.numel() for block in config.blocks(shape, num_classes).values() for param in block.parameters()
        )
    if size > MAX_PARAMS:
        raise ConfigError(f"model {config.name!r} would have {size} parameters: must be at most {MAX_PARAMS}")
    with _one_at_a_time, torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(seed, "init").integers(2**62)))
        model = nn.Sequential(config.blocks(shape, num_classes))
    if buffers := [name for name, _ in model.named_buffers()]:
        raise ConfigError(
            f"model {config.name!r} keeps running buffers ({buffers[0]}, ...): use GroupNorm instead of BatchNorm"
        )
    return model


def require_tokens(model: nn.Module, inputs: Array, as_they_are: bool) -> None:
    """Raises ConfigError when a model that looks tokens up gets others than it knows, or numbers that are none.

    inputs: uint8 or float32 [N, C, H, W]; as_they_are: whether the model sees them without normalisation.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if not (as_they_are and np.issubdtype(inputs.dtype, np.integer)):
                raise ConfigError(
                    f"model.embedding={module.embedding_dim} is for tokens, and these inputs are numbers: allowed is null"
                )
            largest, known = int(inputs.max(initial=0)), module.num_embeddings
            if largest >= known:
                raise ConfigError(
                    f"the model knows {known} tokens, 0 to {known - 1}, and the data has token {largest}: "
                    f"allowed is model.vocabulary={largest + 1} or more"
                )
