"""Training rounds measured: against bare loops on the same batches, and pruned channels against the dense round."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedprune_cli.bench.bare import BareRound, bare_cnn, bare_data, bare_mlp, bare_workers, plain_round, tuned_round
from fedprune_cli.bench.measure import Effort, Measure, Say, available_cores, exact, ratio, seconds
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.execute import Execution, Executor, executor
from fedprune_cli.rng import stream
from fedprune_cli.round.roster import choose_roster
from fedprune_cli.round.setup import Setup, build_learner, build_parts, prepare
from fedprune_cli.round.step import round_step
from fedprune_cli.store.record import RoundRecord
from fedprune_cli.store.state import Array, State


def broadcast_params(setup: Setup, state: State) -> list[Tensor]:
    """Returns the state's global parameters in the model's order."""
    parts = build_parts(setup.experiment, setup.scenario)
    parts.shared.copy_(torch.from_numpy(state.shared))
    return [param.detach().clone() for param in parts.shared_params]


def round_samples(setup: Setup, number: int) -> tuple[list[Array], list[float]]:
    """Returns, for each device of round `number`, its samples in the order of its batches, and its share of the mean."""
    experiment, train = setup.experiment, setup.scenario.partition.train
    ids = choose_roster(setup, number, setup.initial.slots).training.tolist()
    samples = []
    for device in ids:
        # the personal phase has nothing to train, and its batches another stream
        phase, count = next(
            (i, phase.samples) for i, phase in enumerate(setup.schedule(device)) if phase.kind == "shared"
        )
        own = train[device]
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
    first: RoundRecord


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
    return prepare(build_experiment(compose_config([*FEDAVG_SCENE, "method=fedavg", *overrides])))


FEDAVG_SCENE = (
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


def modelled(name: str, record: RoundRecord) -> tuple[Measure, ...]:
    """Returns a round's modelled figures; its seconds are simulated ones."""
    return (
        exact(f"{name}/flops", "FLOP", record.flops),
        exact(f"{name}/bits_up", "bit", 8 * record.bytes_up),
        exact(f"{name}/simulated_s", "s", record.latency_s),
    )


def scene(base: Sequence[str], effort: Effort) -> tuple[str, ...]:
    """Returns the overrides of a scene of 100 or 1000 devices; a tenth of them takes part in a round, or 1 in 50 for a quick one."""
    return (*base, f"devices.per_round={int(base[-1].split('=')[1]) // (50 if effort.quick else 10)}")


def measure_cnn_rounds(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Measures the CNN with 10 of 100 devices per round: serial CPU seconds, wall seconds of two workers, modelled figures."""
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


def measure_mlp_rounds(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Measures many small steps: the MLP with 100 of 1000 devices per round against a plain loop over the devices."""
    efficiency, turns = cpu_efficiency("t2", fedavg_setup(*scene(MLP, effort)), bare_mlp(), plain_round, effort.repeats)
    return (efficiency, *modelled("t2", turns.first))


def measure_channel_pruning(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Measures what pruning whole channels saves: rounds of the CNN's scene at fixed ratios, in turns with the dense round."""
    ratios = (0.0, 0.5, 0.75, 0.9)
    pruned = ("method=proposed", "allocator=fixed", "pruner.granularity=channel", "pruner.max_ratio=0.95")
    chosen = [
        build_experiment(compose_config([*FEDAVG_SCENE, *scene(CNN, effort), *pruned, f"allocator.ratio={value}"]))
        for value in ratios
    ]
    setup = prepare(chosen[0])
    setups = [replace(setup, blueprint=replace(setup.blueprint, experiment=experiment)) for experiment in chosen]
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
