"""Channels: which entries of a model belong to the same filter or neuron, so that a whole one can be left out.

A channel group is a set of tensor axes that must keep the same channels: what a layer puts out, what the next one takes in, the
norms between them, the gates of a recurrent layer, and everything that a residual sum ties together. A unit is what is kept or
dropped as a whole: one channel, or one of each group of a GroupNorm, so that its groups stay equal. Leaving a unit out of a model
without norms is the same function as zeroing its entries; a GroupNorm takes its statistics over the channels that are left.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx, nn

from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.cost import ModelCost
from fedprune_cli.learn.parts import Parts, one_layer
from fedprune_cli.store.state import Array

SAME_CHANNELS = (
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.Identity,
    nn.Dropout,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
)
SUMS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter in the layout of the flat vector, and the unit of each of its indices, int64 [length]."""

    param: str
    axis: int
    unit: Array


@dataclass(frozen=True)
class ChannelGroup:
    """Axes that keep the same units, 0..units-1."""

    units: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Layout:
    """Where a model's channels lie. groups: those with shared entries, none where devices drop single entries instead of channels;

    shapes: every parameter's flat shape, shared ones first; num_shared: how many of them are shared; shared_flops: per step kind,
    FLOPs of one sample for each shared entry, float64 [U].
    """

    groups: tuple[ChannelGroup, ...]
    shapes: dict[str, tuple[int, ...]]
    num_shared: int
    shared_flops: dict[str, Array]

    @property
    def slices(self) -> bool:
        """Whether devices leave whole channels out, so that their model is a slice."""
        return bool(self.groups)

    def flags(self, shared_params: int) -> int:
        """Returns how many bits say what a device keeps: one for each unit, or for each of the `shared_params` entries."""
        return sum(group.units for group in self.groups) if self.groups else shared_params

    def over_entries(
        self, per_unit: Sequence[Array], join: Callable[[Array, Array], Array], start: float
    ) -> list[Array]:
        """Returns for every parameter an array of its flat shape: `join` over its axes of their units' values, from `start`."""
        values = {name: np.full(shape, start, dtype=per_unit[0].dtype) for name, shape in self.shapes.items()}
        for group, value in zip(self.groups, per_unit, strict=True):
            for axis in group.axes:
                shape = [1] * len(self.shapes[axis.param])
                shape[axis.axis] = -1
                values[axis.param] = join(values[axis.param], value[axis.unit].reshape(shape))
        return list(values.values())

    def levels(self, importance: Array) -> tuple[tuple[Array, ...], Array]:
        """Returns the level of every unit, an int64 array a group, and of every shared entry, int64 [U], for its importance [U].

        A slice keeps the levels below a cutoff. Units rank by the sum of their shared entries' importance, ties by index; the first of
        every group has level 0, and the groups are thinned in step: all have about the same fraction left at any cutoff.
        """
        ranks = [_ranks(total) for total in self._totals(importance)]
        places = np.concatenate([rank / len(rank) for rank in ranks])
        owner = np.repeat(np.arange(len(ranks)), [len(rank) for rank in ranks])
        order = np.lexsort((owner, places))
        level = np.empty(len(order), dtype=np.int64)
        level[order] = np.maximum(np.arange(len(order)) - len(ranks) + 1, 0)
        of_units = tuple(np.split(level, np.cumsum([len(rank) for rank in ranks])[:-1]))
        entries = self.over_entries(of_units, np.maximum, 0)[: self.num_shared]
        return of_units, np.concatenate([entry.ravel() for entry in entries])

    def _totals(self, importance: Array) -> Iterator[Array]:
        """Yields the sum of `importance` over every unit's shared entries, a group at a time."""
        names = list(self.shapes)[: self.num_shared]
        ends = np.cumsum([math.prod(self.shapes[name]) for name in names])
        pieces = dict(zip(names, np.split(importance.astype(np.float64), ends[:-1]), strict=True))
        for group in self.groups:
            total = np.zeros(group.units)
            for axis in group.axes:
                if axis.param in pieces:
                    piece = np.moveaxis(pieces[axis.param].reshape(self.shapes[axis.param]), axis.axis, 0)
                    total += np.bincount(axis.unit, piece.reshape(len(axis.unit), -1).sum(1), group.units)
            yield total

    def masks(self, kept: Sequence[Array]) -> tuple[Array, Array, list[tuple[int, ...]]]:
        """Returns which shared and which personalized entries a slice has, bool [U] and [V], and its parameters' flat shapes.

        kept: the units that the slice keeps, a bool array a group.
        """
        flags = [entry.ravel() for entry in self.over_entries(kept, np.logical_and, True)]
        sizes = {name: list(shape) for name, shape in self.shapes.items()}
        for group, keep in zip(self.groups, kept, strict=True):
            for axis in group.axes:
                sizes[axis.param][axis.axis] = int(keep[axis.unit].sum())
        none = [np.zeros(0, dtype=bool)]
        shared, personal = flags[: self.num_shared], flags[self.num_shared :]
        return (
            np.concatenate(shared or none),
            np.concatenate(personal or none),
            [tuple(size) for size in sizes.values()],
        )

    def kept_params(self, kept: Sequence[Array]) -> Array:
        """Returns the fraction of each parameter's entries that a slice has, float64 [parameters]."""
        _, _, shapes = self.masks(kept)
        return np.array([math.prod(shape) for shape in shapes]) / [math.prod(shape) for shape in self.shapes.values()]


def _ranks(values: Array) -> Array:
    """Returns the rank of each value, 0 for the largest, ties by index."""
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return rank


def _shapes(parts: Parts) -> dict[str, tuple[int, ...]]:
    return {name: shape for (name, _), shape in zip(parts.names, parts.shapes, strict=True)}


def no_channels(parts: Parts) -> Layout:
    """Returns the layout of a model of which devices drop single entries."""
    return Layout((), _shapes(parts), len(parts.shared_params), {})


def find_channels(parts: Parts, cost: ModelCost) -> Layout:
    """Returns where the channels of a model of standard layers lie, found by following them through its graph.

    Raises ConfigError for an operation that it does not know, and for a model without channels to leave out.
    """
    shapes, num_shared = _shapes(parts), len(parts.shared_params)
    shared = set(list(shapes)[:num_shared])
    groups = tuple(group for group in _trace(parts.model, shapes) if any(axis.param in shared for axis in group.axes))
    if not groups:
        raise ConfigError("the shared part has no channels to leave out: use granularity=weight", key="granularity")
    sizes = [math.prod(shape) for shape in shapes.values()]
    flops = {
        kind: np.repeat(counts[:num_shared] / sizes[:num_shared], sizes[:num_shared])
        for kind, counts in cost.param_flops.items()
    }
    return Layout(groups, shapes, num_shared, flops)


@dataclass
class _Space:
    """Channels on their way through the graph, while it is followed. open: they are neither an input nor an output of the model."""

    size: int
    open: bool
    norm_groups: int
    axes: list[tuple[str, int, int, int]]  # parameter, axis, indices a channel, times that the channels lie along it


def _trace(model: nn.Sequential, shapes: dict[str, tuple[int, ...]]) -> list[ChannelGroup]:
    spaces: list[_Space] = []
    at: dict[fx.Node, _Space | None] = {}

    def take(space: _Space | None, param: str, axis: int, times: int = 1) -> None:
        if space is not None and param in shapes:
            space.axes.append((param, axis, shapes[param][axis] // space.size // times, times))

    def create(size: int) -> _Space:
        spaces.append(_Space(size, True, 1, []))
        return spaces[-1]

    def join(a: _Space | None, b: _Space | None) -> _Space | None:
        if a is None or b is None or a is b:
            for space in (a, b):
                if space is not None and (a is None or b is None):
                    space.open = False
            return a or b
        a.open, a.norm_groups = a.open and b.open, math.lcm(a.norm_groups, b.norm_groups)
        a.axes += b.axes
        spaces.remove(b)
        at.update({node: a for node, space in at.items() if space is b})
        return a

    graph = fx.Tracer().trace(model)
    for node in graph.nodes:
        sources = [argument for argument in node.args if isinstance(argument, fx.Node)]
        before = at.get(sources[0]) if sources else None
        if (
            node.op != "output"
            and node.op != "call_module"
            and all(at[source] is None for source in node.all_input_nodes)
        ):
            at[node] = None  # the model's input, and what is done to it before the first layer
        elif node.op == "call_module":
            at[node] = _pass_module(str(node.target), model.get_submodule(str(node.target)), before, take, create)
        elif node.op == "call_function" and node.target in SUMS and len(sources) == 2:
            at[node] = join(before, at.get(sources[1]))
        elif node.op == "call_function" and (node.target is torch.flatten or _picks(node)):
            at[node] = before
        elif node.op == "output":
            if before is not None:
                before.open = False
        else:
            raise ConfigError(f"the model's {node.name} is not known to it: use granularity=weight", key="granularity")
    return [_group(space) for space in spaces if space.open and space.size // space.norm_groups > 1]


def _picks(node: fx.Node) -> bool:
    """Whether the operation takes one of a recurrent layer's results, or one of the states in it: the channels lie along another axis."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _pass_module(
    name: str, module: nn.Module, before: _Space | None,
    take: Callable[..., None], create: Callable[[int], _Space],
) -> _Space | None:  # fmt: skip
    """Returns the channels behind a layer that gets `before`, whose axes it adds to them."""
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels
    if isinstance(module, nn.GroupNorm) or depthwise:
        if before is not None and isinstance(module, nn.GroupNorm):
            before.norm_groups = math.lcm(before.norm_groups, module.num_groups)
        take(before, f"{name}.weight", 0)
        take(before, f"{name}.bias", 0)
        return before
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
        take(before, f"{name}.weight", 1 if isinstance(module, nn.Linear) else 3)
        after = create(module.weight.shape[0])
        take(after, f"{name}.weight", 0)
        take(after, f"{name}.bias", 0)
        return after
    if isinstance(module, nn.Embedding):
        after = create(module.embedding_dim)
        take(after, f"{name}.weight", 1)
        return after
    if one_layer(module):
        gates = len(module.get_parameter("weight_hh_l0")) // module.hidden_size
        take(before, f"{name}.weight_ih_l0", 1)
        after = create(module.hidden_size)
        take(after, f"{name}.weight_hh_l0", 1)
        for param in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            take(
                after, f"{name}.{param}", 0, gates
            )  # a unit has a row in each gate, and no row is no state: it stays zero
        return after
    if isinstance(module, SAME_CHANNELS):
        return before
    raise ConfigError(
        f"layer {name} ({type(module).__name__}) is not known to it: use granularity=weight", key="granularity"
    )


def _group(space: _Space) -> ChannelGroup:
    """Returns the group of a followed space: unit j is channel j of each group of its norms."""
    units = space.size // space.norm_groups
    axes = tuple(
        Axis(param, axis, np.tile(np.repeat(np.arange(space.size) % units, repeat), times))
        for param, axis, repeat, times in space.axes
    )
    return ChannelGroup(units, axes)
