"""A model's shared and personalized part: two flat float32 vectors of which the parameters are views.

So pruning, averaging and checkpoints are vector arithmetic, and training is plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fedprune_cli.errors import unknown


def personal_blocks(blocks: Sequence[str], personal: str) -> frozenset[str]:
    """Returns the names of the personalized blocks.

    personal: `none`, `all`, `head` (the last block), `input` (the first), `last_<k>` (the k last) or block names joined by `+`.

    >>> sorted(personal_blocks(["conv1", "conv2", "head"], "last_2"))
    ['conv2', 'head']
    >>> sorted(personal_blocks(["conv1", "conv2", "head"], "conv1+head"))
    ['conv1', 'head']
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
    shapes: tuple[tuple[int, ...], ...]  # of the parameters in the layout of the vectors, shared ones first

    @property
    def all_params(self) -> tuple[nn.Parameter, ...]:
        """All parameters, shared ones first."""
        return self.shared_params + self.personal_params

    def shared_views(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Returns `vector` [U] cut like `shared_params`, in the same shapes and memory order."""
        return _views(vector, self.shapes[: len(self.shared_params)])

    def make_whole(self) -> None:
        """Makes the parameters views into u and v again: the last device may have left a slice of the model behind."""
        self.point(self.shared, self.personal, self.shapes)

    def point(self, shared: Tensor, personal: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
        """Makes the parameters views into other vectors, of other flat shapes: the same model, or a slice of it."""
        count = len(self.shared_params)
        views = _views(shared, shapes[:count]) + _views(personal, shapes[count:])
        for param, view in zip(self.all_params, views, strict=True):
            param.data = view
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.groups = module.weight.shape[0] // module.weight.shape[1]
            elif one_layer(module):
                module.input_size = module.get_parameter("weight_ih_l0").shape[1]
                module.hidden_size = module.get_parameter("weight_hh_l0").shape[1]


def one_layer(module: nn.Module) -> TypeGuard[nn.RNNBase]:
    """Whether it is a recurrent layer of the plain kind: one layer, one direction, no projection."""
    if not isinstance(module, nn.RNNBase):
        return False
    return module.num_layers == 1 and not module.bidirectional and module.proj_size == 0


def to_device(parts: Parts, device: str) -> Parts:
    """Returns the model with its vectors and parameters on `device`; on the one they are on already, the model itself."""
    if str(parts.shared.device) == device:
        return parts
    moved = replace(parts, shared=parts.shared.to(device), personal=parts.personal.to(device))
    moved.make_whole()
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
    vectors, params, names, shapes = [], [], [], []
    for is_personal in (False, True):
        named = [(n, p) for n, p in model.named_parameters() if (n.split(".")[0] in chosen) == is_personal]
        vector = torch.zeros(sum(p.numel() for _, p in named))
        flat = [flat_shape(param) for _, param in named]
        for (_, param), view in zip(named, _views(vector, flat), strict=True):
            view.copy_(param.detach())
            param.data = view
        vectors.append(vector)
        params.append(tuple(p for _, p in named))
        names += [(n, p.numel()) for n, p in named]
        shapes += flat
    return Parts(model, chosen, vectors[0], vectors[1], params[0], params[1], tuple(names), tuple(shapes))


def set_trained(parts: Parts, trained: tuple[nn.Parameter, ...]) -> None:
    """Lets autograd follow only the parameters that a step updates: a frozen part then costs no backward pass."""
    for param in parts.shared_params + parts.personal_params:
        param.requires_grad_(False)
    for param in trained:
        param.requires_grad_(True)
