"""Layers of several devices' models side by side, with their backward passes written out.

A layer's parameters are views of all members' vectors, float32 [members, ...]. Each product is one of matrices by member, and each other
operation goes entry by entry, so that a member's numbers do not depend on the others'. Nor on its place among them, if all places lie
alike in memory: MKL's products depend on whether a matrix begins at a multiple of 16 bytes, and PyTorch's sigmoid on whether an entry is
among the last of its tensor. So members have a multiple of ALIGN numbers, and a recurrent layer's functions are written into slices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ALIGN = 4  # numbers of 4 bytes


@dataclass(frozen=True)
class Change:
    """How a step changes a layer. rate: 0 where it is frozen; active: 1 for members that move, 0 for others [members]."""

    rate: float
    weight_decay: float
    active: Tensor

    def decay(self, parameter: Tensor) -> None:
        """Shrinks a parameter [members, ...] of the members that move."""
        if self.weight_decay:
            active = self.active.view(-1, *[1] * (parameter.dim() - 1))
            parameter.mul_(1 - self.rate * self.weight_decay * active)

    def descend(self, parameter: Tensor, gradient: Tensor) -> None:
        """Takes the SGD step of a parameter along its gradient, both [members, ...]."""
        self.decay(parameter)
        parameter.add_(gradient, alpha=-self.rate)


class Layer(Protocol):
    """A layer of all members' models."""

    @property
    def is_personal(self) -> bool: ...

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns what the layer makes of its inputs, and what its backward pass needs."""

    def backward(self, error: Tensor, kept: tuple[Tensor, ...], change: Change, back: bool) -> Tensor | None:
        """Changes the parameters in place; returns, if asked `back`, the loss's gradient by the inputs.

        error: by the outputs, zero for members that do not move.
        """


@dataclass(frozen=True)
class Linear:
    """x W' + b, of max(x, 0) where a ReLU stands before it. weight: [members, out, in]; bias: [members, out]."""

    weight: Tensor
    bias: Tensor | None
    is_personal: bool
    after_relu: bool

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.after_relu:
            x = torch.relu_(x)
        if self.bias is None:
            return torch.bmm(x, self.weight.transpose(1, 2)), (x,)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2)), (x,)

    def backward(self, error: Tensor, kept: tuple[Tensor, ...], change: Change, back: bool) -> Tensor | None:
        (x,) = kept
        before = torch.bmm(error, self.weight) if back else None
        if change.rate:
            change.decay(self.weight)
            self.weight.baddbmm_(error.transpose(1, 2), x, alpha=-change.rate)
            if self.bias is not None:
                change.descend(self.bias, error.sum(1))
        return before.mul_(x > 0) if before is not None and self.after_relu else before


@dataclass(frozen=True)
class Embedding:
    """The rows of a table [members, tokens, size] for token numbers [members, batch, length]."""

    table: Tensor
    is_personal: bool

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        tokens = x.transpose(1, 2).long()
        return self.table[torch.arange(len(x)).view(-1, 1, 1), tokens], (tokens,)

    def backward(self, error: Tensor, kept: tuple[Tensor, ...], change: Change, back: bool) -> Tensor | None:
        (tokens,) = kept
        members, known, size = self.table.shape
        rows = tokens + known * torch.arange(members).view(-1, 1, 1)
        gradient = error.new_zeros(members * known, size).index_add_(0, rows.flatten(), error.reshape(-1, size))
        change.descend(self.table, gradient.view(self.table.shape))
        return None


@dataclass(frozen=True)
class Gru:
    """A GRU, as `recurrent.Gru`. by_input: [members, 3 hidden, inputs]; by_state: [members, 3 hidden, hidden]; biases: [members, 3 hidden].

    axes: of windows [members, batch, axes * length], which are its inputs; None for sequences [members, length, batch, inputs].
    """

    by_input: Tensor
    by_state: Tensor
    bias_input: Tensor
    bias_state: Tensor
    is_personal: bool
    axes: int | None
    last: bool

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.axes is not None:
            x = x.view(*x.shape[:2], self.axes, -1).permute(0, 3, 1, 2)
        members, length, batch, _ = x.shape
        x, width = x.flatten(1, 2), self.by_state.shape[2]
        fixed = torch.baddbmm(self.bias_input.unsqueeze(1), x, self.by_input.transpose(1, 2))
        fixed = fixed.view(members, length, batch, -1)
        weight, bias = self.by_state.transpose(1, 2), self.bias_state.unsqueeze(1)
        shape = (members, length + 1, batch, width)  # one more than steps, so that no slice is a whole
        states, reset, update, new, inner = (x.new_empty(shape) for _ in range(5))
        state = states[:, 0].zero_()
        for step in range(length):
            of_state, of_input = torch.baddbmm(bias, state, weight).chunk(3, 2), fixed[:, step].chunk(3, 2)
            inner[:, step] = of_state[2]
            torch.add(of_state[0], of_input[0], out=reset[:, step]).sigmoid_()
            torch.add(of_state[1], of_input[1], out=update[:, step]).sigmoid_()
            torch.addcmul(of_input[2], reset[:, step], of_state[2], out=new[:, step]).tanh_()
            state = torch.lerp(new[:, step], state, update[:, step], out=states[:, step + 1])
        return state if self.last else states[:, 1:], (x, states, reset, update, new, inner)

    def backward(self, error: Tensor, kept: tuple[Tensor, ...], change: Change, back: bool) -> Tensor | None:
        x, states, *of_steps = kept
        reset, update, new, inner = (values[:, :-1] for values in of_steps)
        members, length, batch, width = new.shape
        # what a change of the state after a step does to the sums in the gates and in the candidate of this step
        to_new = (1 - update) * (1 - new * new)
        to_reset = inner * reset * (1 - reset)
        to_update = (states[:, :-1] - new) * update * (1 - update)
        sums = error.new_empty(members, length, batch, 3 * width)  # gradients by what the state adds to them
        of_new = error.new_empty(members, length, batch, width)  # and by what the input adds to the candidate
        after = error if self.last else error[:, -1]
        for step in range(length - 1, -1, -1):
            candidate = torch.mul(after, to_new[:, step])
            here = torch.cat((candidate * to_reset[:, step], after * to_update[:, step], candidate * reset[:, step]), 2)
            sums[:, step], of_new[:, step] = here, candidate
            if step:
                after = torch.baddbmm(after * update[:, step], here, self.by_state)
                if not self.last:
                    after += error[:, step - 1]
        by_sum = sums.flatten(1, 2)
        of_inputs = torch.cat((by_sum[..., : 2 * width], of_new.flatten(1, 2)), 2)
        before = torch.bmm(of_inputs, self.by_input).view(members, length, batch, -1) if back else None
        if change.rate:
            change.descend(self.by_input, _product(of_inputs, x))
            change.descend(self.by_state, _product(by_sum, states[:, :-1].flatten(1, 2)))
            change.descend(self.bias_input, of_inputs.sum(1))
            change.descend(self.bias_state, by_sum.sum(1))
        return before


def rows(count: int, width: int) -> Tensor:
    """Returns zeros, float32 [count, width], of which each row begins at a multiple of ALIGN numbers."""
    return torch.zeros(count, math.ceil(width / ALIGN) * ALIGN)[:, :width]


def _product(error: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient by a weight, error' x [members, out, in], summed over all steps before the weight is touched.

    Added to the weight term by term, as in `Linear`, hundreds of terms would be rounded to the weight's digits.
    """
    shape = (error.shape[2], x.shape[2])
    product = rows(len(x), math.prod(shape)).view(-1, *shape)
    return torch.bmm(error.transpose(1, 2), x, out=product)
