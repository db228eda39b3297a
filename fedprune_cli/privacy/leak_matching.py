"""Gradient matching: dummy samples are trained until the steps that they cause change the model as it was seen to change.

Zhu et al., NeurIPS 2019; by the cosine, with total variation: Geiping et al., NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedprune_cli.store.state import Array

Tensors = tuple[Tensor, ...]
RATE = 0.1  # Adam's first step size, which falls to nothing in half a cosine
SMOOTHING = 1e-3  # weight of the pictures' total variation


@dataclass(frozen=True)
class Steps:
    """What the server knows of a step, or several, that a device took, and how it would take them itself.

    logits: of shared and personal parameters and samples; shared: u m as sent out; personal: a guess of v, which the server never sees;
    keep: 1 for entries that came back, cut like them; gradient: what the steps moved u by, over -lr and their number; lr, steps: of theirs.
    """

    logits: Callable[[Tensors, Tensors, Tensor], Tensor]
    shared: Tensors
    personal: Tensors
    keep: Tensors
    gradient: Tensors
    lr: float
    steps: int


@dataclass(frozen=True)
class Dummies:
    """What gradient matching begins with.

    pixels: float32 [n, C, H, W], in the range 0 to 1 after a sigmoid; labels: int64 [n], None where they are to be found too; to_input:
    of pixels in that range, what the network sees; iterations: of Adam.
    """

    pixels: Tensor
    labels: Tensor | None
    classes: int
    to_input: Callable[[Tensor], Tensor]
    iterations: int


def matched(seen: Steps, begin: Dummies) -> Array:
    """Returns samples in the range 0 to 1, float32 [n, C, H, W], whose steps change u in the direction in which it was seen to change.

    Minimises 1 - cosine over the samples, over their labels where they are not given, and over v. Which samples were in which step
    the server cannot know: every step is taken on all dummies.
    """
    pixels = begin.pixels.clone().requires_grad_(True)
    scores = torch.zeros(len(pixels), begin.classes, requires_grad=True)
    one_hot = None if begin.labels is None else torch.nn.functional.one_hot(begin.labels, begin.classes).float()
    personal = tuple(value.clone().requires_grad_(True) for value in seen.personal)
    trained = [pixels, *personal, *([scores] if one_hot is None else [])]
    size = _norm(seen.gradient)
    optimizer = torch.optim.Adam(trained, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(begin.iterations, 1))
    for _ in range(begin.iterations):
        optimizer.zero_grad()
        shown = torch.sigmoid(pixels)
        target = torch.softmax(scores, 1) if one_hot is None else one_hot
        moved = _moved(seen, personal, begin.to_input(shown), target)
        along = sum(((a * b).sum() for a, b in zip(moved, seen.gradient, strict=True)), torch.zeros(()))
        loss = 1 - along / (_norm(moved) * size + 1e-20) + SMOOTHING * _variation(shown)
        for variable, grad in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            variable.grad = None if grad is None else torch.nan_to_num(grad)
        optimizer.step()
        schedule.step()
    return torch.sigmoid(pixels).detach().numpy()


def _moved(seen: Steps, personal: Tensors, inputs: Tensor, target: Tensor) -> Tensors:
    """Returns the sum of the gradients of the steps that these inputs would cause, differentiable in them."""
    current = tuple(value.detach().requires_grad_(True) for value in seen.shared)
    total: Sequence[Tensor] = ()
    for step in range(seen.steps):
        loss = torch.nn.functional.cross_entropy(seen.logits(current, personal, inputs), target)
        grads = [
            g * keep for g, keep in zip(torch.autograd.grad(loss, current, create_graph=True), seen.keep, strict=True)
        ]
        total = [a + b for a, b in zip(total, grads, strict=True)] if step else grads
        if step + 1 < seen.steps:
            current = tuple(value - seen.lr * g for value, g in zip(current, grads, strict=True))
    return tuple(total)


def _norm(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.square().sum() for value in values]).sum().add(1e-30).sqrt()


def _variation(pixels: Tensor) -> Tensor:
    """Returns the mean absolute difference of neighbouring pixels."""
    sides = [pixels.diff(dim=at).abs().mean() for at in (-2, -1) if pixels.shape[at] > 1]
    return torch.stack(sides).sum() if sides else torch.zeros(())
