"""A device's half of a round: local steps on its two parts, and the test of its own model.

The unit of arithmetic is one device's work with fixed batch shapes, so that its bits depend on nothing but its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedprune_cli.errors import DeviceError, require
from fedprune_cli.learn.kept import Kept
from fedprune_cli.learn.parts import Parts, set_trained
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.private import Noised, drawn_batches, noised_mean, sample_gradients
from fedprune_cli.learn.schedule import LocalPhase, by_epochs, by_steps
from fedprune_cli.learn.structured import Layout
from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array, Ragged
from fedprune_cli.wire.quantize import BITS_PER_PARAM, dequantize, quantize

Tensors = tuple[Tensor, ...] | list[Tensor]  # what the foreach kernels take
EVALUATION_BATCH = 128  # fastest of 32..512 for the CNN; part of the run's identity because it fixes shapes


@dataclass(frozen=True)
class Training:
    """Local SGD. The methods' YAML takes its steps from here; `epochs`, when given, replaces them by passes over a device's data.

    block: devices whose small models are trained side by side (`batched`); 1: one by one. device: where, `cpu` or `cuda`;
    precision: of the forward and backward pass, `float32` or `bfloat16` under autocast; parameters stay float32.
    """

    batch_size: int
    shared_steps: int
    personal_steps: int
    lr: float
    personal_lr: float
    momentum: float
    weight_decay: float
    epochs: float | None
    block: int
    device: str
    precision: str

    def __post_init__(self) -> None:
        require(1 <= self.batch_size <= 10**6, "batch_size", self.batch_size, "in 1..1000000")
        require(0 < self.lr < math.inf, "lr", self.lr, "> 0")
        require(0 < self.personal_lr < math.inf, "personal_lr", self.personal_lr, "> 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, ">= 0")
        require(self.epochs is None or 0 < self.epochs < 10**6, "epochs", self.epochs, "> 0 or null")
        require(1 <= self.block <= 1000, "block", self.block, "in 1..1000")
        here = "'cpu' or 'cuda'" if torch.cuda.is_available() else "'cpu': PyTorch finds no CUDA device on this machine"
        allowed = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        require(self.device in allowed, "device", self.device, here)
        require(self.precision in ("float32", "bfloat16"), "precision", self.precision, "'float32' or 'bfloat16'")

    def schedule(self, phases: Sequence[Phase], num_samples: int) -> tuple[LocalPhase, ...]:
        """Returns the local schedule (tau and b_s of model.md) of a device with `num_samples` training samples D_k.

        With epochs every sample is used once per pass and the last batch is what is left. No batch is larger than D_k.
        """
        if self.epochs is None:
            return by_steps(phases, num_samples, self.batch_size)
        return by_epochs(phases, self.epochs, num_samples, self.batch_size)


@dataclass(frozen=True)
class Learner:
    """All that a worker needs to do any device's work: the model, the pooled data and who owns which samples.

    inputs: uint8 or float32 [N, C, H, W]; labels: int64 [N]; train, test: sample indices of each device; layout: where the channels lie
    that devices leave out.
    """

    seed: int
    training: Training
    parts: Parts
    inputs: Array
    labels: Array
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Ragged
    test: Ragged
    layout: Layout


@dataclass(frozen=True)
class Task:
    """One device's work: its id, the round, u [U] as broadcast, v_k [V], what it keeps of the model, and its local schedule.

    stage names the work in error messages. bits: of a value that is sent.
    may_diverge: a loss that is not finite is no error, as faults may have led to it. coded: the code of what is sent is wanted as well.
    due_s: by the server's clock, where that decides who is late. noised: how steps are, None: they are not.
    """

    stage: str
    round: int
    device: int
    shared: Array
    personal: Array
    kept: Kept
    schedule: tuple[LocalPhase, ...]
    bits: int = BITS_PER_PARAM
    may_diverge: bool = False
    coded: bool = False
    due_s: float | None = None
    noised: Noised | None = None

    @property
    def steps(self) -> int:
        """SGD steps of all phases."""
        return sum(phase.steps for phase in self.schedule)


@dataclass(frozen=True)
class Update:
    """What device k sends, and what it keeps.

    shared: the kept entries of u as the server reads them [n_k]; personal: v_k [V]; train_loss: the mean of the last phase, if any;
    sent_bytes: the length of what was really encoded. rounding_error: the square of what rounding changed over the square of the
    change of u, when rounded. code: what was encoded, where the task wants it; died: the device stopped before it had sent anything;
    late: by a clock, None where the modelled seconds say so.
    """

    device: int
    shared: Array
    personal: Array
    train_loss: float | None
    sent_bytes: int
    rounding_error: float | None = None
    code: bytes = b""
    died: bool = False
    late: bool | None = None


@dataclass(frozen=True)
class Score:
    """Correct predictions of device k's own model on its own test samples."""

    device: int
    correct: int
    total: int


def train(learner: Learner, task: Task) -> Update:
    """Returns the device's update after its local steps from (u * m_k, v_k) (model.md, section 2, step 3).

    A dropped entry is zero and its gradient is zeroed: it never moves. Of whole channels nothing is left to compute: the model is
    smaller, and what it lacks of v_k stays as it was. Raises DeviceError when the loss is not finite.
    """
    model = task.kept.load(learner.parts, learner.layout, task.shared, task.personal)
    loss: float | None = None
    for index, phase in enumerate(task.schedule):
        loss = _run_phase(learner, task, index, phase, model.keep, loss)
    personal = model.personal.cpu().numpy()
    if model.personal_mask is not None:
        personal, personal[model.personal_mask] = task.personal.copy(), personal
    return send(learner.seed, task, model.mask, model.kept(), personal.copy(), loss)


def send(seed: int, task: Task, mask: Array | None, values: Array, personal: Array, loss: float | None) -> Update:
    """Returns the update that carries `values` [n_k], the entries of u in the mask, all when None, rounded to the task's bits."""
    where = slice(None) if mask is None else mask
    if task.bits == BITS_PER_PARAM or (task.may_diverge and not np.isfinite(values).all()):
        return Update(task.device, values, personal, loss, values.nbytes)
    change = values - task.shared[where]
    code = quantize(change, task.bits, stream(seed, "rounding", task.round, task.device))
    read = dequantize(code, len(change), task.bits)
    missed = np.square(change - read, dtype=np.float64).sum()
    error = float(missed / max(np.square(change, dtype=np.float64).sum(), 1e-300))
    kept = code if task.coded else b""
    return Update(task.device, task.shared[where] + read, personal, loss, len(code), error, kept)


def evaluate(learner: Learner, task: Task) -> Score:
    """Returns how the device's model (u * m_k, v_k), after the task's schedule if any, does on its own test samples."""
    if task.schedule:
        train(learner, task)
    else:
        task.kept.load(learner.parts, learner.layout, task.shared, task.personal)
    indices, correct = learner.test[task.device], 0
    with torch.inference_mode(), _precision(learner.training):
        for start in range(0, len(indices), EVALUATION_BATCH):
            x, y = samples(learner, indices[start : start + EVALUATION_BATCH])
            correct += int((learner.parts.model(x).argmax(1) == y).sum())
    return Score(task.device, correct, len(indices))


def _run_phase(
    learner: Learner,
    task: Task,
    index: int,
    phase: LocalPhase,
    keep: tuple[Tensor, ...] | None,
    previous_loss: float | None,
) -> float | None:
    """Takes the phase's SGD steps in place; returns their mean loss, or the previous one when there was nothing to do."""
    config, parts = learner.training, learner.parts
    shared = parts.shared_params if phase.kind != "personal" else ()
    personal = parts.personal_params if phase.kind != "shared" else ()
    own = learner.train[task.device]
    if phase.steps == 0 or not (shared or personal):
        return previous_loss
    set_trained(parts, shared + personal)
    if task.noised is not None:
        steps = _noised_steps(learner, task, task.noised, index, phase, keep if shared else None)
    else:
        x, y = samples(learner, own[batch_positions(learner.seed, task, index, len(own), phase.samples)])
        steps = _plain_steps(learner, phase, x, y, shared + personal)
    velocity: Tensors = ()
    total_loss = torch.zeros((), device=parts.shared.device)
    for loss, grads in steps:
        with torch.no_grad():
            total_loss += loss
            if config.weight_decay:
                grads = torch._foreach_add(grads, shared + personal, alpha=config.weight_decay)
            if keep is not None and shared:
                grads = (*torch._foreach_mul(grads[: len(shared)], keep), *grads[len(shared) :])
            if config.momentum:
                velocity = (
                    grads if not velocity else torch._foreach_add(grads, torch._foreach_mul(velocity, config.momentum))
                )
                grads = velocity
            if shared:
                torch._foreach_add_(shared, grads[: len(shared)], alpha=-config.lr)
            if personal:
                torch._foreach_add_(personal, grads[len(shared) :], alpha=-config.personal_lr)
    return require_finite(float(total_loss) / phase.steps, task, phase, config, learner.inputs.shape[1:])


def _plain_steps(
    learner: Learner, phase: LocalPhase, x: Tensor, y: Tensor, trained: tuple[nn.Parameter, ...]
) -> Iterator[tuple[Tensor, Tensors]]:
    """Yields the loss and the gradients of each step's batch, at what the steps before it left."""
    for xb, yb in zip(torch.split(x, phase.sizes), torch.split(y, phase.sizes), strict=True):
        with _precision(learner.training):  # entered anew each step: it keeps cast weights until it is left
            loss = cross_entropy(learner.parts.model(xb), yb)
        yield loss, torch.autograd.grad(loss, trained)


def _noised_steps(
    learner: Learner, task: Task, noised: Noised, index: int, phase: LocalPhase, keep: tuple[Tensor, ...] | None
) -> Iterator[tuple[Tensor, Tensors]]:
    """Yields the mean loss and the noised gradients of each step's samples, drawn anew; without any the noise alone, and no loss."""
    parts, own = learner.parts, learner.train[task.device]
    params = {
        name: param
        for name, param in zip([n for n, _ in parts.names], parts.all_params, strict=True)
        if param.requires_grad
    }
    draws, noise = noised.draws(learner.seed, task.round, task.device, index)
    for chosen in drawn_batches(draws, len(own), phase):
        of_each, losses = [torch.zeros(0, *param.shape) for param in params.values()], torch.zeros(1)
        if len(chosen):
            of_each, losses = sample_gradients(parts.model, params, *samples(learner, own[chosen]), keep)
        yield losses.mean(), noised_mean(of_each, phase.batch, noised, noise)


def require_finite(
    mean_loss: float, task: Task, phase: LocalPhase, config: Training, shape: Sequence[int]
) -> float | None:
    """Returns the loss; when it is not finite None where it may be so, else raises DeviceError saying where it came from."""
    if not math.isfinite(mean_loss):
        if task.may_diverge:
            return None
        raise DeviceError(
            f"round {task.round + 1}, device {task.device}, {task.stage}, {phase.kind} steps: the training loss is {mean_loss} "
            f"(batches {list(shape)} of {phase.batch}); lower training.lr={config.lr} or "
            f"training.personal_lr={config.personal_lr}"
        )
    return mean_loss


def batch_positions(seed: int, task: Task, phase: int, num_samples: int, count: int) -> Array:
    """Returns `count` positions: pass after pass over the device's samples, each a new permutation."""
    rng = stream(seed, "batch", task.round, task.device, phase)
    passes = math.ceil(count / num_samples)
    return np.concatenate([rng.permutation(num_samples) for _ in range(passes)])[:count]


def samples(learner: Learner, indices: Array) -> tuple[Tensor, Tensor]:
    """Returns normalised inputs, float32 [n, C, H, W] in channels-last memory, and labels [n]."""
    device = learner.parts.shared.device
    inputs = torch.from_numpy(learner.inputs[indices]).to(device).float().div_(learner.scale)
    mean, std = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in (learner.mean, learner.std))
    x = inputs.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
    return x, torch.from_numpy(learner.labels[indices]).to(device)


def _precision(config: Training) -> AbstractContextManager[None]:
    """Returns the context of a forward pass: nothing, or autocast to bfloat16."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(config.device, torch.bfloat16)
