"""What fedprune costs, measured against bare references in the same run, and the comparison with an earlier measurement.

Machines differ and are shared, so a measured time is never reported alone: it is a ratio to a reference that does the same
work and takes turns with it. Modelled figures (bits, FLOPs, simulated seconds) are reproducible and reported as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedprune_cli.allocate.kkt import solve_p1
from fedprune_cli.allocate.problem import Problem, dense_deadline, kept_fraction, rate
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.errors import CertificateError, ConfigError, DeviceError, RegressionError, unknown
from fedprune_cli.execute import Execution, Executor, executor
from fedprune_cli.rng import stream
from fedprune_cli.round.all import Record, Setup, build_learner, build_parts, participants, plan, prepare, round_step
from fedprune_cli.store.files import MAX_JSON_BYTES, parse_json, read_bytes
from fedprune_cli.store.folder import writing
from fedprune_cli.store.state import Array, State
from fedprune_cli.terminal import Table
from fedprune_cli.world.datasets import Dataset

SCHEMA = 1
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


# --- training rounds against bare loops -----------------------------------------------------------------------------


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
    images = torch.from_numpy(dataset.images).float().div_(dataset.scale).sub_(mean).div_(std)
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


def broadcast_params(setup: Setup, state: State) -> list[Tensor]:
    """Returns the state's global parameters in the model's order."""
    parts = build_parts(setup.experiment, setup.scenario)
    parts.shared.copy_(torch.from_numpy(state.shared))
    return [param.detach().clone() for param in parts.shared_params]


def round_samples(setup: Setup, number: int) -> tuple[list[Array], list[float]]:
    """Returns, for each device of round `number`, its samples in the order of its batches, and its share of the mean."""
    experiment, train = setup.experiment, setup.scenario.partition.train
    ids = participants(setup, setup.scenario.at(number), number, setup.initial.slots).tolist()
    samples = []
    for device in ids:
        # the personal phase has nothing to train, and its batches another stream
        phase, steps = next((i, phase.steps) for i, phase in enumerate(plan(setup, device)) if phase.kind == "shared")
        own, count = train[device], steps * experiment.training.batch_size
        rng = stream(experiment.seed, "batch", number, device, phase)
        order = np.concatenate([rng.permutation(len(own)) for _ in range(math.ceil(count / len(own)))])
        samples.append(own[order[:count]])
    sizes = [len(train[device]) for device in ids]
    return samples, [size / sum(sizes) for size in sizes]


@dataclass(frozen=True)
class Turns:
    """Rounds of fedprune and of a bare loop that took turns: seconds and samples of each, and round 1's record.

    Round 1 is the warm-up: it is not timed, and its record is the same however many rounds follow.
    """

    ours_s: list[float]
    bare_s: list[float]
    samples: list[int]
    first: Record


def take_turns(
    setup: Setup, workers: Executor, bare: Callable[[Sequence[Tensor], Sequence[Array], Sequence[float]], object],
    repeats: int, clock: Callable[[], float],
) -> Turns:  # fmt: skip
    """Returns `repeats` rounds of both, after one that warms both up."""
    ours_s, bare_s, samples, records = [], [], [], []
    state = setup.initial
    for number in range(repeats + 1):
        start, (work, weights) = broadcast_params(setup, state), round_samples(setup, number)
        began = clock()
        state, record = round_step(setup, state, workers)
        ours_s.append(clock() - began)
        bare_s.append(seconds(functools.partial(bare, start, work, weights), clock))
        samples.append(sum(map(len, work)))
        records.append(record)
    return Turns(ours_s[1:], bare_s[1:], samples[1:], records[0])


def fedavg_setup(*overrides: str) -> Setup:
    """Returns the setup of FedAvg on Fashion-MNIST, Dirichlet 0.3, one local epoch; nothing is tested."""
    return prepare(build_experiment(compose_config([*COMMON, "method=fedavg", *overrides])))


COMMON = (
    "data=fmnist", "devices.fresh=0", "partition.alpha=0.3", "training.epochs=1", "training.lr=0.05",
    "rounds=1000", "evaluation.every=1000", "execution.kind=serial",
)  # fmt: skip
CNN = ("model=cnn", "training.batch_size=32", "devices.count=100")
MLP = ("model=mlp", "model.hidden=[64]", "training.batch_size=10", "devices.count=1000")


def cpu_efficiency(name: str, setup: Setup, model: nn.Module, loop: BareRound, repeats: int) -> tuple[Measure, Turns]:
    """Returns samples per CPU second of serial rounds as a ratio to a bare loop on one thread, and the turns."""
    training = setup.experiment.training
    with executor(
        setup.experiment.execution, functools.partial(build_learner, setup.experiment, setup.scenario)
    ) as workers:
        data = bare_data(setup.scenario.dataset, training.batch_size, training.lr)
        turns = take_turns(setup, workers, functools.partial(loop, model, data), repeats, time.process_time)
    figure = statistics.median(n / s for n, s in zip(turns.samples, turns.bare_s, strict=True))
    # the samples are the same on both sides, so that the ratio of the rates is that of the seconds, turned over
    return ratio(f"{name}/samples_per_cpu_s", "x bare", "larger", turns.bare_s, turns.ours_s, figure), turns


def modelled(name: str, record: Record) -> tuple[Measure, ...]:
    """Returns a round's modelled figures; its seconds are simulated ones."""
    return (
        exact(f"{name}/flops", "FLOP", record["flops"]),
        exact(f"{name}/bits_up", "bit", 8 * record["bytes_up"]),
        exact(f"{name}/simulated_s", "s", record["latency_s"]),
    )


def scene(base: Sequence[str], effort: Effort) -> tuple[str, ...]:
    """Returns the overrides of a scene of 100 or 1000 devices; a tenth of them takes part in a round, or 1 in 50 for a quick one."""
    return (*base, f"devices.per_round={int(base[-1].split('=')[1]) // (50 if effort.quick else 10)}")


def t1(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Measures the CNN with 10 of 100 devices a round: serial CPU seconds, wall seconds of two workers, modelled figures."""
    setup = fedavg_setup(*scene(CNN, effort))
    efficiency, turns = cpu_efficiency("t1", setup, bare_cnn(), tuned_round, effort.repeats)
    measures = (efficiency, *modelled("t1", turns.first))
    if (cores := available_cores()) < 2:
        say(f"t1/wall_2_workers: not measured, it needs 2 cores and there is {cores}")
        return measures
    build = functools.partial(build_learner, setup.experiment, setup.scenario)
    with executor(Execution("processes", 2), build) as workers, bare_workers(setup, 2) as bare:
        turns = take_turns(setup, workers, bare, effort.repeats, time.perf_counter)
    figure = statistics.median(turns.bare_s)
    wall = ratio("t1/wall_2_workers", "x bare", "smaller", turns.ours_s, turns.bare_s, figure)
    return (efficiency, wall, *measures[1:])


def t2(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Measures many small steps: the MLP with 100 of 1000 devices a round against a plain loop over the devices."""
    efficiency, turns = cpu_efficiency("t2", fedavg_setup(*scene(MLP, effort)), bare_mlp(), plain_round, effort.repeats)
    return (efficiency, *modelled("t2", turns.first))


def t3(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Measures what pruning whole channels saves: rounds of t1's scene at fixed ratios, in turns with the dense round."""
    ratios = (0.0, 0.5, 0.75, 0.9)
    common = ("method=proposed", "allocator=fixed", "pruner.granularity=channel", "pruner.max_ratio=0.95")
    chosen = [
        build_experiment(compose_config([*COMMON, *scene(CNN, effort), *common, f"allocator.ratio={value}"]))
        for value in ratios
    ]
    setup = prepare(chosen[0])
    setups = [replace(setup, experiment=experiment) for experiment in chosen]
    states, records, wall_s = [setup.initial for _ in setups], [], []
    with executor(chosen[0].execution, functools.partial(build_learner, chosen[0], setup.scenario)) as workers:
        for _ in range(effort.repeats + 1):
            for at, one in enumerate(setups):
                began = time.perf_counter()
                states[at], record = round_step(one, states[at], workers)
                wall_s.append(time.perf_counter() - began)
                records.append(record)
    dense_s = wall_s[len(ratios) :: len(ratios)]  # round 1 warms up
    measures: list[Measure] = []
    for at, value in enumerate(ratios):
        name, own_s = f"t3/ratio_{value:g}", wall_s[len(ratios) + at :: len(ratios)]
        if value:
            figure = statistics.median(dense_s)
            measures.append(ratio(f"{name}/wall", "x dense", "smaller", own_s, dense_s, figure))
        measures += modelled(name, records[at])[:2]
    return tuple(measures)


# --- the bare loop in processes -------------------------------------------------------------------------------------


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


# --- the allocator and the command line -----------------------------------------------------------------------------


def literature_problem(count: int, fraction: float = 0.1) -> Problem:
    """Returns `count` devices in a 500 m disk with Rayleigh fading, 20 MHz, at a fraction of their dense optimum."""
    rng = stream(0, "fleet", count)
    distance_km = np.sqrt(rng.uniform(0.02**2, 0.5**2, count))
    loss_db = 128.1 + 37.6 * np.log10(distance_km) + 8 * rng.normal(size=count)
    snr_hz = 10 ** ((23 - 30 - loss_db + 174 + 30) / 10) * rng.exponential(size=count)
    problem = Problem(
        rng.uniform(0.5, 2, count), np.full(count, 1e7), rng.uniform(0.01, 0.1, count), snr_hz,
        np.full(count, 1 / count), np.full(count, 0.95), 20e6, np.inf,
    )  # fmt: skip
    return replace(problem, deadline_s=fraction * dense_deadline(problem)[0])


def allocator(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Measures the exact solution of P1: against Clarabel's own solve time, and how its time grows with the devices."""
    return (*_against_clarabel(effort), *_growth(effort, say))


def _against_clarabel(effort: Effort) -> tuple[Measure, ...]:
    """cvxpy's compilation, many times the solve, is left out: the reference is the conic solver at its best."""
    from fedprune_cli.allocate.reference import clarabel, clarabel_alone, dcp_p1

    problem = literature_problem(1000)
    bandwidth_hz, _ = solve_p1(problem)
    kept = np.minimum(1.0, kept_fraction(problem, rate(bandwidth_hz, problem.snr_hz)))
    objective = float(problem.weight @ kept)
    solution, x, _ = dcp_p1(problem, problem.bandwidth_hz / len(problem.weight))
    clarabel(solution)
    if abs(float(problem.weight @ x.value) - objective) > 1e-6 * objective:
        raise CertificateError(f"bench: P1 is {objective} and Clarabel finds {float(problem.weight @ x.value)}")
    alone = clarabel_alone(solution)
    turns = [(_solve_s(problem), seconds(alone, time.process_time)) for _ in range(2 + effort.repeats)]
    ours_s, solver_s = zip(*turns, strict=True)
    figure = statistics.median(solver_s)
    return (
        ratio("allocator/p1_vs_clarabel", "x Clarabel", "smaller", ours_s, solver_s, figure),
        exact("allocator/objective", "sum w x", objective, "larger"),
    )


def _growth(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """The time a device at each K as a ratio to that at K=1000, and the exponent e of the fit time = c (K log K)^e."""
    sizes = [10**power for power in (range(3, 6) if effort.quick else range(3, 7))]
    problems = [literature_problem(size) for size in sizes]
    for problem in problems[:2]:
        solve_p1(problem)
    # the sizes take turns, so that a busy spell of the machine meets them all; small ones are solved many times in each
    turns = [[_solve_s(problem) for problem in problems] for _ in range(2 + effort.repeats)]
    device_s = [[turn[at] / size for turn in turns] for at, size in enumerate(sizes)]
    work = np.log([size * math.log(size) for size in sizes])
    exponents = [float(np.polyfit(work, np.log(turn), 1)[0]) for turn in turns]
    for size, values in zip(sizes, device_s, strict=True):
        say(f"allocator: K=1e{round(math.log10(size))}: {statistics.median(values):.3g} s a device")
    say(f"allocator: time grows as (K log K)^{statistics.median(exponents):.3f}")
    growth = [
        ratio(
            f"allocator/device_s_1e{round(math.log10(size))}", "x K=1000", "smaller",
            values, device_s[0], statistics.median(device_s[0]),
        )
        for size, values in zip(sizes[1:], device_s[1:], strict=True)
    ]  # fmt: skip
    ones = [1.0] * len(exponents)
    return (*growth, ratio("allocator/exponent", "of K log K", "smaller", exponents, ones, 1.0))


def _solve_s(problem: Problem) -> float:
    """Returns the CPU seconds of one solution, the mean of as many as 50,000 devices make: what else runs matters less to them."""
    count = max(1, 50_000 // len(problem.weight))
    return seconds(lambda: [solve_p1(problem) for _ in range(count)], time.process_time) / count


def startup(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Measures `fedprune --help` against the import of the library that draws it."""
    commands = [sys.executable, "-m", "fedprune_cli", "--help"], [sys.executable, "-c", "import typer"]
    run = functools.partial(subprocess.run, stdout=subprocess.DEVNULL, check=True)
    count = 1 + effort.repeats * (1 if effort.quick else 2)
    turns = [[seconds(functools.partial(run, command)) for command in commands] for _ in range(count)]
    ours_s, bare_s = zip(*turns[1:], strict=True)  # the first turn fills the file cache
    return (ratio("startup/help", "x typer", "smaller", ours_s, bare_s, statistics.median(bare_s)),)


TASKS: dict[str, Task] = {"t1": t1, "t2": t2, "t3": t3, "allocator": allocator, "startup": startup}


# --- what comes in and goes out -------------------------------------------------------------------------------------


def choose(names: str) -> list[str]:
    """Returns the tasks in a comma-separated list, each once; raises ConfigError for one that does not exist."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in TASKS:
            raise unknown("task", name, TASKS)
    return chosen


def parse_share(option: str, text: str) -> float:
    """Returns 0.15 for `15%` and for `0.15`; raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(%?)", text.strip())
    value = math.inf if not found else float(found[1]) / (100 if found[2] else 1)
    # a bare 15 would be 1500 %, which nobody means
    if not found or not math.isfinite(value) or (not found[2] and value > 10):
        raise ConfigError(f"{option} {text}: must be a percentage such as 15% or a fraction such as 0.15")
    return value


def parse_limits(exact_limit: str, wall_limit: str) -> dict[Kind, float]:
    """Returns how much worse each kind of measure may be, as fractions; raises ConfigError."""
    return {
        "exact": parse_share("--max-regression", exact_limit),
        "wall": parse_share("--max-wall-regression", wall_limit),
    }


def available_cores() -> int:
    """Returns the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Returns what the measures were taken on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = found[1].strip() if found else cpu
    return {"cpu": cpu, "cores": available_cores(), "python": platform.python_version(), "torch": version("torch")}


def to_json(measures: Sequence[Measure], quick: bool) -> dict[str, Any]:
    """Returns the measures and the machine as one JSON object."""
    entries = [dataclasses.asdict(measure) for measure in measures]
    return {"schema": SCHEMA, "machine": machine(), "quick": quick, "measures": entries}


def action_entries(measures: Sequence[Measure], better: Better) -> list[dict[str, Any]]:
    """Returns the measures of one direction in github-action-benchmark's custom format."""
    return [
        {"name": m.name, "unit": m.unit, "value": m.value, "range": f"{m.spread:.3g}",
         "extra": m.kind if m.bare is None else f"{m.kind}; bare reference: {m.bare:.6g}"}
        for m in measures if m.better == better
    ]  # fmt: skip


def make_folder(out: Path) -> None:
    """Makes the folder for the results, before minutes of measuring; raises OutputError."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)


def write(out: Path, measures: Sequence[Measure], quick: bool) -> None:
    """Writes bench.json, bench-smaller.json and bench-larger.json into a folder; raises OutputError."""
    contents: dict[str, Any] = {"bench.json": to_json(measures, quick)}
    contents |= {f"bench-{better}.json": action_entries(measures, better) for better in get_args(Better)}
    with writing(out):
        for name, content in contents.items():
            (out / name).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_baseline(path: Path, tasks: Sequence[str], quick: bool) -> tuple[Measure, ...]:
    """Returns the measures of the `tasks` in a bench.json; raises ConfigError saying what is wrong with it."""
    try:
        content = parse_json(read_bytes(path, MAX_JSON_BYTES, ConfigError))
    except ConfigError as error:
        raise ConfigError(f"--baseline {error}") from None
    except ValueError:
        raise ConfigError(f"--baseline {path}: not JSON") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ConfigError(f"--baseline {path}: not a bench.json of schema {SCHEMA}")
    if content.get("quick", quick) != quick:  # its rounds have other devices, its allocator other sizes
        raise ConfigError(f"--baseline {path}: was measured {'without' if quick else 'with'} --quick")
    entries = content.get("measures")
    if not isinstance(entries, list) or not all(map(_is_measure, entries)):
        raise ConfigError(f"--baseline {path}: its measures are damaged")
    measures = tuple(Measure(**entry) for entry in entries if entry["name"].split("/")[0] in tasks)
    if not measures:
        raise ConfigError(f"--baseline {path}: has no measure of {', '.join(tasks)}")
    return measures


def _is_measure(entry: object) -> bool:
    """Whether a JSON value has a measure's keys and types."""
    if not isinstance(entry, dict) or set(entry) != {field.name for field in dataclasses.fields(Measure)}:
        return False
    words = isinstance(entry["name"], str) and isinstance(entry["unit"], str)
    numbers = [entry["value"], entry["spread"], *([] if entry["bare"] is None else [entry["bare"]])]
    finite = all(type(n) in (int, float) and abs(n) <= sys.float_info.max for n in numbers)
    return words and finite and entry["better"] in get_args(Better) and entry["kind"] in get_args(Kind)


# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """A measure that is worse than the baseline's by more than its limit; value and change are None when it is gone."""

    name: str
    baseline: float
    value: float | None
    change: float | None
    limit: float

    def __str__(self) -> str:
        if self.value is None or self.change is None:
            return f"{self.name}: {self.baseline:.6g} in the baseline, not measured now"
        return f"{self.name}: {self.baseline:.6g} -> {self.value:.6g}, {100 * self.change:.1f} % worse (limit {100 * self.limit:g} %)"


def worsening(measure: Measure, baseline: float) -> float:
    """Returns by which share the measure is worse than the baseline, 1 for twice as slow or half as fast; < 0 when better."""
    before, now = (baseline, measure.value) if measure.better == "smaller" else (measure.value, baseline)
    if before == now:
        return 0.0
    return now / before - 1 if before > 0 else math.copysign(math.inf, now - before)


def regressions(
    measures: Sequence[Measure], baseline: Sequence[Measure], limits: Mapping[Kind, float]
) -> tuple[Regression, ...]:
    """Returns the baseline's measures that are now worse by more than their kind's limit, or gone."""
    now = {measure.name: measure for measure in measures}
    found = []
    for old in baseline:
        new = now.get(old.name)
        limit = limits[(new or old).kind]
        change = None if new is None else worsening(new, old.value)
        if change is None or change > limit:
            found.append(Regression(old.name, old.value, new.value if new else None, change, limit))
    return tuple(found)


def check(found: Sequence[Regression], path: Path) -> None:
    """Raises RegressionError naming the measures that regressed, if any."""
    if found:
        names = ", ".join(regression.name for regression in found)
        raise RegressionError(f"{len(found)} {'measure' if len(found) == 1 else 'measures'} worse than {path}: {names}")


def table(measures: Sequence[Measure]) -> Table:
    """Returns the measures for the terminal."""
    headers = ["task", "measure", "value", "unit", "spread", "bare"]
    rows = [
        [
            *m.name.split("/", 1), f"{m.value:.4g}", m.unit, "exact" if m.kind == "exact" else f"{m.spread:.2g}",
            "-" if m.bare is None else f"{m.bare:.4g}",
        ]
        for m in measures
    ]  # fmt: skip
    return Table.of("bench", headers, rows, folding=["measure", "unit"], elsewhere="in --json")
