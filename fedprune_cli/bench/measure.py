"""A measured figure, and how it is taken: measured times are ratios to a reference that takes turns with what is measured.

Machines differ and are shared, so a measured time is never reported alone. Modelled figures (bits, FLOPs, simulated seconds) are
reproducible and reported as they are.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedprune_cli.errors import ConfigError

Better = Literal["smaller", "larger"]
Kind = Literal["exact", "wall"]


@dataclass(frozen=True)
class Measure:
    """One figure. `exact` ones are reproducible; a `wall` one is the median of the ratios to a bare reference.

    spread: largest minus smallest ratio, 0 for exact figures; bare: the reference's own figure, for information.
    """

    name: str
    unit: str
    value: float
    spread: float
    better: Better
    kind: Kind
    bare: float | None


@dataclass(frozen=True)
class Effort:
    """How much is measured: turns of each pair, and whether the rounds are smaller and the longest tasks left out."""

    repeats: int
    quick: bool


def build_effort(repeats: int, quick: bool) -> Effort:
    """Returns the effort that the options ask for; a quick one takes two turns at most. Raises ConfigError."""
    if not 1 <= repeats <= 1000:
        raise ConfigError(f"--repeats {repeats}: must be in 1..1000")
    return Effort(min(repeats, 2) if quick else repeats, quick)


Say: TypeAlias = Callable[[str], None]  # takes a note for the reader
Task: TypeAlias = Callable[[Effort, Say], tuple[Measure, ...]]


def ratio(name: str, unit: str, better: Better, ours: Sequence[float], bare: Sequence[float], figure: float) -> Measure:
    """Returns the wall measure of paired figures: the median of ours / bare, and how far the pairs are apart."""
    ratios = [mine / other for mine, other in zip(ours, bare, strict=True)]
    return Measure(name, unit, statistics.median(ratios), max(ratios) - min(ratios), better, "wall", figure)


def exact(name: str, unit: str, value: float, better: Better = "smaller") -> Measure:
    """Returns the measure of a reproducible figure."""
    return Measure(name, unit, float(value), 0.0, better, "exact", None)


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns how long `work` takes."""
    started = clock()
    work()
    return clock() - started


def available_cores() -> int:
    """Returns the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
