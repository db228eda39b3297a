"""THE PAGE TO READ FIRST: a round is allocate, prune, train, aggregate, meter, record."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from fedprune_cli.allocate.problem import Allocation, Problem, dense_deadline, latency, rate
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import branch_config
from fedprune_cli.config.experiment import Branch, Experiment
from fedprune_cli.errors import CheckpointError, ConfigError, FedpruneError
from fedprune_cli.execute import Executor, executor, ready
from fedprune_cli.learn.batched import batches, blocks, train_block
from fedprune_cli.learn.client import Learner, Score, Unit, Update, evaluate, train
from fedprune_cli.learn.cost import ModelCost, count_cost
from fedprune_cli.learn.models import build_model
from fedprune_cli.learn.parts import Parts, split_model, to_device
from fedprune_cli.learn.personalize import Phase, personal_only
from fedprune_cli.learn.prune import Masks, build_masks, least_kept
from fedprune_cli.learn.structured import Layout, find_channels
from fedprune_cli.meter import Load, Measurement, accuracies, build_load, build_problem, compress, downlink_s, measure
from fedprune_cli.rng import stream
from fedprune_cli.serve.failsafe import KINDS, Arrival, Log, cautious, deliver, diverged, quarantined, undone
from fedprune_cli.store import folder
from fedprune_cli.store.files import read_json, read_yaml
from fedprune_cli.store.state import Array, State, same_form, untrained
from fedprune_cli.track import check, following
from fedprune_cli.wire.masks import encode_mask
from fedprune_cli.wire.quantize import BITS_PER_PARAM, bits_per_value, levels
from fedprune_cli.world.scenario import Conditions, Scenario, build_scenario

Record = dict[str, Any]
FIRST_ROUNDING = 10.0  # omega_q L^2 before any is measured: what rounding a Gaussian block costs


@dataclass(frozen=True)
class Setup:
    """What all rounds share: the experiment, its world, the model's counted cost and the state before round 1.

    layout: where the model's channels lie, when devices leave whole ones out; batched: whether devices train side by side.
    """

    experiment: Experiment
    scenario: Scenario
    cost: ModelCost
    initial: State
    layout: Layout | None
    batched: bool

    @property
    def max_ratio(self) -> float:
        """The most a device may drop: rho_max, or what the smallest slice of the model leaves."""
        most = self.experiment.pruner.max_ratio
        return most if self.layout is None else min(most, 1 - least_kept(self.layout))


def round_step(setup: Setup, state: State, workers: Executor) -> tuple[State, Record]:
    """Returns the state after one more round, and the round's record: every figure modelled, none of them wall time."""
    experiment, scenario = setup.experiment, setup.scenario
    radio = scenario.at(state.round)
    ids, frozen = participants(setup, radio, state.round, state.slots), frozen_devices(setup, radio, state.slots)
    if not len(ids):
        return idle_round(setup, state, radio, frozen, workers)

    believed, gain = estimate(setup, radio.gain_linear, state.round)
    problems = round_problems(believed, ids, gain[ids], state.round, state.slots)
    bits, allocation = allocate(experiment, problems, state.round, state.slots)
    taking = np.flatnonzero(allocation.admitted)
    devices = ids[taking]

    prune_ratio = state.slots["prune_ratio"].copy()
    prune_ratio[devices] = allocation.prune_ratio[taking]
    masks = build_masks(experiment.pruner, state, prune_ratio, experiment.seed, setup.layout)
    errors = pruning_errors(state, masks, np.concatenate([devices, frozen]))

    units = [train_unit(setup, state, masks, device, bits) for device in devices.tolist()]
    fates = experiment.faults.draw(experiment.seed, state.round, experiment.rounds, scenario.num_devices, devices)
    trained = zip(train_devices(setup, workers, units), units, fates.died, strict=True)
    updates = [undone(update, unit) if died else update for update, unit, died in trained]
    problems, allocation = as_it_was(setup, believed, problems, allocation, ids, radio, state)
    measured = measure_round(setup, problems.load, allocation, masks, updates, radio.gain_linear[ids])
    measured = measured.cut_short(fates.work, scenario.fleet.tx_power_w[devices])
    delivery = deliver(
        experiment.faults, experiment.failsafe, experiment.seed, state, masks, updates, fates,
        measured.latency_s, allocation.deadline_s,
    )  # fmt: skip
    shared, gradient = server_step(setup, state, delivery.arrivals)
    own = train_devices(setup, workers, [frozen_unit(setup, state, masks, device) for device in frozen.tolist()])
    personal = state.personal.replaced({update.device: update.personal for update in [*updates, *own]})

    latency_s = delivery.latency_s
    if own:
        hears = radio.gain_linear[np.concatenate([ids, frozen])]
        alone = measure_frozen(setup, masks, frozen, hears, measured.bytes_down)
        latency_s = max(latency_s, float(alone.latency_s.max()))
        measured = measured.joined(alone)
    slots = {"prune_ratio": prune_ratio, "simulated_s": state.slots["simulated_s"] + latency_s} | delivery.slots
    slots |= experiment.failsafe.next_slots(
        state.slots, state.round, devices, measured.latency_s[: len(devices)], allocation.deadline_s, delivery.log
    )
    slots |= experiment.weights.next_slots(state.slots, devices, prune_ratio[devices], errors[: len(devices)])
    slots |= experiment.participation.next_slots(state.slots, devices, [update.train_loss for update in updates])
    slots |= rounding_slots(state.slots, bits, updates)
    new = State(state.round + 1, shared, personal, slots | experiment.pruner.next_slots(state, gradient))

    scores = test_models(setup, new, masks, workers)
    return new, build_record(
        setup, new, problems.reference, bits, allocation, updates, own, measured, latency_s, gradient, errors, scores,
        delivery.log,
    )  # fmt: skip


def run(setup: Setup, run_dir: Path, *, wait: bool = False) -> Iterator[Record]:
    """Continues the run in its folder to the last round; yields each record once it and its state are safe on disk.

    wait: for another process that is writing the run, instead of raising CheckpointError.
    """
    experiment = setup.experiment
    with folder.locked(run_dir, wait=wait):
        saved = folder.load(run_dir, experiment.config_hash)
        if not same_form(saved.state, setup.initial):
            raise CheckpointError(f"{run_dir / folder.STATE}: damaged checkpoint (of another model or fleet)")
        with following(experiment.tracking, run_dir) as log:
            if saved.state.round < experiment.rounds:
                with executor(
                    experiment.execution, functools.partial(build_learner, experiment, setup.scenario), [__name__]
                ) as workers:
                    while saved.state.round < experiment.rounds:
                        started = time.perf_counter()
                        state, record = round_step(setup, saved.state, workers)
                        timing = {"round": state.round, "wall_s": time.perf_counter() - started}
                        saved = folder.commit(run_dir, saved, state, {folder.RECORDS: record, folder.TIMINGS: timing})
                        log(record)
                        yield record
        folder.finish(run_dir, summarise(experiment, run_dir))


def create(setup: Setup, config: DictConfig, run_dir: Path) -> None:
    """Makes the folder of a new run, holding its configuration, manifest and first state."""
    check(setup.experiment.tracking)
    if setup.experiment.branch:
        raise ConfigError("branch: is made from a run that is there, with `fedprune resume RUN_DIR KEY=VALUE`")
    ready(setup.experiment.execution, functools.partial(build_learner, setup.experiment, setup.scenario))
    folder.create(run_dir, OmegaConf.to_yaml(config, resolve=True), build_manifest(setup), setup.initial)


def branch(run_dir: Path, overrides: Sequence[str]) -> Setup:
    """Makes the folder of a run that goes on from where the one in `run_dir` is, for longer or under another deadline.

    Returns its setup. The new run's identity says where it comes from; the old one stays as it is. Raises CheckpointError or ConfigError.
    """
    setup = reopen(run_dir)
    state = folder.read_whole_state(run_dir)
    if not state.round:
        raise CheckpointError(f"{run_dir}: no round is finished, there is nothing to branch from")
    old = setup.experiment
    config = DictConfig(OmegaConf.create(read_yaml(run_dir / folder.CONFIG, CheckpointError)))
    config = branch_config(config, overrides, Branch(f"{old.config_hash}-s{old.seed}", state.round))
    new = prepare(build_experiment(config))
    ready(new.experiment.execution, functools.partial(build_learner, new.experiment, new.scenario))
    folder.create(new.experiment.run_dir, OmegaConf.to_yaml(config, resolve=True), build_manifest(new), state, run_dir)
    return new


def begin_or_reopen(config: DictConfig) -> Setup:
    """Returns the setup of the run that a configuration asks for, whose folder is made unless it is there.

    Raises CheckpointError when the folder holds another run.
    """
    experiment = build_experiment(config)
    run_dir = experiment.run_dir
    if not run_dir.exists():
        setup = prepare(experiment)
        try:
            create(setup, config, run_dir)
        except FedpruneError:
            if not run_dir.exists():  # else another process made it in the meantime
                raise
        else:
            return setup
    check_holds(experiment)
    return replace(reopen(run_dir), experiment=experiment)


def check_holds(experiment: Experiment) -> None:
    """Raises CheckpointError when the experiment's folder holds another run."""
    folder.check(experiment.run_dir, folder.MANIFEST)
    manifest = read_json(experiment.run_dir / folder.MANIFEST, CheckpointError)
    for key, asked in (("config_hash", experiment.config_hash), ("seed", experiment.seed)):
        if manifest.get(key) != asked:
            held = f"{key} {manifest.get(key)!r}, not {asked!r}"
            raise CheckpointError(
                f"{experiment.run_dir}: holds another run ({held}); choose another folder with out=DIR"
            )


def reopen(run_dir: Path) -> Setup:
    """Returns the setup that a run folder was made with; raises CheckpointError naming what differs."""
    folder.check(run_dir, folder.CONFIG, folder.MANIFEST)
    manifest, text = (
        read_json(run_dir / folder.MANIFEST, CheckpointError),
        read_yaml(run_dir / folder.CONFIG, CheckpointError),
    )
    try:
        experiment = build_experiment(DictConfig(OmegaConf.create(text)))
    except Exception as error:  # whatever a damaged file makes the YAML parser say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{run_dir / folder.CONFIG}: {reason}") from None
    setup = prepare(experiment)
    now, then = build_manifest(setup), manifest
    for key in sorted(now.keys() - {"versions"}, key=lambda key: (key != "config", key)):
        if now[key] != then.get(key):
            where = (
                next((k for k in now[key] if now[key][k] != then[key].get(k)), "")
                if isinstance(now[key], dict) and isinstance(then.get(key), dict)
                else ""
            )
            raise CheckpointError(
                f"{run_dir}: made with another {'.'.join(filter(None, (key, where)))} than this machine gives; resume it where it was made"
            )
    return setup


# --- the steps of a round -------------------------------------------------------------------------------------------


def participants(setup: Setup, radio: Conditions, number: int, slots: Mapping[str, Array]) -> Array:
    """Returns the ids of the training devices that take part, ascending: all, or `per_round` drawn, of those that can.

    Those cannot that are in outage, frozen or in quarantine.
    """
    ids = np.setdiff1d(np.flatnonzero(radio.available[: setup.scenario.num_devices]), quarantined(slots, number))
    if "frozen" in slots:
        ids = ids[slots["frozen"][ids] == 0]
    wanted = setup.experiment.devices.per_round
    if wanted is None or wanted >= len(ids):
        return ids
    return np.sort(stream(setup.experiment.seed, "participants", number).choice(ids, wanted, replace=False))


def estimate(setup: Setup, gain: Array, number: int) -> tuple[Setup, Array]:
    """Returns the setup and the gains [N] as the server takes them to be in round `number`: itself where it is not wrong."""
    faults, scenario = setup.experiment.faults, setup.scenario
    if not faults.misjudges:
        return setup, gain
    cpu_hz, believed = faults.estimate(setup.experiment.seed, number, scenario.fleet.cpu_hz, gain)
    return replace(setup, scenario=replace(scenario, fleet=replace(scenario.fleet, cpu_hz=cpu_hz))), believed


def as_it_was(
    setup: Setup, believed: Setup, problems: RoundProblems, allocation: Allocation, ids: Array, radio: Conditions, state: State
) -> tuple[RoundProblems, Allocation]:  # fmt: skip
    """Returns the problems and the allocation at the true clocks and gains, in place of those that the server planned with."""
    if believed is setup:
        return problems, allocation
    truth = round_problems(setup, ids, radio.gain_linear[ids], state.round, state.slots)
    return truth, replace(allocation, rate_bps=rate(allocation.bandwidth_hz, truth.reference.snr_hz))


def frozen_devices(setup: Setup, radio: Conditions, slots: Mapping[str, Array]) -> Array:
    """Returns the ids, ascending, of those not in outage that no longer train u but have personal steps to take."""
    steps = sum(phase.steps for phase in plan(setup, 0, frozen=True))
    if "frozen" not in slots or not steps or not setup.cost.personal_params:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(radio.available[: setup.scenario.num_devices] & (slots["frozen"] > 0))


def plan(setup: Setup, device: int, *, frozen: bool = False) -> tuple[Phase, ...]:
    """Returns the phases and steps of a device's round, without those of u when it is frozen."""
    experiment = setup.experiment
    phases = personal_only(experiment.method.phases()) if frozen else experiment.method.phases()
    return experiment.training.plan(phases, len(setup.scenario.partition.train[device]))


@dataclass(frozen=True)
class RoundProblems:
    """A round's allocation problem for each number of bits that a value may take on the uplink.

    load: what the round asks of the devices; reference: the same without compression, whose dense optimum is the unit of deadlines.
    """

    load: Load
    reference: Problem
    by_bits: Mapping[int, Problem]


def round_problems(setup: Setup, ids: Array, gain: Array, number: int, slots: Mapping[str, Array]) -> RoundProblems:
    """Returns the devices' load and the allocation problems of round `number`, given what the state remembers in `slots`.

    The downlink counts a bitmap for each mask that a device cannot derive; the code really sent is never longer.
    """
    experiment, scenario, size = setup.experiment, setup.scenario, setup.cost.shared_params
    plans = [plan(setup, device) for device in ids]
    load = build_load(scenario.fleet, ids, plans, [setup.cost] * len(ids), experiment.training.batch_size)
    bits = size if setup.layout is None else sum(group.units for group in setup.layout.groups)
    bound = 0 if not sends_masks(setup) else len(ids) * len(encode_mask(np.arange(bits) % 2 == 0))
    t_down_s = downlink_s(experiment.meter, experiment.channel, gain, BITS_PER_PARAM * size + 8 * bound)
    samples = scenario.partition.train.sizes[ids].astype(float)
    weight = experiment.weights.weight(samples, ids, slots)
    problem = build_problem(load, experiment.channel, gain, weight, size, t_down_s, setup.max_ratio)
    elapsed_s, dense_s = float(slots["simulated_s"]), dense_deadline(problem)[0]
    deadline_s = experiment.deadline.at(number, experiment.rounds, elapsed_s, dense_s)
    problem = replace(problem, deadline_s=deadline_s, ids=ids)
    by_bits = {width: cautious(compress(problem, bits_per_value(width)), slots) for width in experiment.payload.bits}
    return RoundProblems(load, problem, by_bits)


def allocate(
    experiment: Experiment, problems: RoundProblems, number: int, slots: Mapping[str, Array]
) -> tuple[int, Allocation]:
    """Returns the bits of a value and the allocation that goes with them: of several, the one that learns most in the time.

    That is sum w_k x_k / (1 + omega_q / K): the rounding errors of K devices, of relative square omega_q = `rounding` / L^2, are
    independent and average out. An allocation that had to stretch its deadline loses to one that did not.
    """
    options = {
        bits: experiment.allocator.solve(problem, experiment.seed, number) for bits, problem in problems.by_bits.items()
    }

    def value(bits: int) -> tuple[float, float]:
        allocation = options[bits]
        omega = 0.0 if bits == BITS_PER_PARAM else float(slots.get("rounding", 0.0)) / levels(bits) ** 2
        ends_s = max(allocation.deadline_s, problems.reference.deadline_s)
        return -ends_s, allocation.objective / (1 + omega / max(int(allocation.admitted.sum()), 1))

    chosen = max(options, key=value)
    return chosen, options[chosen]


def rounding_slots(slots: Mapping[str, Array], bits: int, updates: Sequence[Update]) -> dict[str, Array]:
    """Returns how coarse rounding was when there last was any, where the choice of bits depends on it."""
    if "rounding" not in slots:
        return {}
    errors = [update.rounding_error for update in updates if update.rounding_error is not None]
    return {"rounding": rounding_scale(bits, float(np.mean(errors))) if errors else slots["rounding"]}


def rounding_scale(bits: int, error: float) -> Array:
    """Returns omega_q L^2, about the same for all bits, from the relative squared error omega_q that was measured at some."""
    return np.array(error * levels(bits) ** 2)


def sends_masks(setup: Setup) -> bool:
    """Whether the server has to send masks, and the meter counts them."""
    experiment = setup.experiment
    return experiment.meter.mask_overhead and experiment.allocator.prunes and not experiment.pruner.derivable


def pruning_errors(state: State, masks: Masks, devices: Array) -> Array:
    """Returns ||u - u m_k||^2, float64 [K], of the devices."""
    dropped = [~masks[device] for device in devices.tolist()]
    return np.array([np.square(state.shared[drop], dtype=np.float64).sum() if drop.any() else 0.0 for drop in dropped])


def train_unit(setup: Setup, state: State, masks: Masks, device: int, bits: int) -> Unit:
    """Returns a device's training task."""
    return Unit(
        "training",
        state.round,
        device,
        state.shared,
        state.personal[device],
        kept_of(masks, device),
        plan(setup, device),
        bits,
        setup.experiment.faulty,
    )


def frozen_unit(setup: Setup, state: State, masks: Masks, device: int) -> Unit:
    """Returns a frozen device's training task, on what it kept of u when it last trained it."""
    return replace(train_unit(setup, state, masks, device, BITS_PER_PARAM), phases=plan(setup, device, frozen=True))


def train_devices(setup: Setup, workers: Executor, units: Sequence[Unit]) -> list[Update]:
    """Returns the devices' updates in the order of the units: small models side by side, others and slices one by one.

    A device that diverged keeps its old personal part; that is an error except where faults may have led to it.
    """
    together = [unit for unit in units if setup.batched and not isinstance(unit.kept, tuple)]
    sides = blocks(together, setup.experiment.training.block)
    in_blocks = workers.map(train_block, sides, lambda side: len(side) * side[-1].steps) if sides else []
    done = {update.device: update for block in in_blocks for update in block}
    rest = [unit for unit in units if unit.device not in done]
    done |= {update.device: update for update in workers.map(train, rest, lambda unit: unit.steps)} if rest else {}
    updates = [done[unit.device] for unit in units]
    return [undone(update, unit) if diverged(update) else update for update, unit in zip(updates, units, strict=True)]


def kept_of(masks: Masks, device: int) -> Array | tuple[Array, ...] | None:
    """Returns what a unit of work says of the device's mask: nothing when it keeps everything."""
    mask = masks[device]
    if mask.all():
        return None
    return masks.kept_units(device) if masks.units else np.packbits(mask)


def server_step(setup: Setup, state: State, arrivals: Sequence[Arrival]) -> tuple[Array, Array]:
    """Returns the new u [U], and the mean gradient that the arrivals imply: the way each entry went, per unit of step size."""
    ids, lr = [arrival.device for arrival in arrivals], setup.experiment.training.lr
    steps = [sum(phase.steps for phase in plan(setup, device) if phase.kind != "personal") for device in ids]
    samples = setup.scenario.partition.train.sizes[ids]
    return setup.experiment.failsafe.combine(state.shared, arrivals, samples, [lr * max(count, 1) for count in steps])


def measure_round(
    setup: Setup, load: Load, allocation: Allocation, masks: Masks, updates: Sequence[Update], gain: Array
) -> Measurement:
    """Returns the modelled cost of what was really kept and encoded, for the admitted devices."""
    size, taking = setup.cost.shared_params, np.flatnonzero(allocation.admitted)
    codes = [encode_mask(masks.sent(update.device)) for update in updates] if sends_masks(setup) else []
    kept = np.array([len(update.shared) for update in updates]) / max(size, 1)
    bits_down = float(BITS_PER_PARAM * size + 8 * sum(map(len, codes))) if updates else 0.0
    t_down_s = downlink_s(setup.experiment.meter, setup.experiment.channel, gain, bits_down)
    load = load.take(taking)
    if masks.units:  # the model is smaller: its own FLOPs, not a share of the whole one's
        plans = [plan(setup, update.device) for update in updates]
        load, kept = sliced_load(setup, masks, [update.device for update in updates], plans), np.ones(len(updates))
    return measure(
        load,
        rate_bps=allocation.rate_bps[taking],
        kept=kept,
        payload_bytes=np.array([update.sent_bytes for update in updates], dtype=float),
        bits_down=bits_down,
        t_down_s=np.full(len(updates), t_down_s),
    )


def measure_frozen(setup: Setup, masks: Masks, devices: Array, gain: Array, bytes_down: float) -> Measurement:
    """Returns the modelled cost of frozen devices, which send nothing.

    The broadcast goes on after those that train u, first served, until the last listener, `gain`, has it and the frozen ones' masks.
    """
    size, ids = setup.cost.shared_params, devices.tolist()
    codes = [encode_mask(masks.sent(device)) for device in ids] if sends_masks(setup) else []
    plans, kept = [plan(setup, device, frozen=True) for device in ids], masks.kept[devices] / max(size, 1)
    bits_down = max(8 * bytes_down, BITS_PER_PARAM * size) + 8 * sum(map(len, codes))
    load = build_load(
        setup.scenario.fleet, devices, plans, [setup.cost] * len(ids), setup.experiment.training.batch_size
    )
    if masks.units:
        load, kept = sliced_load(setup, masks, ids, plans), np.ones(len(ids))
    return measure(
        load,
        rate_bps=np.zeros(len(ids)),
        kept=kept,
        payload_bytes=np.zeros(len(ids)),
        bits_down=bits_down,
        t_down_s=np.full(len(ids), downlink_s(setup.experiment.meter, setup.experiment.channel, gain, bits_down)),
    )


def sliced_load(setup: Setup, masks: Masks, devices: Sequence[int], plans: Sequence[Sequence[Phase]]) -> Load:
    """Returns the load of devices that leave whole channels out."""
    assert setup.layout
    of_cutoff = {
        cutoff: setup.cost.sliced(setup.layout.kept_params(masks.kept_units(device)))
        for device, cutoff in zip(devices, masks.kept[devices].tolist(), strict=True)
    }
    costs = [of_cutoff[c] for c in masks.kept[devices].tolist()]
    return build_load(
        setup.scenario.fleet, np.array(devices, dtype=np.int64), plans, costs, setup.experiment.training.batch_size
    )


def test_models(setup: Setup, new: State, masks: Masks, workers: Executor) -> dict[int, Score]:
    """Returns each device's score with its own model (u * m_k, v_k), in the rounds that are tested; else nothing.

    Fresh devices, which never train, fine-tune v on the unpruned u first.
    """
    scenario, evaluation = setup.scenario, setup.experiment.evaluation
    if new.round % evaluation.every and new.round != setup.experiment.rounds:
        return {}
    own = [
        Unit("test", new.round, device, new.shared, new.personal[device], kept_of(masks, device), ())
        for device in tested_devices(setup)
    ]
    fresh = [
        Unit(
            "fresh-device test",
            new.round,
            device,
            new.shared,
            setup.initial.personal.initial,
            None,
            (Phase("personal", evaluation.fresh_steps),),
            may_diverge=setup.experiment.faulty,
        )
        for device in range(scenario.num_devices, len(scenario.partition.train))
    ]
    return {score.device: score for score in workers.map(evaluate, own + fresh)}


def tested_devices(setup: Setup) -> list[int]:
    """Returns the training devices whose models are tested: all, or the same `evaluation.devices` of them throughout the run."""
    count, wanted = setup.scenario.num_devices, setup.experiment.evaluation.devices
    if wanted is None or wanted >= count:
        return list(range(count))
    chosen = stream(setup.experiment.seed, "evaluation").choice(count, wanted, replace=False)
    return sorted(chosen.tolist())


def build_record(
    setup: Setup, new: State, problem: Problem, bits: int, allocation: Allocation,
    updates: Sequence[Update], own: Sequence[Update], measured: Measurement, latency_s: float, gradient: Array, errors: Array,
    scores: Mapping[int, Score], log: Log,
) -> Record:  # fmt: skip
    """Returns the round as one JSON object; arrays stand under `devices`, aligned with its `id`: after those that trained u the frozen.

    problem: without compression.
    """
    scenario, admitted = setup.scenario, allocation.admitted
    samples = scenario.partition.train.sizes
    ids = [update.device for update in updates]
    weights = samples[ids] / max(samples[ids].sum(), 1)
    equal = np.full(len(problem.weight), problem.bandwidth_hz / len(problem.weight))
    rounding = [update.rounding_error for update in updates if update.rounding_error is not None]
    certificate = allocation.certificate
    tested = accuracy_figures(setup, scores)
    return {
        "round": new.round,
        "simulated_s": float(new.slots["simulated_s"]),
        "latency_s": float(latency_s),
        "deadline_s": allocation.deadline_s,
        **tested,
        "train_loss": mean_loss(updates, samples),
        "mean_ratio": float(allocation.prune_ratio[admitted].mean()) if updates else None,
        "max_ratio": float(allocation.prune_ratio[admitted].max()) if updates else None,
        "bits": bits,
        "rounding_error": float(np.mean(rounding)) if rounding else None,
        "bytes_up": int(measured.bytes_up.sum()),
        "bytes_down": int(measured.bytes_down),
        "joules": float(measured.joules.sum()),
        "flops": float(measured.flops.sum()),
        "grad_norm": float(np.linalg.norm(gradient.astype(np.float64))),
        "pruning_error": float(np.dot(weights, errors[: len(ids)])) if updates else None,
        "dense_latency_s": dense_deadline(problem)[0],
        "equal_dense_latency_s": float(latency(problem, np.ones(len(equal)), equal).max()),
        "price_per_hz": allocation.price_per_hz,
        "residual": certificate.residual if certificate else None,
        "gap": certificate.gap if certificate else None,
        "status": allocation.status,
        "message": allocation.message,
        **frozen_figures(new),
        **fault_figures(setup, log),
        "devices": device_rows(
            new, [*updates, *own], allocation.bandwidth_hz[admitted].tolist(), measured, errors, scores
        ),
    }


def device_rows(
    new: State, updates: Sequence[Update], bandwidth_hz: Sequence[float], measured: Measurement, errors: Array,
    scores: Mapping[int, Score],
) -> Record:  # fmt: skip
    """Returns a record's figures by device: of those that trained u, which have bandwidth, and then of the frozen, which have none."""
    ids = [update.device for update in updates]
    return {
        "id": ids,
        "prune_ratio": new.slots["prune_ratio"][ids].tolist(),
        "bandwidth_hz": [*bandwidth_hz, *[0.0] * (len(ids) - len(bandwidth_hz))],
        "compute_s": measured.compute_s.tolist(),
        "uplink_s": measured.uplink_s.tolist(),
        "downlink_s": measured.downlink_s.tolist(),
        "latency_s": measured.latency_s.tolist(),
        "pruning_error": errors.tolist(),
        "joules": measured.joules.tolist(),
        "bytes_up": [int(size) for size in measured.bytes_up],
        "train_loss": [update.train_loss for update in updates],
        "accuracy": [_accuracy(scores.get(device)) for device in ids] if scores else None,
    }


def mean_loss(updates: Sequence[Update], samples: Array) -> float | None:
    """Returns the training loss averaged with weights D_k over the devices that have one."""
    losses = {update.device: update.train_loss for update in updates if update.train_loss is not None}
    of = samples[list(losses)]
    return float(np.dot(of / max(of.sum(), 1), list(losses.values()))) if losses else None


def fault_figures(setup: Setup, log: Log) -> Record:
    """Returns what went wrong and which fail-safe acted; nothing in a run in which neither can."""
    return {"faults": log} if setup.experiment.faulty or log["refused"] else {}


def frozen_figures(new: State) -> Record:
    """Returns how many devices no longer train u from the next round on; nothing where none ever stops."""
    return {"frozen": int(new.slots["frozen"].sum())} if "frozen" in new.slots else {}


def _accuracy(score: Score | None) -> float | None:
    return None if score is None else score.correct / score.total


def accuracy_figures(setup: Setup, scores: Mapping[int, Score]) -> Record:
    """Returns the accuracy keys of a record, null in a round that was not tested."""
    count = setup.scenario.num_devices
    own = {device: score for device, score in scores.items() if device < count}
    fresh = [score.correct / score.total for device, score in scores.items() if device >= count]
    samples = setup.scenario.partition.train.sizes
    figures = accuracies(own, samples) if own else dict.fromkeys(("accuracy", "accuracy_mean", "accuracy_p10"))
    return figures | {"fresh_accuracy": float(np.mean(fresh)) if fresh else None}


def idle_round(setup: Setup, state: State, radio: Conditions, frozen: Array, workers: Executor) -> tuple[State, Record]:
    """Returns a round in which every device is in outage or frozen: nothing is sent, and the frozen take their personal steps."""
    masks = build_masks(setup.experiment.pruner, state, state.slots["prune_ratio"], setup.experiment.seed, setup.layout)
    own = train_devices(setup, workers, [frozen_unit(setup, state, masks, device) for device in frozen.tolist()])
    personal = state.personal.replaced({update.device: update.personal for update in own})
    measured = measure_frozen(setup, masks, frozen, radio.gain_linear[frozen], 0.0) if own else None
    latency_s = float(measured.latency_s.max()) if measured else 0.0
    slots = {**state.slots, "simulated_s": state.slots["simulated_s"] + latency_s}
    new = replace(state, round=state.round + 1, personal=personal, slots=slots)
    scores, away = test_models(setup, new, masks, workers), quarantined(state.slots, state.round)
    unknown = ("deadline_s", "train_loss", "mean_ratio", "max_ratio", "bits", "rounding_error", "pruning_error", "dense_latency_s",
               "equal_dense_latency_s", "price_per_hz", "residual", "gap")  # fmt: skip
    zero = ("latency_s", "bytes_up", "bytes_down", "joules", "flops", "grad_norm")
    idle = {
        "round": new.round,
        "simulated_s": float(new.slots["simulated_s"]),
        **accuracy_figures(setup, scores),
        **dict.fromkeys(unknown),
        **dict.fromkeys(zero, 0.0),
        "status": "idle",
        "message": "every device is in outage",
        **frozen_figures(new),
        **fault_figures(setup, {kind: [] for kind in KINDS} | {"quarantined": away.tolist(), "waited_s": 0.0}),
        "devices": {"id": []},
    }
    here = np.flatnonzero(radio.available[: setup.scenario.num_devices])
    if not len(here):
        return new, idle
    if np.isin(here, away).any() and not measured:
        return new, idle | {"message": "every device that is not in outage is in quarantine or frozen"}
    stopped = idle | {"status": "frozen", "message": "every device that is not in outage is frozen"}
    if not measured:
        return new, stopped
    return new, stopped | {
        "latency_s": latency_s,
        "bytes_down": int(measured.bytes_down),
        "joules": float(measured.joules.sum()),
        "flops": float(measured.flops.sum()),
        "dense_latency_s": latency_s,  # with nothing to send, it is the same on any bandwidth
        "equal_dense_latency_s": latency_s,
        "devices": device_rows(new, own, [], measured, pruning_errors(state, masks, frozen), scores),
    }


# --- before the first round and after the last ----------------------------------------------------------------------


def prepare(experiment: Experiment) -> Setup:
    """Returns the setup of an experiment; raises DataError or ConfigError when its world cannot be built."""
    scenario = build_scenario(
        experiment.data, experiment.partition, experiment.devices, experiment.channel,
        experiment.evaluation.test_fraction, experiment.seed, experiment.rounds,
    )  # fmt: skip
    parts = build_parts(experiment, scenario)
    cost = count_cost(parts, scenario.dataset.images.shape[1:])
    slots = {"prune_ratio": np.zeros(scenario.num_devices), "simulated_s": np.array(0.0)}
    slots |= experiment.pruner.slots(cost.shared_params) | experiment.weights.slots(scenario.num_devices)
    slots |= experiment.participation.slots(scenario.num_devices)
    slots |= experiment.failsafe.slots(experiment.faults, scenario.num_devices, cost.shared_params)
    if len(experiment.payload.bits) > 1:
        slots["rounding"] = np.array(FIRST_ROUNDING)
    personal = untrained(parts.personal.numpy().copy(), scenario.num_devices)
    layout = build_layout(experiment, parts, cost)
    initial = State(0, parts.shared.numpy().copy(), personal, slots)
    return Setup(experiment, scenario, cost, initial, layout, batches(parts, experiment.training))


def build_layout(experiment: Experiment, parts: Parts, cost: ModelCost) -> Layout | None:
    """Returns where the model's channels lie when devices leave whole ones out, else None."""
    try:
        return (
            find_channels(parts, cost)
            if experiment.pruner.granularity == "channel" and experiment.allocator.prunes
            else None
        )
    except ConfigError as error:
        raise ConfigError(f"pruner.granularity=channel with model={experiment.model.name}: {error}") from None


def build_parts(experiment: Experiment, scenario: Scenario) -> Parts:
    """Returns the initial model, split by the method's personalized part."""
    dataset = scenario.dataset
    model = build_model(experiment.model, dataset.images.shape[1:], dataset.num_classes, experiment.seed)
    return split_model(model, experiment.method.personal_part)


def build_learner(experiment: Experiment, scenario: Scenario) -> Learner:
    """Returns what a worker needs; every worker builds its own, since a model is scratch memory."""
    dataset, partition, parts = scenario.dataset, scenario.partition, build_parts(experiment, scenario)
    layout = build_layout(experiment, parts, count_cost(parts, dataset.images.shape[1:]))
    return Learner(
        experiment.seed, experiment.training, to_device(parts, experiment.training.device), dataset.images, dataset.labels,
        dataset.scale, dataset.mean, dataset.std, partition.train, partition.test, layout,
    )  # fmt: skip


def build_manifest(setup: Setup) -> Record:
    """Returns what a run was made of: configuration, seed, versions, dataset hash, model counts and the data's split."""
    experiment, scenario, cost = setup.experiment, setup.scenario, setup.cost
    dataset, partition = scenario.dataset, scenario.partition
    packages = ("fedprune", "torch", "torchvision", "numpy", "scipy", "hydra-core", "safetensors", "scikit-learn")
    return {
        "experiment": experiment.name,
        "method": experiment.method.name,
        "seed": experiment.seed,
        "config_hash": experiment.config_hash,
        "config": experiment.identity,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "dataset": {
            "name": dataset.name,
            "sha256": dataset.sha256,
            "samples": len(dataset.labels),
            "num_classes": dataset.num_classes,
        },
        "model": {
            "name": experiment.model.name,
            "shared_params": cost.shared_params,
            "personal_params": cost.personal_params,
            "shared_bits": BITS_PER_PARAM * cost.shared_params,
            "personal_bits": BITS_PER_PARAM * cost.personal_params,
            "flops_per_sample": {
                kind: {"shared": round(u), "personal": round(v)} for kind, (u, v) in cost.flops.items()
            },
        },
        "fresh_devices": len(partition.train) - scenario.num_devices,
        "train_samples": partition.train.sizes.tolist(),
        "test_samples": partition.test.sizes.tolist(),
        "histogram": partition.histogram.tolist(),
    }


def summarise(experiment: Experiment, run_dir: Path) -> Record:
    """Returns the run's summary: figures of the last round (never of the best), sums, and the state's hash."""
    records = folder.read_records(run_dir)
    last = next(record for record in reversed(records) if record["accuracy"] is not None)
    target = experiment.evaluation.target_accuracy
    reached = [r["simulated_s"] for r in records if target is not None and (r["accuracy"] or 0.0) >= target]
    return {
        "method": experiment.method.name,
        "seed": experiment.seed,
        "rounds": len(records),
        "final_accuracy": last["accuracy"],
        "final_accuracy_p10": last["accuracy_p10"],
        "fresh_accuracy": last["fresh_accuracy"],
        "simulated_s": records[-1]["simulated_s"],
        "time_to_target_s": reached[0] if reached else None,
        "bytes_up": sum(record["bytes_up"] for record in records),
        "joules": sum(record["joules"] for record in records),
        "state_sha256": hashlib.sha256((run_dir / folder.STATE).read_bytes()).hexdigest(),
    }
