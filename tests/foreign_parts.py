"""Parts from outside the package, as a user would have them in one file: an allocator, a dataset, a model, an aggregator and a fault."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Literal

import numpy as np
from torch import nn

from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.kkt import solve_p1
from fedprune_cli.allocate.policy import as_policy, solve_under_policy
from fedprune_cli.allocate.problem import Allocation, Problem
from fedprune_cli.serve.aggregate import Contribution
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.dataset import Dataset, number_dataset
from fedprune_cli.world.faults import Fates, Moment


@dataclass(frozen=True)
class Cautious:
    """The exact optimum on a part of the band."""

    name: str
    on_infeasible: str = "stretch"
    step: float = 0.1
    prunes: ClassVar[bool] = True

    def solve(self, problem: Problem, seed: int, number: int) -> Allocation:
        smaller = replace(problem, bandwidth_hz=(1 - self.step) * problem.bandwidth_hz)
        return solve_under_policy(smaller, as_policy(self.on_infeasible), solve_p1, least_feasible)


@dataclass(frozen=True)
class Rings:
    """Points in the plane, whose class is the ring that they lie on."""

    name: str
    samples: int = 300

    def load(self) -> Dataset:
        rng = np.random.Generator(np.random.PCG64(7))
        labels = np.arange(self.samples) % 3
        angle = rng.uniform(0, 2 * np.pi, self.samples)
        radius = 1 + labels + 0.2 * rng.normal(size=self.samples)
        points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return number_dataset(self.name, points[:, :, None, None], labels, 3)


@dataclass(frozen=True)
class Narrow:
    """One hidden layer."""

    name: str
    personal: str = "head"
    width: int = 16

    def blocks(self, shape: tuple[int, int, int], num_classes: int) -> OrderedDict[str, nn.Module]:
        body = nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), self.width), nn.ReLU())
        return OrderedDict(body=body, head=nn.Linear(self.width, num_classes))


@dataclass(frozen=True)
class OnceEach:
    """The mean of each entry over the devices that kept it, each of which counts once."""

    needs: ClassVar[Literal["sum", "each"]] = "each"

    def combine(self, old: Array, contributions: Sequence[Contribution]) -> tuple[Array, Array]:
        total, slope, count = (np.zeros(old.size) for _ in range(3))
        for one in contributions:
            total[one.mask] += one.values
            slope[one.mask] += (old[one.mask] - one.values) / one.step_size
            count[one.mask] += 1
        new = np.where(count > 0, total / np.maximum(count, 1), old)
        return new.astype(old.dtype), (slope / np.maximum(count, 1)).astype(old.dtype)


@dataclass(frozen=True)
class Settling:
    """Every update of the first rounds is lost."""

    settling_rounds: int = 1
    delays: ClassVar[bool] = False

    @property
    def active(self) -> bool:
        return self.settling_rounds > 0

    def befall(self, fates: Fates, moment: Moment) -> Fates:
        return replace(fates, lost=fates.lost | (moment.number < self.settling_rounds))


ALLOCATORS = {"cautious": Cautious}
DATASETS = {"rings": Rings}
MODELS = {"narrow": Narrow}
AGGREGATORS = {"once_each": OnceEach}
FAULTS = {"settling": Settling}
