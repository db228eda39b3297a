"""A device's local schedule: which steps it takes in a round, and on how many of its samples each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedprune_cli.learn.personalize import Kind, Phase


@dataclass(frozen=True)
class LocalPhase:
    """A stretch of local steps on `samples` samples in all, in batches of at most `batch`, never more than the device has.

    epoch: the samples of one pass over the device's data, which no batch straddles, so that a pass ends with what is left; 0 where
    steps are counted instead of passes: then all batches are full and may straddle two passes.
    """

    kind: Kind
    samples: int
    batch: int
    epoch: int = 0

    @property
    def steps(self) -> int:
        """How many steps are taken."""
        if not self.epoch:
            return self.samples // self.batch
        passes, rest = divmod(self.samples, self.epoch)
        return passes * math.ceil(self.epoch / self.batch) + math.ceil(rest / self.batch)

    @property
    def sizes(self) -> list[int]:
        """The samples of each step."""
        if not self.epoch:
            return [self.batch] * self.steps
        passes, rest = divmod(self.samples, self.epoch)
        return [size for length in (*[self.epoch] * passes, rest) for size in _cut(length, self.batch)]


def _cut(length: int, batch: int) -> list[int]:
    """Returns the sizes of full batches and of the one that is left."""
    full, rest = divmod(length, batch)
    return [batch] * full + [rest] * (rest > 0)


def by_steps(phases: Sequence[Phase], num_samples: int, batch_size: int) -> tuple[LocalPhase, ...]:
    """Returns the phases with the steps that the method gives them, of a device with `num_samples` samples D_k."""
    batch = min(batch_size, num_samples)
    return tuple(LocalPhase(phase.kind, phase.steps * batch, batch) for phase in phases)


def by_epochs(phases: Sequence[Phase], epochs: float, num_samples: int, batch_size: int) -> tuple[LocalPhase, ...]:
    """Returns each phase as `epochs` passes over the device's samples; of a part of a pass the samples are rounded up."""
    samples = math.ceil(epochs * num_samples - 1e-9)
    return tuple(LocalPhase(phase.kind, samples, min(batch_size, num_samples), num_samples) for phase in phases)
