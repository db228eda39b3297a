"""Small models of several devices trained side by side: one batched matrix product per layer instead of a step per device.

A step of a small multilayer perceptron or GRU costs more calls than arithmetic. A block of devices takes its steps together, with the
backward pass written out and the update made by the product itself. The unit of arithmetic is the block: it always has the same number
of members, filled up with copies, so that a device's bits do not depend on who shares its block. They differ in the last digits from
those of the loop over devices (`client.train`), which the tests hold it against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedprune_cli.learn import beside
from fedprune_cli.learn.beside import Change, Layer, Linear
from fedprune_cli.learn.client import (
    Learner,
    Task,
    Training,
    Update,
    batch_positions,
    require_finite,
    samples,
    send,
    train,
)
from fedprune_cli.learn.parts import Parts
from fedprune_cli.learn.recurrent import Gru, Steps, Tokens
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.store.state import Array

MAX_PARAMS = 200_000  # of larger models the arithmetic outweighs what batching saves
MAX_STATE = 64  # of a GRU's layers, for the same reason
STEPS = 32  # gathered at a time, to bound memory


@dataclass(frozen=True)
class _Block:
    """Devices that train side by side, always as many as `training.block`.

    members: their tasks; layers: views of all members' models; shared: their u, float32 [members, U], which steps change in place;
    keep: 1 for each entry of u that a member keeps and 0 for others, in the same shape, None when all keep everything.
    """

    learner: Learner
    members: Sequence[Task]
    layers: Sequence[Layer]
    shared: Tensor
    keep: Tensor | None


def batches(parts: Parts, training: Training) -> bool:
    """Whether the model is a small perceptron or GRU, trained in a way that blocks can follow."""
    layers = _leaves(parts)
    kinds = [type(layer) for layer in layers]
    perceptron = kinds == [nn.Linear, nn.ReLU] * (len(kinds) // 2) + [nn.Linear]
    cells = kinds[1 if kinds[0] is nn.Embedding else 0 : -1]
    recurrent = set(cells) == {Gru} and kinds[-1] is nn.Linear
    narrow = all(layer.gru.hidden_size <= MAX_STATE for layer in layers if isinstance(layer, Gru))
    small = parts.shared.numel() + parts.personal.numel() <= MAX_PARAMS
    plain = training.momentum == 0 and training.precision == "float32" and training.device == "cpu"
    return training.block > 1 and plain and (perceptron or recurrent) and narrow and small


def _leaves(parts: Parts) -> list[nn.Module]:
    """Returns the model's layers in forward order, without those that only arrange its inputs."""
    around = nn.Sequential | nn.RNNBase | nn.Flatten | Steps | Tokens
    return [module for module in parts.model.modules() if not isinstance(module, around)]


def blocks(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """Returns the tasks in blocks of at most `size`, devices with about as many steps together: they wait for the slowest."""
    ordered = sorted(tasks, key=lambda task: (task.steps, task.device))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def train_some(learner: Learner, work: Task | Sequence[Task]) -> list[Update]:
    """Returns the updates of several devices, trained side by side, or of one by itself, so that both are handed out at once."""
    return [train(learner, work)] if isinstance(work, Task) else train_block(learner, work)


def train_block(learner: Learner, tasks: Sequence[Task]) -> list[Update]:
    """Returns each device's update after its local steps from (u * m_k, v_k), as `client.train` does one by one.

    Raises DeviceError when a loss is not finite.
    """
    learner.parts.make_whole()
    members = [*tasks, *[tasks[0]] * (learner.training.block - len(tasks))]
    shared = _stack([task.shared for task in members])
    personal = _stack([task.personal for task in members])
    keep = _masks(members, shared.shape[1])
    if keep is not None:
        shared *= keep
    block = _Block(learner, members, _layers(learner.parts, shared, personal), shared, keep)
    losses: list[float | None] = [None] * len(members)
    for index in range(len(tasks[0].schedule)):
        losses = _run_phase(block, index, losses)
    updates = []
    for row, (task, loss) in enumerate(zip(tasks, losses, strict=False)):
        mask = None if keep is None else keep[row].numpy() > 0
        values = shared[row].numpy().copy() if mask is None else shared[row].numpy()[mask]
        updates.append(send(learner.seed, task, mask, values, personal[row].numpy().copy(), loss))
    return updates


def _stack(vectors: Sequence[Array]) -> Tensor:
    """Returns the vectors as rows of a matrix, each of which begins where a product does not depend on its place."""
    return beside.rows(len(vectors), len(vectors[0])).copy_(torch.from_numpy(np.stack(vectors)))


def _masks(members: Sequence[Task], size: int) -> Tensor | None:
    """Returns the masks, float32 [members, U], or None when all keep everything."""
    kept = [task.kept.mask(size) for task in members]
    if all(mask is None for mask in kept):
        return None
    rows = [np.ones(size, dtype=bool) if mask is None else mask for mask in kept]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def _layers(parts: Parts, shared: Tensor, personal: Tensor) -> list[Layer]:
    views: dict[str, Tensor] = {}
    for vector, params, first in (
        (shared, parts.shared_params, 0),
        (personal, parts.personal_params, len(parts.shared_params)),
    ):
        start = 0
        for (name, count), param in zip(parts.names[first:], params, strict=False):
            views[name] = vector[:, start : start + count].view(-1, *param.shape)
            start += count
    names = {module: name for name, module in parts.model.named_modules()}
    leaves, layers = _leaves(parts), list[Layer]()
    for at, leaf in enumerate(leaves):
        name, is_personal = names[leaf], names[leaf].split(".")[0] in parts.personal_blocks
        if isinstance(leaf, nn.Linear):
            after_relu = at > 0 and isinstance(leaves[at - 1], nn.ReLU)
            layers.append(Linear(views[f"{name}.weight"], views.get(f"{name}.bias"), is_personal, after_relu))
        elif isinstance(leaf, nn.Embedding):
            layers.append(beside.Embedding(views[f"{name}.weight"], is_personal))
        elif isinstance(leaf, Gru):
            by_input, by_state, *biases = (views[f"{name}.gru.{param}"] for param, _ in leaf.gru.named_parameters())
            axes = None if layers else by_input.shape[2]
            layers.append(beside.Gru(by_input, by_state, biases[0], biases[1], is_personal, axes, leaf.last))
    return layers


def _run_phase(block: _Block, index: int, previous: Sequence[float | None]) -> list[float | None]:
    """Takes one phase's SGD steps of all members in place; returns their mean losses, the previous ones where there was nothing to do."""
    learner, config = block.learner, block.learner.training
    phases = [task.schedule[index] for task in block.members]
    rates = [_rate(layer, phases[0], config) for layer in block.layers]
    steps = np.array([phase.steps for phase in phases])
    if not steps.any() or not any(rates):
        return [*previous]
    tables = [_positions(learner, task, index) for task in block.members]
    total, shared = torch.zeros(len(block.members)), block.shared
    for start in range(0, int(steps.max()), STEPS):
        x, y, sizes = _gather(learner, tables, start, min(STEPS, int(steps.max()) - start))
        for step in range(x.shape[1]):
            total += _step(block.layers, rates, x[:, step], y[:, step], sizes[:, step], config.weight_decay)
            if block.keep is not None:
                shared *= block.keep
    shape = learner.inputs.shape[1:]
    return [
        require_finite(float(sum_) / phase.steps, task, phase, config, shape) if phase.steps else before
        for task, phase, sum_, before in zip(block.members, phases, total, previous, strict=True)
    ]


@dataclass(frozen=True)
class _Positions:
    """A member's samples, step by step: positions in the pool, int64 [steps, batch], of which the first sizes [steps] count."""

    table: Array
    sizes: Array


def _positions(learner: Learner, task: Task, index: int) -> _Positions:
    phase, indices = task.schedule[index], learner.train[task.device]
    sizes = np.array(phase.sizes, dtype=np.int64)
    table = np.zeros((len(sizes), learner.training.batch_size), dtype=np.int64)
    chosen = batch_positions(learner.seed, task, index, len(indices), phase.samples)
    table[np.arange(table.shape[1]) < sizes[:, None]] = indices[chosen]
    return _Positions(table, sizes)


def _rate(layer: Layer, phase: LocalPhase, config: Training) -> float:
    """Returns the step size of a layer in a phase, 0 where it is frozen."""
    frozen = phase.kind == ("shared" if layer.is_personal else "personal")
    return 0.0 if frozen else config.personal_lr if layer.is_personal else config.lr


def _gather(learner: Learner, members: Sequence[_Positions], start: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns inputs [members, steps, batch, features], labels [members, steps, batch] and how many of each batch count.

    The shape is always the same: a batch that is not full, or that a member no longer has, is filled up with any sample.
    """
    batch = math.ceil(learner.training.batch_size / beside.ALIGN) * beside.ALIGN
    chosen = np.zeros((len(members), steps, batch), dtype=np.int64)
    sizes = np.zeros((len(members), steps), dtype=np.float32)
    for at, member in enumerate(members):
        part = member.table[start : start + steps]
        chosen[at, : len(part), : part.shape[1]] = part
        sizes[at, : len(part)] = member.sizes[start : start + steps]
    x, y = samples(learner, chosen.ravel())
    return (
        x.flatten(1).view(len(members), steps, batch, -1),
        y.view(len(members), steps, batch),
        torch.from_numpy(sizes),
    )


def _step(
    layers: Sequence[Layer], rates: Sequence[float], x: Tensor, y: Tensor, sizes: Tensor, weight_decay: float
) -> Tensor:
    """Takes one SGD step of every member in place, on the first sizes [members] of its batch; returns its losses before it.

    A member of which nothing counts does not move, and has no loss.
    """
    kept = []
    for layer in layers:
        x, needed = layer.forward(x)
        kept.append(needed)
    active, counts = (sizes > 0).float(), (torch.arange(y.shape[1]) < sizes[:, None]).float()
    of_each = sizes.clamp(min=1.0)
    logits = torch.log_softmax(x, 2)
    target = y.unsqueeze(2)
    loss = -((logits.gather(2, target) * counts[:, :, None]).sum((1, 2)) / of_each) * active
    # the gradient of the mean cross-entropy: softmax minus one-hot, over what counts of the batch
    error = logits.exp_().scatter_add_(2, target, torch.full_like(target, -1, dtype=x.dtype))
    error *= (counts * (active / of_each)[:, None])[:, :, None]
    lowest = next(at for at, rate in enumerate(rates) if rate)
    for at in range(len(layers) - 1, lowest - 1, -1):
        back = layers[at].backward(error, kept[at], Change(rates[at], weight_decay, active), at > lowest)
        error = error if back is None else back
    return loss
