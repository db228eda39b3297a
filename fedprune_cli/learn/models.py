"""Models as named blocks, their split into a shared and a personalized part, and their counted cost.

A model is a Sequential of blocks; whole blocks are shared (u) or personalized (v). Both parts live in one flat
float32 vector each; the parameters of the modules are views into them, so that pruning, averaging and checkpoints
are vector arithmetic and training is plain PyTorch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from fedprune_cli.errors import ConfigError, require, unknown
from fedprune_cli.rng import stream
from fedprune_cli.state import Array

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


MODELS: dict[str, type[ModelConfig]] = {"mlp": Mlp, "cnn": Cnn, "resnet18": ResNet18, "mobilenet": MobileNet}


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(seed, "init").integers(2**62)))
        model = nn.Sequential(config.blocks(shape, num_classes))
    if buffers := [name for name, _ in model.named_buffers()]:
        raise ConfigError(
            f"model {config.name!r} keeps running buffers ({buffers[0]}, ...): use GroupNorm instead of BatchNorm"
        )
    return model


def personal_blocks(blocks: Sequence[str], personal: str) -> frozenset[str]:
    """Returns the names of the personalized blocks.

    personal: `none`, `all`, `head` (the last block), `input` (the first), `last_<k>` (the k last) or block names joined by `+`.
    """
    if personal == "none":
        return frozenset()
    if personal == "all":
        return frozenset(blocks)
    if personal == "input":
        return frozenset(blocks[:1])
    if personal.startswith("last_") and personal[5:].isdigit() and 1 <= int(personal[5:]) <= len(blocks):
        return frozenset(blocks[-int(personal[5:]) :])
    chosen = personal.split("+")
    for name in chosen:
        if name not in blocks:
            allowed = ["none", "all", "head", "input", *(f"last_{k}" for k in range(1, len(blocks) + 1)), *blocks]
            raise unknown("personalized part", name, dict.fromkeys(allowed), key="personal")
    return frozenset(chosen)


@dataclass(frozen=True)
class Parts:
    """A model whose parameters are views into one flat vector for each part.

    shared [U], personal [V]: the vectors u and v; the parameters are their views, so writing a vector sets the model.
    shared_params, personal_params: those views. Entries of a convolution lie in channels-last order (out, h, w, in),
    in which PyTorch's CPU kernels are fastest.
    """

    model: nn.Sequential
    personal_blocks: frozenset[str]
    shared: Tensor
    personal: Tensor
    shared_params: tuple[nn.Parameter, ...]
    personal_params: tuple[nn.Parameter, ...]
    names: tuple[tuple[str, int], ...]  # (parameter name, entries), shared ones first

    @property
    def all_params(self) -> tuple[nn.Parameter, ...]:
        """All parameters, shared ones first."""
        return self.shared_params + self.personal_params

    def shared_views(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Returns `vector` [U] cut like `shared_params`, in the same shapes and memory order."""
        return _views(vector, [flat_shape(param) for param in self.shared_params])

    def point(self, shared: Tensor, personal: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
        """Makes the parameters views into other vectors, of other flat shapes: the same model, or a slice of it."""
        count = len(self.shared_params)
        views = _views(shared, shapes[:count]) + _views(personal, shapes[count:])
        for param, view in zip(self.all_params, views, strict=True):
            param.data = view
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.groups = module.weight.shape[0] // module.weight.shape[1]


def to_device(parts: Parts, device: str) -> Parts:
    """Returns the model with its vectors and parameters on `device`; on the one they are on already, the model itself."""
    if str(parts.shared.device) == device:
        return parts
    moved = replace(parts, shared=parts.shared.to(device), personal=parts.personal.to(device))
    moved.point(moved.shared, moved.personal, [flat_shape(param) for param in parts.all_params])
    return moved


def flat_shape(tensor: Tensor) -> tuple[int, ...]:
    """Returns the shape of a parameter in the layout of the flat vectors: (out, h, w, in) for a convolution."""
    shape = tuple(tensor.shape)
    return shape if len(shape) != 4 else (shape[0], *shape[2:], shape[1])


def _views(vector: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    views, start = [], 0
    for shape in shapes:
        piece = vector[start : start + math.prod(shape)].view(shape)
        views.append(piece.permute(0, 3, 1, 2) if len(shape) == 4 else piece)
        start += math.prod(shape)
    return tuple(views)


def split_model(model: nn.Sequential, personal: str) -> Parts:
    """Returns the model's two parts as flat vectors that share memory with its parameters."""
    chosen = personal_blocks([name for name, _ in model.named_children()], personal)
    vectors, params, names = [], [], []
    for is_personal in (False, True):
        named = [(n, p) for n, p in model.named_parameters() if (n.split(".")[0] in chosen) == is_personal]
        vector = torch.zeros(sum(p.numel() for _, p in named))
        for (_, param), view in zip(named, _views(vector, [flat_shape(p) for _, p in named]), strict=True):
            view.copy_(param.detach())
            param.data = view
        vectors.append(vector)
        params.append(tuple(p for _, p in named))
        names += [(n, p.numel()) for n, p in named]
    return Parts(model, chosen, vectors[0], vectors[1], params[0], params[1], tuple(names))


@dataclass(frozen=True)
class ModelCost:
    """What a model costs, counted and not typed in.

    shared_params U, personal_params V; param_flops: per training step kind (`personal`, `shared`, `both`: which part is
    updated) the FLOPs of one sample, forward and backward, that each parameter takes part in, float64 [parameters], the
    `num_shared` shared ones first. Counted are matrix products and convolutions (2 FLOPs a multiply-add); elementwise work is not.
    """

    shared_params: int
    personal_params: int
    num_shared: int
    param_flops: dict[str, Array]

    @property
    def flops(self) -> dict[str, tuple[float, float]]:
        """Per step kind the FLOPs of one sample in the shared and in the personalized blocks."""
        at = self.num_shared
        return {kind: (float(f[:at].sum()), float(f[at:].sum())) for kind, f in self.param_flops.items()}

    def sliced(self, kept: Array) -> ModelCost:
        """Returns the cost of a model that has the fraction `kept` [parameters] of each parameter's entries.

        Exact for whole channels: a convolution's or a matrix product's work is in proportion to its entries.
        """
        return replace(self, param_flops={kind: counts * kept for kind, counts in self.param_flops.items()})


def count_cost(parts: Parts, shape: Shape) -> ModelCost:
    """Returns the model's cost, from one real step of each kind on a single sample under PyTorch's FLOP counter."""
    flops = {}
    for kind in ("personal", "shared", "both"):
        trained = parts.shared_params * (kind != "personal") + parts.personal_params * (kind != "shared")
        flops[kind] = _step_flops(parts, shape, trained) if trained else np.zeros(len(parts.names))
    return ModelCost(parts.shared.numel(), parts.personal.numel(), len(parts.shared_params), flops)


def _conv_backward_flops(
    grad_out: Sequence[int], x: Sequence[int], weight: Sequence[int], *args: object, **_: object
) -> int:
    """Each gradient of a convolution costs what its forward pass costs; PyTorch's own formula forgets the groups."""
    transposed, output_mask = bool(args[4]), args[7]
    return conv_flop_count(list(x), list(weight), list(grad_out), transposed) * sum(output_mask[:2])  # type: ignore[index]


def _step_flops(parts: Parts, shape: Shape, trained: tuple[nn.Parameter, ...]) -> Array:
    """Returns the FLOPs of one sample's step by parameter: of layers by their rule, of what blocks do besides by PyTorch's counter."""
    set_trained(parts, trained)
    of_layer: dict[str, float] = {}

    def count(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        forward = 2 * output.numel() * weight[0].numel()
        # the gradients of the weight and of the input each cost what the forward pass costs
        of_layer[name] = forward * (1 + weight.requires_grad + inputs[0].requires_grad)

    layers = [(n, m) for n, m in parts.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(functools.partial(count, name)) for name, layer in layers]
    conv_backward = {torch.ops.aten.convolution_backward: _conv_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=conv_backward) as counter:
        loss = nn.functional.cross_entropy(parts.model(torch.zeros(1, *shape)), torch.zeros(1, dtype=torch.long))
        torch.autograd.grad(loss, trained)
    for hook in hooks:
        hook.remove()
    of_block = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    names = [name for name, _ in parts.names]
    flops = np.array([of_layer.get(name.removesuffix(".weight"), 0.0) for name in names], dtype=np.float64)
    for block, _ in parts.model.named_children():
        own = np.array([name.split(".")[0] == block for name in names])
        flops[own] += (of_block.get(block, 0) - flops[own].sum()) / max(own.sum(), 1)
    return flops


def set_trained(parts: Parts, trained: tuple[nn.Parameter, ...]) -> None:
    """Lets autograd follow only the parameters that a step updates: a frozen part then costs no backward pass."""
    for param in parts.shared_params + parts.personal_params:
        param.requires_grad_(False)
    for param in trained:
        param.requires_grad_(True)
