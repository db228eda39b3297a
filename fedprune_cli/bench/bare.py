"""Bare PyTorch loops that do the work of FedAvg's rounds and nothing else: what fedprune's rounds are measured against."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedprune_cli.errors import DeviceError
from fedprune_cli.round.setup import Setup
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets import Dataset


@dataclass(frozen=True)
class Bare:
    """What a bare loop trains on: normalised images, float32 [N, C, H, W], labels [N], and its SGD."""

    images: Tensor
    labels: Tensor
    batch_size: int
    lr: float


# takes the model, the data, the parameters to start from and each device's samples in the order of its batches
BareRound: TypeAlias = Callable[[nn.Module, Bare, Sequence[Tensor], Sequence[Array], Sequence[float]], list[Tensor]]


def bare_data(dataset: Dataset, batch_size: int, lr: float) -> Bare:
    """Returns the whole dataset normalised beforehand: a bare loop pays for it once and not in every round."""
    mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (dataset.mean, dataset.std))
    images = torch.from_numpy(dataset.inputs).float().div_(dataset.scale).sub_(mean).div_(std)
    return Bare(images.to(memory_format=torch.channels_last), torch.from_numpy(dataset.labels), batch_size, lr)


def bare_cnn() -> nn.Module:
    """Returns the CNN of `model=cnn` for 28x28 grey images, ReLU after pooling, in channels-last memory."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def bare_mlp(pixels: int = 784) -> nn.Module:
    """Returns the MLP of `model=mlp model.hidden=[64]`."""
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 10))


def tuned_round(
    model: nn.Module, data: Bare, start: Sequence[Tensor], samples: Sequence[Array], weights: Sequence[float]
) -> list[Tensor]:
    """Returns the weighted sum of the devices' parameters after FedAvg's local steps, as fast as PyTorch goes."""
    params = tuple(model.parameters())
    total = [torch.zeros_like(param) for param in params]
    for own, weight in zip(samples, weights, strict=True):
        with torch.no_grad():
            torch._foreach_copy_(params, list(start))
        index = torch.from_numpy(own)
        x, y = data.images[index], data.labels[index]
        for xb, yb in zip(torch.split(x, data.batch_size), torch.split(y, data.batch_size), strict=True):
            grads = torch.autograd.grad(cross_entropy(model(xb), yb), params)
            with torch.no_grad():
                torch._foreach_add_(params, grads, alpha=-data.lr)
        with torch.no_grad():
            torch._foreach_add_(total, params, alpha=weight)
    return total


def plain_round(
    model: nn.Module, data: Bare, start: Sequence[Tensor], samples: Sequence[Array], weights: Sequence[float]
) -> list[Tensor]:
    """Returns the same as `tuned_round`, the way FedAvg is usually written: load_state_dict and torch.optim for each device."""
    broadcast = dict(zip(model.state_dict(), start, strict=True))
    total = [torch.zeros_like(tensor) for tensor in start]
    for own, weight in zip(samples, weights, strict=True):
        model.load_state_dict(broadcast)
        optimizer = torch.optim.SGD(model.parameters(), lr=data.lr)
        index = torch.from_numpy(own)
        x, y = data.images[index], data.labels[index]
        for xb, yb in zip(torch.split(x, data.batch_size), torch.split(y, data.batch_size), strict=True):
            optimizer.zero_grad()
            cross_entropy(model(xb), yb).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for sum_, tensor in zip(total, model.state_dict().values(), strict=True):
            sum_.add_(tensor, alpha=weight)
    return total


# --- in processes ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bare_workers(setup: Setup, count: int) -> Iterator[Callable[..., list[Array]]]:
    """Yields a function that runs a bare round in `count` processes of one thread, and returns the mean parameters."""
    training, context = setup.experiment.training, multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(count):
        mine, theirs = context.Pipe()
        arguments = (theirs, setup.scenario.dataset, training.batch_size, training.lr)
        processes.append(context.Process(target=_serve, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    try:
        yield functools.partial(_share_out, pipes)
    finally:
        for pipe in pipes:
            pipe.close()  # a worker ends when nobody can send any more
        for process in processes:
            process.join()


def _share_out(
    pipes: Sequence[Connection], start: Sequence[Tensor], samples: Sequence[Array], weights: Sequence[float]
) -> list[Array]:
    """Gives each process its devices, the longest first to the one with the least to do; returns the sum of the answers."""
    shares: list[list[int]] = [[] for _ in pipes]
    for device in sorted(range(len(samples)), key=lambda i: -len(samples[i])):
        min(shares, key=lambda share: sum(len(samples[i]) for i in share)).append(device)
    arrays = [tensor.numpy() for tensor in start]
    try:
        for pipe, share in zip(pipes, shares, strict=True):
            pipe.send((arrays, [samples[i] for i in share], [weights[i] for i in share]))
        answers = [pipe.recv() for pipe in pipes]
    except (EOFError, OSError):
        raise DeviceError("a process of the bare loop died (killed, or out of memory?)") from None
    return [sum(parts) for parts in zip(*answers, strict=True)]


def _serve(pipe: Connection, dataset: Dataset, batch_size: int, lr: float) -> None:
    """Answers bare rounds until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    torch.set_num_threads(1)
    data, model = bare_data(dataset, batch_size, lr), bare_cnn()
    with contextlib.suppress(EOFError):
        while True:
            arrays, samples, weights = pipe.recv()
            start = [torch.from_numpy(array) for array in arrays]
            pipe.send([tensor.numpy() for tensor in tuned_round(model, data, start, samples, weights)])
