"""What a model costs: parameters and FLOPs, counted and not typed in."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from fedprune_cli.learn.flops import FlopCounter
from fedprune_cli.learn.models import Shape
from fedprune_cli.learn.parts import Parts, one_layer, set_trained
from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class ModelCost:
    """What a model costs, counted and not typed in.

    shared_params U, personal_params V; param_flops: per training step kind (`personal`, `shared`, `both`: which part is
    updated) the FLOPs of one sample, forward and backward, that each parameter takes part in, float64 [parameters], the
    `num_shared` shared ones first. Counted are matrix products and convolutions (2 FLOPs per multiply-add); elementwise work is not.
    kinds: of each parameter's layer: `dense`, `conv`, `depthwise`, `recurrent`, or `elementwise` for what only scales, adds or looks up.
    """

    shared_params: int
    personal_params: int
    num_shared: int
    param_flops: dict[str, Array]
    kinds: tuple[str, ...]

    @property
    def flops(self) -> dict[str, tuple[float, float]]:
        """Per step kind the FLOPs of one sample in the shared and in the personalized blocks."""
        at = self.num_shared
        return {kind: (float(f[:at].sum()), float(f[at:].sum())) for kind, f in self.param_flops.items()}

    def weighted(self, scale: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Returns `flops` with each layer's FLOPs times the scale of its kind."""
        of_param = np.array([scale[kind] for kind in self.kinds])
        return replace(self, param_flops={kind: of_param * flops for kind, flops in self.param_flops.items()}).flops

    def sliced(self, kept: Array) -> ModelCost:
        """Returns the cost of a model that has the fraction `kept` [parameters] of each parameter's entries.

        Exact for whole channels: a convolution's or a matrix product's work is in proportion to its entries.
        """
        return replace(self, param_flops={kind: counts * kept for kind, counts in self.param_flops.items()})


def count_cost(parts: Parts, shape: Shape) -> ModelCost:
    """Returns the model's cost, from one real step of each kind on a single sample with PyTorch's rules for FLOPs."""
    flops = {}
    for kind in ("personal", "shared", "both"):
        trained = parts.shared_params * (kind != "personal") + parts.personal_params * (kind != "shared")
        flops[kind] = _step_flops(parts, shape, trained) if trained else np.zeros(len(parts.names))
    kinds = tuple(_kind(parts.model.get_submodule(name.rpartition(".")[0])) for name, _ in parts.names)
    return ModelCost(parts.shared.numel(), parts.personal.numel(), len(parts.shared_params), flops, kinds)


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Conv2d):
        return "depthwise" if 1 < layer.groups == layer.out_channels else "conv"
    return "dense" if isinstance(layer, nn.Linear) else "recurrent" if one_layer(layer) else "elementwise"


def _step_flops(parts: Parts, shape: Shape, trained: tuple[nn.Parameter, ...]) -> Array:
    """Returns the FLOPs of one sample's step by parameter: of layers by their rule, of what blocks do besides by PyTorch's rules."""
    set_trained(parts, trained)
    of_param: dict[str, float] = {}

    def count(name: str, layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = layer.weight
        forward = 2 * output.numel() * weight[0].numel()
        # the gradients of the weight and of the input each cost what the forward pass costs
        of_param[f"{name}.weight"] = forward * (1 + weight.requires_grad + inputs[0].requires_grad)

    def count_steps(name: str, layer: nn.RNNBase, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        steps, by_input, by_state = (
            inputs[0].shape[1],
            *(layer.get_parameter(w) for w in ("weight_ih_l0", "weight_hh_l0")),
        )
        of_param[f"{name}.weight_ih_l0"] = (
            2 * steps * by_input.numel() * (1 + by_input.requires_grad + inputs[0].requires_grad)
        )
        # the state before the first step is given, and gets no gradient
        passes = steps * (1 + by_state.requires_grad) + (steps - 1) * output[0].requires_grad
        of_param[f"{name}.weight_hh_l0"] = 2 * passes * by_state.numel()

    named = list(parts.model.named_modules())
    layers = [(name, layer) for name, layer in named if isinstance(layer, nn.Conv2d | nn.Linear)]
    recurrent = [(name, layer) for name, layer in named if one_layer(layer)]
    hooks = [layer.register_forward_hook(functools.partial(count, name)) for name, layer in layers]
    hooks += [layer.register_forward_hook(functools.partial(count_steps, name)) for name, layer in recurrent]
    # oneDNN's LSTM is one operation, of which the counter knows nothing; without it the steps are matrix products
    with (
        torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None),
        ModuleTracker() as tracker,
        FlopCounter(tracker) as counter,
    ):
        loss = nn.functional.cross_entropy(parts.model(torch.zeros(1, *shape)), torch.zeros(1, dtype=torch.long))
        torch.autograd.grad(loss, trained)
    for hook in hooks:
        hook.remove()
    of_block = {name.partition(".")[2]: count for name, count in counter.flops.items()}
    names = [name for name, _ in parts.names]
    flops = np.array([of_param.get(name, 0.0) for name in names], dtype=np.float64)
    for block, _ in parts.model.named_children():
        within = np.array([name.split(".")[0] == block for name in names])
        flops[within] += (of_block.get(block, 0) - flops[within].sum()) / max(within.sum(), 1)
    return flops
