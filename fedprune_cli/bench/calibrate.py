"""This machine's real step time at several ratios, and how well the latency model predicts it. All wall time, on one thread.

The model says t = cycles_per_flop FLOPs / f (model.md, section 3): a line through the origin. Only the quotient
cycles_per_flop / f can be measured; the clock is given, and decides how it is split.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedprune_cli.bench.machine import Machine
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.config.words import parse_numbers
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.client import Learner, Task, train
from fedprune_cli.learn.kept import Entries, Kept, Whole
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.prune import build_masks
from fedprune_cli.learn.schedule import by_steps
from fedprune_cli.report import figures
from fedprune_cli.round.setup import Setup, build_learner, prepare
from fedprune_cli.store import folder
from fedprune_cli.store.files import Plain
from fedprune_cli.store.state import Array
from fedprune_cli.terminal import Table

STEPS = 5  # of a timed call


@dataclass(frozen=True)
class Point:
    """One ratio's step: what the slice has, what it takes, and what the model says.

    kept: fraction of u; flops: of a step on a batch; saved_bytes: what autograd keeps for the backward pass; measured_s: median,
    low_s and high_s over the turns; modelled_s: by the fitted constant; masked_s: the same ratio with masks, which save no time.
    """

    ratio: float
    kept: float
    flops: float
    param_bytes: int
    saved_bytes: int
    measured_s: float
    low_s: float
    high_s: float
    modelled_s: float
    masked_s: float

    @property
    def error(self) -> float:
        """How far the model is off, as a share of the measured time."""
        return self.modelled_s / self.measured_s - 1


@dataclass(frozen=True)
class Calibration:
    """The measured points and the fitted constants: cycles_per_flop at the clock cpu_hz, of the model's line through the origin.

    fixed_s, line_error: a step's fixed cost in the best line that may have one, and how far that line is off at worst.
    """

    model: str
    cpu_hz: float
    cycles_per_flop: float
    fixed_s: float
    line_error: float
    points: tuple[Point, ...]

    def sentence(self) -> str:
        """Says what the model lacks."""
        worst = max(abs(point.error) for point in self.points)
        return (
            f"The model, which has no fixed cost per step, is off by up to {100 * worst:.0f} %; a line with {1e3 * self.fixed_s:.3g} ms "
            f"per step fixed, by up to {100 * self.line_error:.0f} %."
        )


def calibrate(experiment: Experiment, ratios: Sequence[float], turns: int, cpu_hz: float) -> Calibration:
    """Returns the calibration of the experiment's model and batch size; raises ConfigError when its channels cannot be left out.

    experiment: with pruner.granularity=channel. The ratios take turns, so that a busy spell of the machine meets them all.
    """
    setup = prepare(experiment)
    blueprint = setup.blueprint
    if not blueprint.layout.slices:
        raise ConfigError(
            f"calibrate: method {experiment.method.name!r} never prunes; choose one that does, such as method=proposed"
        )
    torch.set_num_threads(1)
    learner = build_learner(experiment, setup.scenario)
    state = setup.initial
    masks = build_masks(experiment.pruner, state, np.array(ratios), experiment.seed, blueprint.layout)
    slices = [_task(setup, masks.kept_by(at)) for at in range(len(ratios))]
    masked = [
        _task(setup, Whole() if masks[at].all() else Entries(np.packbits(masks[at]))) for at in range(len(ratios))
    ]
    seconds = [[_step_s(learner, task) for task in (*slices, *masked)] for _ in range(turns + 1)][1:]
    columns = list(zip(*seconds, strict=True))
    costs = [
        blueprint.cost.sliced(blueprint.layout.kept_params(masks.kept_units(at))) if masks.units else blueprint.cost
        for at in range(len(ratios))
    ]
    batch = slices[0].schedule[0].batch
    flops = [batch * sum(cost.flops["both"]) for cost in costs]
    measured = [statistics.median(column) for column in columns]
    # every ratio counts the same: the median of its seconds per FLOP
    seconds_per_flop = statistics.median(s / f for s, f in zip(measured[: len(ratios)], flops, strict=True))
    points = []
    for at, ratio in enumerate(ratios):
        kept = (
            blueprint.layout.kept_params(masks.kept_units(at)) if masks.units else np.ones(len(blueprint.layout.shapes))
        )
        sizes = [int(np.prod(shape)) for shape in blueprint.layout.shapes.values()]
        points.append(
            Point(
                ratio, float(masks[at].mean()), flops[at], 4 * round(float(kept @ sizes)), _saved_bytes(learner, slices[at]),
                measured[at], min(columns[at]), max(columns[at]), seconds_per_flop * flops[at], measured[len(ratios) + at],
            )
        )  # fmt: skip
    fixed_s, line_error = _line(np.array(flops), np.array(measured[: len(ratios)]))
    return Calibration(experiment.model.name, cpu_hz, seconds_per_flop * cpu_hz, fixed_s, line_error, tuple(points))


def _line(flops: Array, seconds: Array) -> tuple[float, float]:
    """Returns the fixed seconds of the line of least relative squares, and its largest relative error."""
    columns = np.stack([1 / seconds, flops / seconds / flops.max()], axis=1)
    fit, *_ = np.linalg.lstsq(columns, np.ones(len(flops)))
    return float(fit[0]), float(np.abs(columns @ fit - 1).max())


def _task(setup: Setup, kept: Kept) -> Task:
    """Returns steps on both parts for the device with the most samples."""
    sizes = setup.scenario.partition.train.sizes
    device, batch_size = int(np.argmax(sizes)), setup.experiment.training.batch_size
    schedule = by_steps((Phase("both", STEPS),), int(sizes[device]), batch_size)
    return Task("calibration", 0, device, setup.initial.shared, setup.initial.personal[0], kept, schedule)


def _step_s(learner: Learner, task: Task) -> float:
    started = time.perf_counter()
    train(learner, task)
    return (time.perf_counter() - started) / STEPS


def _saved_bytes(learner: Learner, task: Task) -> int:
    """Returns the bytes that autograd saves in a forward pass of one batch, each storage once."""
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        one = replace(task.schedule[0], samples=task.schedule[0].batch)
        train(learner, replace(task, schedule=(one,)))
    return sum(saved.values())


def clock_hz() -> float:
    """Returns this machine's clock as the system names it; raises ConfigError when it does not."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return float(found[1]) * 1e6
    raise ConfigError("this system does not say its clock: give --cpu-ghz")


def parse_ratios(text: str) -> list[float]:
    """Returns the ratios of a comma-separated list in ascending order; raises ConfigError."""
    return sorted(parse_numbers(text, "--ratios", lambda ratio: 0 <= ratio < 1, "in [0, 1)"))


def fleet_yaml(calibration: Calibration) -> str:
    """Returns a `devices` choice of 20 devices like this machine."""
    ghz, cycles = calibration.cpu_hz / 1e9, calibration.cycles_per_flop
    return (
        f"# Devices like the machine that `fedprune calibrate` measured with model={calibration.model}.\n"
        "name: sampled\ncount: 20\nper_round: null\nfresh: 2\n"
        f"min_cpu_ghz: {ghz:.6g}\nmax_cpu_ghz: {ghz:.6g}\nmin_cycles_per_flop: {cycles:.6g}\nmax_cycles_per_flop: {cycles:.6g}\n"
        "tx_power_dbm: 23\nmin_distance_km: 0.02\nradius_km: 0.5\nenergy_coefficient: 1.0e-28\nenergy_budget_j: null\n"
        "min_bandwidth_mhz: 0\nmax_bandwidth_mhz: null\n"
    )


def point_rows(calibration: Calibration) -> list[dict[str, float]]:
    """Returns the points by key, each with the model's error."""
    return [asdict(point) | {"error": point.error} for point in calibration.points]


def to_json(calibration: Calibration, machine: Machine | None) -> dict[str, object]:
    """Returns the calibration as one JSON object, with the machine as a class where that was measured."""
    of_machine = None if machine is None else machine.as_json()
    return asdict(calibration) | {"points": point_rows(calibration), "by_kind": of_machine}


def write(out: Path, calibration: Calibration, machine: Machine | None, fleet: Mapping[str, Plain]) -> None:
    """Writes calibration.json and .svg, and devices/calibrated.yaml for `--config-dir`; raises OutputError.

    With a machine also devices/CLASS.yaml: `fleet`, the keys of a fleet of real devices, with the machine among its classes.
    """
    with folder.writing(out):
        (out / "devices").mkdir(parents=True, exist_ok=True)
        (out / "calibration.json").write_text(json.dumps(to_json(calibration, machine), indent=1) + "\n")
        (out / "calibration.svg").write_text(figures.calibration_figure(point_rows(calibration)).svg())
        (out / "devices" / "calibrated.yaml").write_text(fleet_yaml(calibration))
        if machine is not None:
            (out / "devices" / f"{machine.name}.yaml").write_text(machine.fleet_yaml(fleet))


def table(calibration: Calibration) -> Table:
    """Returns the calibration for the terminal."""
    title = f"{calibration.model}: {calibration.cycles_per_flop:.3g} cycles per FLOP at {calibration.cpu_hz / 1e9:.3g} GHz, one thread"
    headers = [
        "ratio",
        "measured ms",
        "modelled ms",
        "off by",
        "masks only ms",
        "kept",
        "MFLOP",
        "weights kB",
        "saved kB",
    ]
    rows = [
        [
            f"{p.ratio:g}", f"{1e3 * p.measured_s:.3g}", f"{1e3 * p.modelled_s:.3g}", f"{100 * p.error:+.0f} %", f"{1e3 * p.masked_s:.3g}",
            f"{p.kept:.3f}", f"{p.flops / 1e6:.4g}", f"{p.param_bytes / 1e3:.4g}", f"{p.saved_bytes / 1e3:.4g}",
        ]
        for p in calibration.points
    ]  # fmt: skip
    return Table.of(title, headers, rows, elsewhere="in --json")
