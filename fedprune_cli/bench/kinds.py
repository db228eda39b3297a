"""What a FLOP of each kind of layer takes on this machine, and what a training step takes besides: real step times, on one thread.

The model says t = cycles_per_flop / f (sum over kinds of scale_kind FLOPs_kind) + step_s (model.md, section 5). Elementwise work counts
no FLOPs: what normalisation and activations take is in the scale of the layers that they stand around. Models of other widths are fitted
than those that the fit is held against.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.errors import DeviceError
from fedprune_cli.learn.client import Learner, Task, train
from fedprune_cli.learn.cost import count_cost
from fedprune_cli.learn.kept import Whole
from fedprune_cli.learn.models import Shape, build_model
from fedprune_cli.learn.parts import split_model
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.learn.structured import no_channels
from fedprune_cli.rng import stream
from fedprune_cli.store.state import Array, ragged
from fedprune_cli.terminal import Table
from fedprune_cli.world.measured import RANGES, SCALED

KINDS = ("conv", *SCALED)
CLASSES = 10  # of the models' outputs
STEPS = 5  # of a timed call
LONGEST_S = 1.0  # after which a point is not measured again
LARGE = 2e9  # FLOPs of a step, above which a timed call takes only one


@dataclass(frozen=True)
class Probe:
    """A model whose steps are timed: its overrides, the shape of its inputs, and the samples of a step."""

    model: str
    shape: Shape
    batch: int


FITTED = tuple(
    Probe(model, shape, batch)
    for model, shape in (
        ("model=mlp model.hidden=[8]", (1, 8, 8)),
        ("model=mlp model.hidden=[512,256]", (1, 28, 28)),
        ("model=cnn model.channels=[16,32] model.hidden=256", (1, 28, 28)),
        ("model=cnn model.channels=[128,128] model.hidden=64 model.padding=2", (3, 16, 16)),
        ("model=cnn1d model.channels=[64,64]", (6, 1, 64)),
        ("model=mobilenet model.width=0.5", (3, 32, 32)),
        ("model=gru model.hidden=[32]", (6, 1, 30)),
        ("model=gru model.hidden=[128]", (6, 1, 30)),
    )
    for batch in (8, 32)
)
HELD_OUT = tuple(
    Probe(f"model={name}", shape, 16)
    for name, shape in (
        ("mlp", (1, 8, 8)), ("cnn", (1, 28, 28)), ("mobilenet", (3, 32, 32)), ("resnet18", (3, 32, 32)), ("cnn1d", (6, 1, 128)),
        ("gru", (6, 1, 50)),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """A probe's step: its FLOPs by kind of layer, in the order of KINDS [4], and its measured seconds, the median."""

    probe: Probe
    flops: Array
    measured_s: float


@dataclass(frozen=True)
class ByKind:
    """What was fitted. seconds_per_flop: by kind of layer, in the order of KINDS [4]; step_s: of a step besides its FLOPs.

    one_figure: the seconds per FLOP that a single figure for the machine would have, the median of what was fitted; held_out: the models
    that the fit is held against.
    """

    seconds_per_flop: Array
    step_s: float
    one_figure: float
    held_out: tuple[Timed, ...]

    def predicted_s(self, flops: Array) -> float:
        """Returns the modelled seconds of a step of FLOPs by kind [4]."""
        return float(self.seconds_per_flop @ flops) + self.step_s

    @property
    def scales(self) -> dict[str, float]:
        """How many times a convolution's seconds a FLOP of the other kinds takes."""
        return {
            kind: float(each / self.seconds_per_flop[0])
            for kind, each in zip(KINDS[1:], self.seconds_per_flop[1:], strict=True)
        }

    @property
    def rows(self) -> list[dict[str, float | str]]:
        """The held-out models by key: what was measured, and how far both models are off, as a share of it."""
        return [
            {
                "model": one.probe.model.removeprefix("model="),
                "batch": one.probe.batch,
                "flops": float(one.flops.sum()),
                "measured_s": one.measured_s,
                "modelled_s": self.predicted_s(one.flops),
                "error": self.predicted_s(one.flops) / one.measured_s - 1,
                "one_figure_error": self.one_figure * float(one.flops.sum()) / one.measured_s - 1,
            }
            for one in self.held_out
        ]

    def sentence(self) -> str:
        """Says how far the fit is off, and how far a single figure would be."""
        (by_kind, one), (single, other) = (
            max((abs(float(row[key])), str(row["model"])) for row in self.rows) for key in ("error", "one_figure_error")
        )
        return (
            f"On models that were not fitted, figures by kind of layer are off by up to {100 * by_kind:.0f} % ({one}), one figure for "
            f"the machine by up to {100 * single:.0f} % ({other})."
        )


def measure(experiment: Experiment, turns: int) -> ByKind:
    """Returns the figures of this machine, with the experiment's `training`; raises DeviceError where they make no sense."""
    torch.set_num_threads(1)
    fitted, held_out = ([time_probe(experiment, probe, turns) for probe in probes] for probes in (FITTED, HELD_OUT))
    return fit(fitted, held_out)


def fit(fitted: Sequence[Timed], held_out: Sequence[Timed]) -> ByKind:
    """Returns the figures of this machine.

    step_s is the shortest step, of a model that is next to nothing; the others have the least squares of ln(modelled / measured), for
    which too much counts as too little. Raises DeviceError where one is beyond what a class may have.
    """
    from scipy.optimize import least_squares

    seconds = np.array([one.measured_s for one in fitted])
    flops = np.stack([one.flops for one in fitted])
    step_s, one_figure = float(seconds.min()), float(np.median(seconds / flops.sum(axis=1)))
    first = np.full(len(KINDS), np.log(one_figure))
    found = np.exp(least_squares(lambda figures: np.log((flops @ np.exp(figures) + step_s) / seconds), first).x)
    by_kind = ByKind(found, step_s, one_figure, tuple(held_out))
    for kind, scale in by_kind.scales.items():
        least, most = RANGES[f"{kind}_scale"]
        if not least <= scale <= most:
            raise DeviceError(
                f"calibrate: {kind}_scale comes out as {scale:g}; measure again with more --turns, undisturbed"
            )
    return by_kind


def time_probe(experiment: Experiment, probe: Probe, turns: int) -> Timed:
    """Returns a probe's step on random inputs: of `turns` timed calls after a first one, or as many as a second allows."""
    config = build_experiment(compose_config(probe.model.split())).model
    parts = split_model(build_model(config, probe.shape, CLASSES, seed=0), "none")
    cost = count_cost(parts, probe.shape)
    flops = np.array([probe.batch * sum(cost.weighted(_only(kind))["shared"]) for kind in KINDS])
    rng, one = stream(0, "batch"), ragged([np.arange(probe.batch)])
    inputs, labels = (
        rng.standard_normal((probe.batch, *probe.shape), np.float32),
        rng.integers(CLASSES, size=probe.batch),
    )
    learner = Learner(
        0, experiment.training, parts, inputs, labels, 1.0, (0.0,), (1.0,), one, one, no_channels(parts)
    )  # fmt: skip
    steps = 1 if flops.sum() > LARGE else STEPS
    phase = LocalPhase("shared", steps * probe.batch, probe.batch)
    shared, personal = parts.shared.numpy().copy(), parts.personal.numpy().copy()
    task = Task("calibration", 0, 0, shared, personal, Whole(), (phase,), may_diverge=True)
    return Timed(probe, flops, _median_s(lambda: train(learner, task), turns) / steps)


def _only(kind: str) -> dict[str, float]:
    """Returns the scales that count one kind of layer alone; what elementwise work counts goes with the convolutions."""
    return {
        other: float(other == kind or (other, kind) == ("elementwise", "conv")) for other in (*KINDS, "elementwise")
    }


def _median_s(call: Callable[[], object], turns: int) -> float:
    """Returns the median seconds of calls after a first one: at most `turns`, no further one after LONGEST_S.

    They are the processor's: on one thread of an undisturbed machine those of the clock, on a busy one without the others' work.
    """
    call()
    taken = list[float]()
    while len(taken) < turns and sum(taken) < LONGEST_S:
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def table(by_kind: ByKind) -> Table:
    """Returns the held-out models for the terminal."""
    headers = ["model", "batch", "measured ms", "by kind ms", "off by", "one figure off by", "MFLOP"]
    rows = [
        [
            str(row["model"]), str(row["batch"]), *(f"{1e3 * float(row[key]):.3g}" for key in ("measured_s", "modelled_s")),
            *(f"{100 * float(row[key]):+.0f} %" for key in ("error", "one_figure_error")), f"{float(row['flops']) / 1e6:.4g}",
        ]
        for row in by_kind.rows
    ]  # fmt: skip
    return Table.of("step times by kind of layer", headers, rows, elsewhere="in --json")
