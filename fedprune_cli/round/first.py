"""The first round asked by itself, for a radio engineer: its problem from a configuration or from a CSV file, and its allocation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedprune_cli.allocate.deadline import dense_deadline
from fedprune_cli.allocate.limits import Limits
from fedprune_cli.allocate.problem import Allocation, Problem
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.errors import ConfigError, DataError
from fedprune_cli.learn.models import build_model
from fedprune_cli.learn.parts import split_model
from fedprune_cli.round.memory import first_slots
from fedprune_cli.round.plan import Beliefs, RoundProblems, decide, round_problems
from fedprune_cli.round.setup import Blueprint, build_blueprint, prepare
from fedprune_cli.store.memory import Sizes, Slots
from fedprune_cli.wire.quantize import BITS_PER_PARAM
from fedprune_cli.world.band import Radio
from fedprune_cli.world.channel import block_gain_of, radio_of
from fedprune_cli.world.devices import Devices
from fedprune_cli.world.fleet import LIMIT_FIELDS, Fleet
from fedprune_cli.world.measured import MeasuredFleet
from fedprune_cli.world.power import Capped, snr_of
from fedprune_cli.world.rows import FleetTable, build_fleet, read_rows
from fedprune_cli.world.tables import read_header, read_table

OWN_COLUMNS = ("shared_compute_s", "payload_bits", "fixed_s", "snr_hz", "weight")
OWN_LIMITS = (
    "min_bandwidth_hz",
    "max_bandwidth_hz",
    "energy_budget_j",
    "shared_energy_j",
    "fixed_energy_j",
    "tx_power_w",
    "fixed_compute_s",
    "circuit_w",
)


@dataclass(frozen=True)
class FirstRound:
    """The first round of an experiment, or of a table of devices, as the server would allocate it.

    bits: of a value on the uplink, chosen out of `payload.bits`, None where each device has its own; problem: the one with these bits;
    allocation: its answer; names: what a table calls the devices; fleet: what they are, None for a table of the problem's own columns.
    """

    bits: int | None
    problem: Problem
    allocation: Allocation
    names: tuple[str, ...] | None = None
    fleet: Fleet | None = None


def allocate_first_round(experiment: Experiment, table: Path | None = None) -> FirstRound:
    """Returns the first round's allocation: all training devices, outages apart, or the devices of a CSV table.

    A table has the problem's own columns (a, c, d, s, w of model.md), or samples and the physical ones of devices=table; then the model,
    its pruning, the payload and the channel are the experiment's. Raises DataError naming the line of a bad row.
    """
    question = ask(experiment, table)
    decision = decide(experiment, question.problems, 0, question.slots)
    return FirstRound(decision.bits, decision.problem, decision.allocation, question.names, question.fleet)


@dataclass(frozen=True)
class Question:
    """The first round's problems, what is remembered before it, what a table calls the devices, and what they are."""

    problems: RoundProblems
    slots: Slots
    names: tuple[str, ...] | None
    fleet: Fleet | None = None

    @property
    def problem(self) -> Problem:
        """The problem with the first of `payload.bits`."""
        return next(iter(self.problems.by_bits.values()))


def ask(experiment: Experiment, table: Path | None = None) -> Question:
    """Returns the first round's question, before any allocator has answered it."""
    if table is not None and {"shared_compute_s", "snr_hz"} & {*read_header(str(table))}:
        if experiment.payload.per_device:
            raise ConfigError(
                f"payload.per_device=true: column payload_bits of {table} says already what is sent; give physical columns"
            )
        problem, names = _own_problem(table, experiment)
        deadline_s = experiment.deadline.at(0, experiment.rounds, 0.0, dense_deadline(problem)[0])
        problem = replace(problem, deadline_s=deadline_s)
        return Question(RoundProblems(problem, {BITS_PER_PARAM: problem}), {}, names)
    blueprint, beliefs = _from_config(experiment) if table is None else _from_table(experiment, table)
    slots = first_slots(experiment, Sizes(len(beliefs.fleet.cpu_hz), blueprint.cost.shared_params))
    return Question(
        round_problems(blueprint, beliefs, 0, slots), slots, beliefs.fleet.names, beliefs.fleet.take(beliefs.ids)
    )


def _from_config(experiment: Experiment) -> tuple[Blueprint, Beliefs]:
    setup = prepare(experiment)
    ids, scenario = np.arange(setup.scenario.num_devices), setup.scenario
    conditions = scenario.at(0)
    blocks = None if conditions.block_gain is None else conditions.block_gain[ids]
    samples = scenario.partition.train.sizes[ids]
    return setup.blueprint, Beliefs(ids, scenario.fleet, conditions.gain_linear[ids], samples, blocks)


def _from_table(experiment: Experiment, table: Path) -> tuple[Blueprint, Beliefs]:
    devices = _as_table(experiment.devices, table)
    rows = read_rows(devices, ("samples",))
    fleet, samples = build_fleet(devices, rows), rows["samples"]
    dataset = experiment.data.load()
    shape = dataset.inputs.shape[1:]
    model = build_model(experiment.model, shape, dataset.num_classes, experiment.seed)
    blueprint = build_blueprint(experiment, split_model(model, experiment.method.personal_part), shape)
    gain = experiment.channel.gain(experiment.seed, 0, fleet)
    blocks = block_gain_of(experiment.channel, experiment.seed, 0, len(samples))
    return blueprint, Beliefs(np.arange(len(samples)), fleet, gain, samples, blocks)


def _own_problem(file: Path, experiment: Experiment) -> tuple[Problem, tuple[str, ...] | None]:
    radio = radio_of(experiment.channel)
    gains = _gain_columns(file, radio)
    rows = read_table(str(file), OWN_COLUMNS, optional=("max_ratio", *OWN_LIMITS, *gains), named=True)
    size = len(rows["weight"])
    if not gains and block_gain_of(experiment.channel, experiment.seed, 0, 1) is not None:
        raise DataError(
            f"{file}: channel.coherence_mhz draws no gains for snr_hz; give columns gain_0, gain_1 and so on, one for each block"
        )
    limits = None
    if given := [name for name in OWN_LIMITS if name in rows]:
        energy = ("energy_budget_j", "shared_energy_j", "tx_power_w")
        if (some := [name for name in energy if name in given]) and (
            missing := [name for name in energy if name not in given]
        ):
            raise DataError(f"{file}, line 1: column {missing[0]} is missing beside {some[0]}")
        default = {"max_bandwidth_hz": math.inf, "energy_budget_j": math.inf, "tx_power_w": 1.0}
        limits = Limits(**{name: rows.get(name, np.full(size, default.get(name, 0.0))) for name in OWN_LIMITS})
    caps = experiment.channel
    modem = caps.max_bits_per_hz if isinstance(caps, Capped) else None
    if isinstance(caps, Capped) and caps.control is not None:
        raise ConfigError(
            f"channel.p0_dbm: must be null, for {file} gives signals and no path loss to control the power by"
        )
    problem = Problem(
        shared_compute_s=rows["shared_compute_s"],
        payload_bits=rows["payload_bits"],
        fixed_s=rows["fixed_s"],
        snr_hz=rows["snr_hz"],
        weight=rows["weight"],
        max_ratio=rows.get("max_ratio", np.full(size, experiment.pruner.max_ratio)),
        bandwidth_hz=radio.band_hz,
        block_hz=radio.block_hz,
        deadline_s=math.inf,
        limits=limits,
        max_snr=None if modem is None else np.full(size, snr_of(modem)),
        titles=None if rows.names is None else np.array(rows.names, dtype=object),
        block_gain=np.stack([rows[name] for name in gains], 1) if gains else None,
    )
    return problem, rows.names


def _gain_columns(file: Path, radio: Radio) -> list[str]:
    """Returns the columns gain_0, gain_1, ... of a table: gains in each block relative to the device's own; raises DataError."""
    header = read_header(str(file))
    count = sum(bool(re.fullmatch(r"gain_\d+", name)) for name in header)
    if count and radio.block_hz is not None and count != round(radio.band_hz / radio.block_hz):
        raise DataError(
            f"{file}, line 1: {count} columns gain_0, gain_1 ... for the channel's {round(radio.band_hz / radio.block_hz)} blocks"
        )
    names = [f"gain_{block}" for block in range(count)]
    if missing := [name for name in names if name not in header]:
        raise DataError(f"{file}, line 1: column {missing[0]} is missing beside the other gains of blocks")
    return names


def _as_table(devices: Devices, file: Path) -> FleetTable:
    """Returns a fleet that is a table of devices, with what the configured fleet gives those of which the table says nothing."""
    if isinstance(devices, FleetTable):
        return replace(devices, file=str(file), per_round=None, fresh=0)
    least, most, budget = (float(devices.limits(1)[name][0]) for name in LIMIT_FIELDS)
    return FleetTable(
        name="table",
        per_round=None,
        fresh=0,
        min_bandwidth_hz=least,
        max_bandwidth_hz=None if math.isinf(most) else most,
        energy_budget_j=None if math.isinf(budget) else budget,
        energy_coefficient=devices.energy_coefficient,
        file=str(file),
        classes=devices.classes if isinstance(devices, MeasuredFleet) else (),
    )
