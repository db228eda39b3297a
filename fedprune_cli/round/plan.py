"""The plan of a round: bits, pruning ratios and bandwidths, chosen by what the server believes of devices and channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedprune_cli.allocate.baselines import ChoosesBits
from fedprune_cli.allocate.bits import Menu
from fedprune_cli.allocate.deadline import dense_deadline
from fedprune_cli.allocate.problem import Allocation, Problem
from fedprune_cli.allocate.selective import rates_at
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.meter import Uplink, Wait, build_load, build_problem, compress, downlink_s, unicast_s_per_bit
from fedprune_cli.privacy.keepers import capped
from fedprune_cli.round.roster import Roster
from fedprune_cli.round.setup import Blueprint, Setup
from fedprune_cli.serve.failsafe import with_margins
from fedprune_cli.store.memory import Slots
from fedprune_cli.store.state import Array
from fedprune_cli.wire.masks import encode_mask
from fedprune_cli.wire.quantize import BITS_PER_PARAM, bits_per_value
from fedprune_cli.world.fleet import Fleet
from fedprune_cli.world.power import max_snr_of


@dataclass(frozen=True)
class Beliefs:
    """What the server takes the devices of a round to be: their ids [K], the fleet [N] that they are of, gains and samples D_k [K];

    block_gain: the gain in each block relative to that [K, blocks], where blocks differ.
    """

    ids: Array
    fleet: Fleet
    gain_linear: Array
    samples: Array
    block_gain: Array | None = None


@dataclass(frozen=True)
class RoundProblems:
    """A round's allocation problem for each number of bits that a value may take on the uplink.

    reference: the same without compression or margins, whose dense optimum is the unit of deadlines.
    """

    reference: Problem
    by_bits: Mapping[int, Problem]


@dataclass(frozen=True)
class Decision:
    """What the allocation of a round is. bits: of a value on the uplink, None where each device has its own; problem: the one solved."""

    bits: int | None
    problem: Problem
    allocation: Allocation


@dataclass(frozen=True)
class Plan:
    """What the server decided.

    bits: of a value on the uplink, None where each device has its own; problem: the one that was solved, by what the server believes;
    allocation: its answer, with the rates that the bandwidths really give; reference: the round's problem at the true clocks and gains,
    without compression; devices: the admitted ones [A], ascending; ratios: what every device drops, or last dropped, float64 [N], which
    is the allocation's but where a secure sum asks for more keepers; drawn: whom of those that the allocation is made for the draw took,
    bool [K]: all, but where the allocation may not depend on the draw.
    """

    bits: int | None
    problem: Problem
    allocation: Allocation
    reference: Problem
    devices: Array
    ratios: Array
    drawn: Array

    @property
    def deadline_s(self) -> float:
        """T, as given or stretched."""
        return self.allocation.deadline_s

    @property
    def chosen(self) -> Mapping[str, Array]:
        """What the admitted devices chose beside the ratio [A]: their clocks and powers, as shares of the full ones, where they may."""
        columns = {"clock": self.allocation.clock, "power": self.allocation.power}
        return {key: values[self.admitted_places] for key, values in columns.items() if values is not None}

    @property
    def sent_bits(self) -> Array:
        """The bits of a value of each admitted device, int [A]."""
        of_each = self.allocation.bits
        return np.full(len(self.devices), self.bits) if of_each is None else of_each[self.admitted_places]

    @property
    def blocks(self) -> list[list[int]] | None:
        """Which blocks each admitted device has [A], ascending, where that matters."""
        owner = self.allocation.owner
        return None if owner is None else [np.flatnonzero(owner == place).tolist() for place in self.admitted_places]

    @property
    def admitted_places(self) -> Array:
        """The places of the admitted devices among those that were asked, int [A]."""
        return np.flatnonzero(self.allocation.admitted & self.drawn)

    @property
    def eligible(self) -> Array:
        """The devices that take part, or would have if the draw had taken them, ascending."""
        return self.problem.names[self.allocation.admitted]


def plan_round(setup: Setup, roster: Roster, slots: Slots) -> Plan:
    """Returns the plan of a round; raises InfeasibleError when the deadline cannot be met and the policy is `fail`."""
    blueprint, faults = setup.blueprint, setup.experiment.faults
    truth = _truth(setup, roster)
    believed = truth
    if faults.misjudges:
        cpu_hz, gain = faults.estimate(setup.experiment.seed, roster.number, truth.fleet.cpu_hz, roster.gain_linear)
        believed = replace(truth, fleet=replace(truth.fleet, cpu_hz=cpu_hz), gain_linear=gain[truth.ids])
    problems = round_problems(blueprint, believed, roster.number, slots)
    decision = decide(setup.experiment, problems, roster.number, slots)
    allocation, reference = decision.allocation, problems.reference
    if faults.misjudges:
        reference = round_problems(blueprint, truth, roster.number, slots).reference
        allocation = replace(allocation, rate_bps=rates_at(reference, allocation))
    drawn = np.isin(roster.asked, roster.training)
    takes = allocation.admitted & drawn
    devices, ratios = roster.asked[takes], slots["prune_ratio"].copy()
    ratios[devices] = allocation.prune_ratio[takes]
    if not drawn.any():
        allocation = replace(allocation, message=f"the draw took none of {len(drawn)} devices: u gets the noise alone")
    if setup.experiment.privacy.secure:  # no entry may be of so few devices that they could be told apart
        ratios[devices] = capped(ratios[devices], setup.experiment.privacy.keepers)
    return Plan(decision.bits, decision.problem, allocation, reference, devices, ratios, drawn)


def _truth(setup: Setup, roster: Roster) -> Beliefs:
    ids, scenario = roster.asked, setup.scenario
    blocks = None if roster.block_gain is None else roster.block_gain[ids]
    return Beliefs(ids, scenario.fleet, roster.gain_linear[ids], scenario.partition.train.sizes[ids], blocks)


def round_problems(blueprint: Blueprint, beliefs: Beliefs, number: int, slots: Slots) -> RoundProblems:
    """Returns the allocation problems of round `number`, given what the run remembers in `slots`. One assembly serves every caller.

    The downlink counts a bitmap for each mask that a device cannot derive; the code really sent is never longer.
    """
    experiment, size, ids = blueprint.experiment, blueprint.cost.shared_params, beliefs.ids
    schedules = [blueprint.schedule(int(samples)) for samples in beliefs.samples.tolist()]
    load = build_load(beliefs.fleet, ids, schedules, [blueprint.cost] * len(ids))
    flags = np.arange(blueprint.layout.flags(size)) % 2 == 0
    masks_bits = 8 * len(ids) * len(encode_mask(flags)) if blueprint.sends_masks else 0
    gain, meter = beliefs.gain_linear, experiment.meter
    up, down = blueprint.exchanged_bytes(len(ids))
    if meter.unicast:
        s_per_bit = unicast_s_per_bit(meter, experiment.channel, load.fleet, gain)
        wait = Wait((masks_bits + 8 * down) / len(ids) * s_per_bit, BITS_PER_PARAM * size * s_per_bit)
    else:
        wait = Wait(downlink_s(meter, experiment.channel, gain, BITS_PER_PARAM * size + masks_bits + 8 * down))
    weight = experiment.weights.weight(beliefs.samples.astype(float), ids, slots)
    max_snr = max_snr_of(experiment.channel, experiment.seed, beliefs.fleet, ids, gain)
    uplink = Uplink(experiment.channel, gain, size, max_snr, up)
    problem = build_problem(load, uplink, weight, wait, blueprint.max_ratio)
    elapsed_s, dense_s = float(slots["simulated_s"]), dense_deadline(problem)[0]
    deadline_s = experiment.deadline.at(number, experiment.rounds, elapsed_s, dense_s)
    names = beliefs.fleet.names
    titles = None if names is None else np.array(names, dtype=object)[ids]
    waited = slots["waited"][ids] if "waited" in slots else None
    problem = replace(
        problem, deadline_s=deadline_s, ids=ids, titles=titles, waited=waited, block_gain=beliefs.block_gain
    )
    widths = experiment.payload.bits
    return RoundProblems(
        problem, {bits: with_margins(compress(problem, bits_per_value(bits)), slots) for bits in widths}
    )


def decide(experiment: Experiment, problems: RoundProblems, number: int, slots: Slots) -> Decision:
    """Returns bits and allocation of a round, the bits of all devices together or, where `payload` asks for it, of each."""
    if not (experiment.payload.per_device and isinstance(experiment.allocator, ChoosesBits)):
        bits, allocation = choose(experiment, problems, number, slots)
        return Decision(bits, problems.by_bits[bits], allocation)
    widths = [*problems.by_bits]
    share = np.array([bits_per_value(bits) for bits in widths]) / bits_per_value(widths[0])
    omega = np.array([experiment.payload.noise(bits, 1, slots) for bits in widths])
    menu = Menu(np.array(widths), share, omega)
    return Decision(None, *experiment.allocator.solve_bits(problems.by_bits[widths[0]], menu))


def choose(experiment: Experiment, problems: RoundProblems, number: int, slots: Slots) -> tuple[int, Allocation]:
    """Returns the bits of a value and the allocation that goes with them: of several, the one that learns most in the time.

    That is sum w_k x_k / (1 + omega_q / K), as `Payload` says. An allocation that had to stretch its deadline loses to one that did not.
    """
    options = {
        bits: experiment.allocator.solve(problem, experiment.seed, number) for bits, problem in problems.by_bits.items()
    }

    def value(bits: int) -> tuple[float, float]:
        allocation = options[bits]
        noise = experiment.payload.noise(bits, int(allocation.admitted.sum()), slots)
        return -max(allocation.deadline_s, problems.reference.deadline_s), allocation.objective / (1 + noise)

    chosen = max(options, key=value)
    return chosen, options[chosen]
