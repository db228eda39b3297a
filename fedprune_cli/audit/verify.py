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
from fedprune_cli.allocate.certificate import TOLERANCE, Certificate
from fedprune_cli.audit.metering import METER_TOLERANCE, metering_failures, sum_failures
from fedprune_cli.audit.protected import privacy_failures
from fedprune_cli.errors import CertificateError, CheckpointError
from fedprune_cli.round.memory import next_slots
from fedprune_cli.round.plan import Plan, plan_round
from fedprune_cli.round.record import outcome_of_record
from fedprune_cli.round.roster import choose_roster
from fedprune_cli.round.setup import Setup
from fedprune_cli.runs.manifest import summarise
from fedprune_cli.store import folder
from fedprune_cli.store.memory import Slots
from fedprune_cli.store.record import KINDS, FaultLog, RoundRecord
from fedprune_cli.store.state import Array, State
from fedprune_cli.terminal import Table

CVXPY_TOLERANCE = 1e-5  # of sum w x, Clarabel's own exactness on wild channels
UNTOLD = ("gradient", "way_device", "way_sent", "way_due", "way_mask", "way_change")  # slots that no record tells


@dataclass(frozen=True)
class Findings:
    """What was checked and what was found; `failures` is empty for a sound run.

    rounds: finished ones, of `planned`, the first `inherited` of them of the run that this one branches from;
    finished: whether the run is; metered: device-rounds whose figures were computed again, of
    which `bounded` were held to bounds only; certified: rounds with a certificate; open_gap: the largest gap to its bound of a round
    that is not proven optimal, None where there is none.
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
    open_gap: float | None = None

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
            *(
                []
                if self.open_gap is None
                else [("largest gap to a bound, where none is proven the best", f"{self.open_gap:.2e}")]
            ),
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
    or, `unsolved`, had no answer; open_gap: to the bound computed again, of an answer that is not proven the best.
    """

    failures: tuple[str, ...]
    metered: int = 0
    bounded: int = 0
    proof: Certificate | None = None
    difference: float | None = None
    unsolved: bool = False
    open_gap: float | None = None


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
        open_gap=max((audit.open_gap for audit in audits if audit.open_gap is not None), default=None),
    )


def audit_round(setup: Setup, slots: Slots, record: RoundRecord, *, solve: bool) -> tuple[RoundAudit, Slots]:
    """Returns what is wrong with a round, and what is remembered after it; slots: what was before; solve: also by cvxpy."""
    experiment, number = setup.experiment, record.round - 1
    if impossible := [*_impossible(setup, record)]:  # nothing can be computed from it
        return RoundAudit(tuple(impossible)), {**slots, "simulated_s": np.array(record.simulated_s)}
    roster = choose_roster(setup, number, slots)
    wrong = [*sum_failures(record, float(slots["simulated_s"]), roster.frozen, waits=experiment.failsafe.policy.waits)]
    if not len(roster.asked):
        after: Slots = {**slots, "simulated_s": np.array(record.simulated_s)}
        if record.devices.id != roster.frozen.tolist():
            return RoundAudit((*wrong, "the recorded devices are not what the configuration gives")), after
        again = metering_failures(setup, record, roster, None)
        return RoundAudit((*wrong, *again, *privacy_failures(setup, record, after)), metered=len(roster.frozen)), after
    outcome = outcome_of_record(record, slots)
    if experiment.branch and number < experiment.branch.round:  # allocated under another configuration
        return RoundAudit(tuple(wrong)), next_slots(experiment, slots, outcome)
    plan = plan_round(setup, roster, slots)
    after = next_slots(experiment, slots, replace(outcome, eligible=plan.eligible if experiment.secret_draw else None))
    ratio, bandwidth_hz = (
        np.array(column[: len(plan.devices)]) for column in (record.devices.prune_ratio, record.devices.bandwidth_hz)
    )
    admitted = plan.allocation.admitted
    takes = plan.admitted_places
    follows = (
        record.devices.id == [*plan.devices.tolist(), *roster.frozen.tolist()]
        and np.array_equal(ratio, plan.ratios[plan.devices])
        and np.array_equal(bandwidth_hz, plan.allocation.bandwidth_hz[takes])
        and all(
            (column is None and key not in plan.chosen)
            or (column is not None and np.array_equal(column[: len(plan.devices)], plan.chosen.get(key, [])))
            for key, column in (("clock", record.devices.clock), ("power", record.devices.power))
        )
        and (plan.bits is not None or record.bits is None)
        and [*(record.devices.bits or [])][: len(plan.devices)] == ([] if plan.bits else plan.sent_bits.tolist())
        and (None if record.devices.blocks is None else [*record.devices.blocks][: len(plan.devices)]) == plan.blocks
    )
    if not follows:
        return RoundAudit((*wrong, "the recorded allocation is not what the configuration gives")), after
    if (gap := plan.allocation.gap) is not None and not math.isclose(record.gap or 0.0, gap, rel_tol=METER_TOLERANCE):
        wrong.append(f"gap is {record.gap!r}, the bound gives {gap!r}")
    wrong += metering_failures(setup, record, roster, plan)
    wrong += privacy_failures(setup, record, after, plan)
    count = len(record.devices.id)
    bounded = count if setup.blueprint.layout.slices else 0
    audit = RoundAudit(tuple(wrong), metered=count, bounded=bounded, open_gap=plan.allocation.gap)
    if not isinstance(experiment.allocator, Certifying) or plan.allocation.certificate is None or not admitted.any():
        return audit, after
    # with what those have who were not drawn, where they are planned for
    shares_hz = plan.allocation.bandwidth_hz.copy()
    shares_hz[takes] = bandwidth_hz
    given = Answer(1 - plan.allocation.prune_ratio[admitted], shares_hz[admitted], float(record.price_per_hz or 0.0))
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
    if odd := [of for of in record.devices.bits or () if of not in (0, *bits)]:
        yield f"the bits of a device are {odd[0]}, must be one of {', '.join(map(str, bits))}"
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
    at = replace(plan.problem.take(np.flatnonzero(plan.allocation.admitted)), deadline_s=plan.allocation.deadline_s)
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
