"""A network that needs no run: raw samples in, a value for each class out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedprune_cli.errors import DataError, FedpruneError
from fedprune_cli.learn.models import MAX_PARAMS, MODELS, ModelConfig
from fedprune_cli.plugins import Parts
from fedprune_cli.store.files import Plain
from fedprune_cli.take_home.description import Input

Weights = Mapping[str, Tensor]


class Network(nn.Module):
    """Normalises raw samples [n, C, H, W] as the run did, and gives the logits [n, classes] of the model within."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, seen: Input) -> None:
        super().__init__()
        self.model = model
        self.scale = seen.scale
        self.register_buffer("mean", torch.tensor(seen.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(seen.std).view(1, -1, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the logits."""
        x = ((inputs.float() / self.scale) - self.mean) / self.std
        return cast(Tensor, self.model(x.contiguous(memory_format=torch.channels_last)))


def build_network(config: ModelConfig, classes: int, seen: Input, weights: Weights) -> Network:
    """Returns the network of a configured model with these weights, which may be those of a slice: of fewer channels.

    Raises DataError when they are not this model's.
    """
    with torch.device("meta"):
        model = nn.Sequential(config.blocks(seen.shape, classes))
    full = dict(model.named_parameters())
    if full.keys() != weights.keys() or sum(param.numel() for param in full.values()) > MAX_PARAMS:
        raise DataError("its weights are not those of its model")
    for name, param in full.items():
        value = weights[name]
        if (
            value.dtype != torch.float32
            or value.dim() != param.dim()
            or any(a > b for a, b in zip(value.shape, param.shape, strict=True))
        ):
            raise DataError(f"{name} has the shape {list(value.shape)}, the model's is at most {list(param.shape)}")
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, nn.Parameter(_laid_out(value), requires_grad=False))
    for layer in model.modules():
        _tell_size(layer)
    return Network(model, seen).eval()


def _laid_out(value: Tensor) -> Tensor:
    """Returns the tensor in the memory order in which it was trained, and PyTorch's CPU kernels are fastest."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value.contiguous()


def _tell_size(layer: nn.Module) -> None:
    """Lets a layer's own words of its size follow its weights."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            layer.groups = layer.weight.shape[0] // layer.weight.shape[1]
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = len(layer.weight)
    elif isinstance(layer, nn.RNNBase):
        layer.input_size = layer.get_parameter("weight_ih_l0").shape[1]
        layer.hidden_size = layer.get_parameter("weight_hh_l0").shape[1]
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape


def rebuild(model: Mapping[str, Plain], classes: int, seen: Input, weights: Weights) -> Network:
    """Returns the network that a description and its weights are of; raises DataError when there is none."""
    name = str(model["name"])
    models: Parts[ModelConfig] = Parts("models", MODELS, ModelConfig)
    if name not in models:
        raise DataError(
            f"its model {name!r} is none that this fedprune has: {', '.join(sorted(models))}; one of a file of yours needs --plugin FILE"
        )
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in model.items()}
    try:
        network = build_network(models[name](**fields), classes, seen, weights)
        with torch.inference_mode():
            logits = network(example(seen, 2))
    except DataError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, FedpruneError) as error:
        raise DataError(
            f"its model cannot be built ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None
    if logits.shape != (2, classes):
        raise DataError(f"its model has {logits.shape[-1]} classes, its description {classes}")
    return network


def example(seen: Input, count: int) -> Tensor:
    """Returns samples of zeros, of the form that the network takes."""
    return torch.zeros(count, *seen.shape, dtype=torch.uint8 if seen.dtype == "uint8" else torch.float32)


def as_plain(config: ModelConfig) -> dict[str, Plain]:
    """Returns a model's configuration as plain values."""
    fields = asdict(config)  # type: ignore[call-overload]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def count_flops(network: Network, seen: Input) -> int:
    """Returns the FLOPs of one sample's forward pass, matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(example(seen, 2))  # a norm of PyTorch's may refuse a single one
    return int(counter.get_total_flops()) // 2


def computing(precision: str) -> AbstractContextManager[None]:
    """Returns the context in which the run computed a forward pass."""
    return nullcontext() if precision == "float32" else torch.autocast("cpu", torch.bfloat16)
