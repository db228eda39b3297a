"""An audit of a run: checksums, records against state and summary, the meter's figures again, certificates, cvxpy's own answers.

What cannot be known without training again is taken from the record: how many entries of a slice of whole channels a device kept,
and how long the masks were that were sent; both are held to what they can be at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedprune_cli.allocate.baselines import Certifying, Referenced
from fedprune_cli.allocate.problem import TOLERANCE, Certificate, rate
from fedprune_cli.audit.protected import privacy_failures
from fedprune_cli.errors import CertificateError, CheckpointError
from fedprune_cli.meter import Measurement, build_load, downlink_s, measure
from fedprune_cli.round.bill import exchanging
from fedprune_cli.round.memory import next_slots
from fedprune_cli.round.plan import Plan, plan_round
from fedprune_cli.round.record import outcome_of_record
from fedprune_cli.round.roster import Roster, choose_roster
from fedprune_cli.round.setup import Setup
from fedprune_cli.runs.manifest import summarise
from fedprune_cli.store import folder
from fedprune_cli.store.memory import Slots
from fedprune_cli.store.record import KINDS, FaultLog, RoundRecord
from fedprune_cli.store.state import Array, State
from fedprune_cli.terminal import Table
from fedprune_cli.wire.masks import encode_mask
from fedprune_cli.wire.quantize import BITS_PER_PARAM, BLOCK
from fedprune_cli.world.faults import Moment

CVXPY_TOLERANCE = 1e-5  # of sum w x, Clarabel's own exactness on wild channels
METER_TOLERANCE = 1e-9  # relative: the same formulas, in another order
UNTOLD = ("gradient", "way_device", "way_sent", "way_due", "way_mask", "way_change")  # slots that no record tells


@dataclass(frozen=True)
class Findings:
    """What was checked and what was found; `failures` is empty for a sound run.

    rounds: finished ones, of `planned`, the first `inherited` of them of the run that this one branches from;
    finished: whether the run is; metered: device-rounds whose figures were computed again, of
    which `bounded` were held to bounds only; certified: rounds with a certificate.
    """

    rounds: int
    inherited: int
    planned: int
    finished: bool
    metered: int
    bounded: int
    certified: int
    residual: float
    gap: float
    solved_again: int
    unsolved: int
    difference: float
    failures: tuple[str, ...]

    def table(self) -> Table:
        """Returns the findings for the terminal."""
        state = "finished" if self.finished else "NOT FINISHED: what there is was checked; there is no summary yet"
        files = "all" if self.finished else "config.yaml, manifest.json, records, state and personal parts"
        elsewhere = (
            f"; {self.inherited} more are of the run it branches from: verify that one" if self.inherited else ""
        )
        facts = [
            ("rounds", f"{self.rounds} of {self.planned}, {state}"),
            ("checksums", f"{files} as written"),
            ("state and summary against the records", "the last round's clock, ratios and sums"),
            (
                "rounds whose recorded ratios and bandwidths follow from the configuration",
                f"{self.rounds - self.inherited}{elsewhere}",
            ),
            (
                "seconds, joules and bytes of a device's round, metered again",
                f"{self.metered}, {self.bounded} of them within bounds only",
            ),
            ("rounds with a certificate, recomputed", str(self.certified)),
            ("largest KKT residual", f"{self.residual:.2e}"),
            ("largest duality gap", f"{self.gap:.2e}"),
            (
                "rounds solved again by cvxpy (Clarabel)",
                f"{self.solved_again}, {self.unsolved} more it could not solve",
            ),
            ("largest difference of the objective", f"{self.difference:.2e}"),
            ("verdict", "sound" if not self.failures else f"{len(self.failures)} failures"),
        ]
        return Table.of_facts("audit", facts, ["check", "result"])


@dataclass(frozen=True)
class RoundAudit:
    """What the audit of one round found. metered: device-rounds computed again, of which `bounded` were held to bounds only;

    proof: the certificate computed again, where there is one; difference: how far cvxpy's optimum is off, None where it was not asked
    or, `unsolved`, had no answer.
    """

    failures: tuple[str, ...]
    metered: int = 0
    bounded: int = 0
    proof: Certificate | None = None
    difference: float | None = None
    unsolved: bool = False


def verify_run(setup: Setup, run_dir: Path, every: int) -> Findings:
    """Returns the findings on all recorded rounds; the Nth, 2Nth, ... are also solved by cvxpy, at their own deadline.

    Raises CheckpointError when a file is not what its checksum says: then nothing in it says anything.
    """
    experiment = setup.experiment
    folder.check(run_dir)
    if folder.is_pruned(run_dir):
        raise CheckpointError(f"{run_dir}: its checkpoint was pruned, there is no state to hold its records against")
    state, records, summary = (
        folder.read_whole_state(run_dir),
        folder.read_records(run_dir),
        folder.read_summary(run_dir),
    )
    slots, audits, failures = setup.initial.slots, list[RoundAudit](), list[str]()
    every = min(every, len(records))  # at least one
    for record in records:
        audit, slots = audit_round(setup, slots, record, solve=every > 0 and record.round % every == 0)
        failures += [f"round {record.round}: {what}" for what in audit.failures]
        audits.append(audit)
    failures += state_failures(state, records, slots)
    if summary is not None and summary != summarise(experiment, run_dir):
        failures.append("summary.json is not what the records and the state give")
    proofs = [audit.proof for audit in audits if audit.proof is not None]
    differences = [audit.difference for audit in audits if audit.difference is not None]
    begun = experiment.branch.round if experiment.branch else 0
    return Findings(
        rounds=len(records),
        inherited=min(begun, len(records)),
        planned=experiment.rounds,
        finished=summary is not None,
        metered=sum(audit.metered for audit in audits),
        bounded=sum(audit.bounded for audit in audits),
        certified=len(proofs),
        residual=max((proof.residual for proof in proofs), default=0.0),
        gap=max((abs(proof.gap) for proof in proofs), default=0.0),
        solved_again=len(differences),
        unsolved=sum(audit.unsolved for audit in audits),
        difference=max(differences, default=0.0),
        failures=tuple(failures),
    )


def audit_round(setup: Setup, slots: Slots, record: RoundRecord, *, solve: bool) -> tuple[RoundAudit, Slots]:
    """Returns what is wrong with a round, and what is remembered after it; slots: what was before; solve: also by cvxpy."""
    experiment, number = setup.experiment, record.round - 1
    if impossible := [*_impossible(setup, record)]:  # nothing can be computed from it
        return RoundAudit(tuple(impossible)), {**slots, "simulated_s": np.array(record.simulated_s)}
    roster = choose_roster(setup, number, slots)
    wrong = [*sum_failures(record, float(slots["simulated_s"]), roster.frozen, waits=experiment.failsafe.policy.waits)]
    if not len(roster.training):
        after: Slots = {**slots, "simulated_s": np.array(record.simulated_s)}
        if record.devices.id != roster.frozen.tolist():
            return RoundAudit((*wrong, "the recorded devices are not what the configuration gives")), after
        again = metering_failures(setup, record, roster, 0)
        return RoundAudit((*wrong, *again, *privacy_failures(setup, record, after)), metered=len(roster.frozen)), after
    after = next_slots(experiment, slots, outcome_of_record(record, slots))
    if experiment.branch and number < experiment.branch.round:  # allocated under another configuration
        return RoundAudit(tuple(wrong)), after
    plan = plan_round(setup, roster, slots)
    ratio, bandwidth_hz = (
        np.array(column[: len(plan.devices)]) for column in (record.devices.prune_ratio, record.devices.bandwidth_hz)
    )
    admitted = plan.allocation.admitted
    follows = (
        record.devices.id == [*plan.devices.tolist(), *roster.frozen.tolist()]
        and np.array_equal(ratio, plan.ratios[plan.devices])
        and np.array_equal(bandwidth_hz, plan.allocation.bandwidth_hz[admitted])
        and all(
            (column is None and key not in plan.chosen)
            or (column is not None and np.array_equal(column[: len(plan.devices)], plan.chosen.get(key, [])))
            for key, column in (("clock", record.devices.clock), ("power", record.devices.power))
        )
    )
    if not follows:
        return RoundAudit((*wrong, "the recorded allocation is not what the configuration gives")), after
    wrong += metering_failures(setup, record, roster, len(plan.devices))
    wrong += privacy_failures(setup, record, after, plan)
    count = len(record.devices.id)
    audit = RoundAudit(tuple(wrong), metered=count, bounded=count if setup.blueprint.layout.slices else 0)
    if not isinstance(experiment.allocator, Certifying) or plan.allocation.certificate is None or not len(plan.devices):
        return audit, after
    given = Answer(1 - plan.allocation.prune_ratio[admitted], bandwidth_hz, float(record.price_per_hz or 0.0))
    return _certified(audit, experiment.allocator, plan, given, solve=solve), after


def _unknown_devices(record: RoundRecord, num_devices: int) -> list[int]:
    """Returns the devices that a record names and that are none of the `num_devices` training ones: nothing is known of them."""
    log = record.faults or FaultLog()
    named = {*record.devices.id, *(device for kind in KINDS for device in log.of(kind))}
    return sorted(device for device in named if not 0 <= device < num_devices)


def _impossible(setup: Setup, record: RoundRecord) -> Iterator[str]:
    """Yields what no round of this run can have recorded."""
    num_devices, bits = setup.scenario.num_devices, setup.experiment.payload.bits
    if unknown := _unknown_devices(record, num_devices):
        yield f"device {unknown[0]} is none of the {num_devices} that train"
    if record.bits is not None and record.bits not in bits:
        yield f"bits is {record.bits}, must be one of {', '.join(map(str, bits))}"
    for key in ("rounding_error", "price_per_hz"):
        value = getattr(record, key)
        if value is not None and value < 0:
            yield f"{key} is {value!r}, must be at least 0"


@dataclass(frozen=True)
class Answer:
    """An allocation as recorded: what each device keeps [A], its bandwidth [A], and the price."""

    kept: Array
    bandwidth_hz: Array
    price_per_hz: float


def _certified(audit: RoundAudit, allocator: Certifying, plan: Plan, answer: Answer, *, solve: bool) -> RoundAudit:
    """Returns the audit with the certificate of a recorded answer, computed from its numbers alone; solve: also by cvxpy."""
    at = replace(plan.problem.take(plan.admitted_places), deadline_s=plan.allocation.deadline_s)
    proof = allocator.certify(at, answer.kept, answer.bandwidth_hz, answer.price_per_hz)
    audit = replace(audit, proof=proof)
    if not max(proof.residual, abs(proof.gap)) <= TOLERANCE:
        above = f"residual {proof.residual:.2e}, gap {proof.gap:.2e}, above {TOLERANCE:g}"
        audit = replace(audit, failures=(*audit.failures, above))
    if not solve or plan.allocation.block_hz is not None or plan.chosen:  # a conic solver knows no whole blocks
        return audit
    from fedprune_cli.allocate.reference import solve_p1_cvxpy

    try:
        if isinstance(allocator, Referenced):
            apart = allocator.apart(at, answer.kept, answer.bandwidth_hz)
        else:
            apart = abs(solve_p1_cvxpy(at)[0] - float(at.weight @ answer.kept)) / float(at.weight.sum())
    except CertificateError:
        return replace(audit, unsolved=True)
    if apart > CVXPY_TOLERANCE:
        audit = replace(audit, failures=(*audit.failures, f"cvxpy's optimum differs by {apart:.2e}"))
    return replace(audit, difference=apart)


def sum_failures(record: RoundRecord, before_s: float, frozen: Array, *, waits: bool) -> Iterator[str]:
    """Yields what is wrong with the sums of a round that began at `before_s`; waits: whether the server waits for late updates."""
    rows, log = record.devices, record.faults or FaultLog()
    missing = {*log.died, *log.lost, *log.delayed, *(() if waits else log.late)}
    of_device = list(zip(rows.id, rows.latency_s, strict=False))
    arrived_s = max((took for device, took in of_device if device not in missing and device not in frozen), default=0.0)
    waited_s = log.waited_s
    if record.deadline_s is not None and all(device in frozen for device in rows.id):  # nobody was admitted
        waited_s = record.deadline_s
    frozen_s = max((took for device, took in of_device if device in frozen), default=0.0)
    expected = {
        "latency_s": max(arrived_s + waited_s, frozen_s),
        "bytes_up": sum(rows.bytes_up),
        "joules": math.fsum(rows.joules),
        "simulated_s": before_s + record.latency_s,
    }
    for key, value in expected.items():
        if not math.isclose(getattr(record, key), value, rel_tol=METER_TOLERANCE):
            yield f"{key} is {getattr(record, key)!r}, its devices give {value!r}"
    for key in ("accuracy", "accuracy_mean", "accuracy_p10", "fresh_accuracy", "mean_ratio", "max_ratio"):
        share = getattr(record, key)
        if share is not None and not 0 <= share <= 1:
            yield f"{key} is {share!r}, must be in [0, 1]"


def metering_failures(setup: Setup, record: RoundRecord, roster: Roster, training: int) -> Iterator[str]:
    """Yields what differs from the meter's figures for the recorded ratios, bandwidths and bytes.

    The first `training` devices of the record trained u, the others are frozen.
    """
    experiment, size, slices = setup.experiment, setup.blueprint.cost.shared_params, setup.blueprint.layout.slices
    devices = np.array(record.devices.id, dtype=int)
    if not len(devices):
        return
    stopped = np.arange(len(devices)) >= training
    moment = Moment(experiment.seed, roster.number, experiment.rounds, setup.scenario.num_devices, devices[:training])
    work = np.append(
        experiment.faults.draw(moment).work, np.ones(len(devices) - training)
    )  # below 1 for who died in mid-round
    kept = np.rint((1 - np.array(record.devices.prune_ratio)) * size)
    coded = np.where(stopped, 0, code_bytes(kept, record.bits or BITS_PER_PARAM))
    up, down = setup.blueprint.exchanged_bytes(training)
    sent = setup.radio.sent_bytes(coded) + setup.radio.sent_bytes(np.array(float(up)))
    if wrong := [*_bytes_failures(record, sent, (work < 1) | slices, at_most=slices)]:
        yield from wrong
        return
    masks_bits = 8 * (record.bytes_down - down) - BITS_PER_PARAM * size  # what was broadcast beside u, keys and shares
    sends_masks = setup.blueprint.sends_masks
    flags = np.arange(setup.blueprint.layout.flags(size)) % 2 == 0
    most = 8 * len(devices) * len(encode_mask(flags)) if sends_masks else 0
    if not -1 <= masks_bits <= most + 8 and (not slices or masks_bits > most + 8):
        yield f"{record.bytes_down} bytes were broadcast, of which {masks_bits / 8:.0f} would be masks: must be in 0..{most // 8}"
    if slices or (stopped.any() and sends_masks):
        return
    gain_of_listeners = {
        False: roster.gain_linear[roster.training],
        True: roster.gain_linear[np.concatenate([roster.training, roster.frozen])],
    }
    heard_bits = {False: BITS_PER_PARAM * size + max(masks_bits, 0.0) + 8 * down, True: 8.0 * record.bytes_down}
    wait_s = {
        still: downlink_s(experiment.meter, experiment.channel, gain_of_listeners[still], heard_bits[still])
        for still in {*stopped.tolist()}
    }
    schedules = [
        setup.personal_schedule(device) if still else setup.schedule(device)
        for device, still in zip(devices.tolist(), stopped, strict=True)
    ]
    costs = [setup.blueprint.cost] * len(devices)
    clock, power = (None if of is None else np.array(of) for of in (record.devices.clock, record.devices.power))
    load = build_load(setup.scenario.fleet, devices, schedules, costs, setup.radio)
    load = replace(load, clock=clock, power=power)
    snr_hz = load.fleet.tx_power_w * roster.gain_linear[devices] / experiment.channel.noise_w_per_hz
    snr_hz = snr_hz if load.power is None else snr_hz * load.power
    again = measure(
        load,
        rate_bps=rate(np.array(record.devices.bandwidth_hz), snr_hz),
        kept=kept / max(size, 1),
        payload_bytes=coded,  # what was sent agrees with it, or was cut short
        bits_down=0.0,
        t_down_s=np.array([wait_s[still] for still in stopped.tolist()]),
    )
    again = exchanging(setup, again, load, roster.gain_linear[devices])
    again = again.cut_short(work, load.radio_power_w)
    if experiment.meter.idle:
        again = again.idling(load.fleet.idle_power_w, np.where(work < 1, again.latency_s, record.latency_s))
    yield from _meter_failures(record, again)


def _bytes_failures(record: RoundRecord, coded: Array, bounded: Array, *, at_most: bool) -> Iterator[str]:
    """Yields the first device whose bytes are not those of its ratio [K], or more than them where they are only bounded, bool [K]."""
    sent = np.array(record.devices.bytes_up, dtype=float)
    wrong = (sent > coded) | (~bounded & (sent != coded))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        bound = "at most " if at_most else ""
        yield f"device {record.devices.id[at]} sent {sent[at]:.0f} bytes, its ratio gives {bound}{coded[at]:.0f}"


def _meter_failures(record: RoundRecord, again: Measurement) -> Iterator[str]:
    for key in ("compute_s", "uplink_s", "downlink_s", "latency_s", "joules", "bytes_up"):
        recorded, computed = np.array(getattr(record.devices, key), dtype=float), getattr(again, key)
        apart = ~np.isclose(recorded, computed, rtol=METER_TOLERANCE, atol=0)
        if apart.any():
            at = int(np.flatnonzero(apart)[0])
            yield f"device {record.devices.id[at]}: {key} is {recorded[at]!r}, the meter gives {computed[at]!r}"
    if not math.isclose(record.flops, again.flops.sum(), rel_tol=METER_TOLERANCE):
        yield f"flops is {record.flops!r}, the meter gives {again.flops.sum()!r}"


def code_bytes(kept: Array, bits: int) -> Array:
    """Returns how many bytes the code of `kept` values [K] has: of a value that is rounded, its bits and its block's scale."""
    if bits == BITS_PER_PARAM:
        return 4 * kept
    return 4 * np.ceil(kept / BLOCK) + np.ceil(kept * bits / 8)


def state_failures(state: State, records: Sequence[RoundRecord], slots: Slots) -> list[str]:
    """Returns what in the checkpoint is not what the records lead to; `slots` is what they say that the next round knows."""
    ratios = np.zeros(len(state.personal))
    for record in records:
        if _unknown_devices(record, len(ratios)):
            continue
        ratios[record.devices.id] = record.devices.prune_ratio
    last = {"prune_ratio": ratios} | {name: value for name, value in slots.items() if name not in UNTOLD}
    failures = [
        f"the state's {name} is not what the records lead to"
        for name, value in last.items()
        if not np.allclose(state.slots[name], value, rtol=METER_TOLERANCE, atol=0, equal_nan=True)
    ]
    if state.round != len(records):
        failures.append(f"the state is of round {state.round}, there are {len(records)} records")
    trained = {device for record in records for device in record.devices.id}
    if len(state.personal.initial) and trained != {*np.flatnonzero(state.personal.place >= 0).tolist()}:
        failures.append("the state's personal parts are not those of the devices that trained")
    return failures
