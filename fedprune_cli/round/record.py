"""A finished round -> the facts that memories learn from, and its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedprune_cli.allocate.deadline import dense_deadline, equal_dense_latency
from fedprune_cli.learn.client import Score, Update
from fedprune_cli.meter import Measurement, accuracies
from fedprune_cli.round.bill import Bill
from fedprune_cli.round.evaluate import Scores
from fedprune_cli.round.plan import Plan
from fedprune_cli.round.setup import Setup
from fedprune_cli.round.work import Results, Work
from fedprune_cli.serve.deliver import Delivery
from fedprune_cli.store.memory import Outcome, Slots
from fedprune_cli.store.record import DeviceRows, FaultLog, PrivacyLog, RoundRecord
from fedprune_cli.store.state import Array, State


@dataclass(frozen=True)
class Finished:
    """A round, stage by stage: what was planned, done, charged and delivered."""

    plan: Plan
    work: Work
    results: Results
    bill: Bill
    delivery: Delivery

    @property
    def latency_s(self) -> float:
        """How long the round lasted: until the server stopped waiting, and the last frozen device was done."""
        return max(self.delivery.latency_s, self.bill.personal_s)

    def outcome(self, state: State, gradient: Array) -> Outcome:
        """Returns the facts that memories learn from; state: before the round; gradient: what the updates imply [U]."""
        plan, updates, admitted = self.plan, self.results.updates, len(self.plan.devices)
        secret = self.work.expected is not None
        rounding = [update.rounding_error for update in updates if update.rounding_error is not None]
        return Outcome(
            number=state.round,
            simulated_s=float(state.slots["simulated_s"] + self.latency_s),
            bits=plan.bits or 0,
            device_bits=None if plan.bits is not None else plan.sent_bits,
            rounding_error=float(np.mean(rounding)) if rounding else None,
            devices=plan.devices,
            prune_ratio=plan.ratios[plan.devices],
            pruning_error=self.work.pruning_error[:admitted],
            latency_s=self.bill.training.latency_s,
            train_loss=[update.train_loss for update in updates],
            deadline_s=plan.allocation.deadline_s,
            log=self.delivery.log,
            gradient=gradient,
            under_way=self.delivery.under_way,
            eligible=plan.eligible if secret else None,
        )


def outcome_of_record(record: RoundRecord, slots: Slots) -> Outcome:
    """Returns the facts of a round as its record tells them, for an audit; slots: what was remembered before it."""
    rows = record.devices
    stopped = slots["frozen"] if "frozen" in slots else np.zeros(len(slots["prune_ratio"]), dtype=np.uint8)
    training = sum(not stopped[device] for device in rows.id)  # they come first
    return Outcome(
        number=record.round - 1,
        simulated_s=record.simulated_s,
        bits=record.bits or 0,
        device_bits=None if rows.bits is None else np.array(rows.bits[:training], dtype=int),
        rounding_error=None if record.rounding_error is None else float(record.rounding_error),
        devices=np.array(rows.id[:training], dtype=int),
        prune_ratio=np.array(rows.prune_ratio[:training]),
        pruning_error=np.array(rows.pruning_error[:training]),
        latency_s=np.array(rows.latency_s[:training]),
        train_loss=rows.train_loss[:training],
        deadline_s=record.deadline_s or 0.0,
        log=record.faults or FaultLog(),
    )


def build_record(setup: Setup, new: State, finished: Finished, outcome: Outcome, scores: Scores) -> RoundRecord:
    """Returns the record of a round that ended in the state `new`: every figure modelled, none of them wall time."""
    plan, results, measured = finished.plan, finished.results, finished.bill.all
    problem, allocation, admitted = plan.reference, plan.allocation, plan.admitted_places
    samples, ids = setup.scenario.partition.train.sizes, plan.devices
    weights = samples[ids] / max(samples[ids].sum(), 1)
    certificate, gradient = allocation.certificate, np.zeros(0) if outcome.gradient is None else outcome.gradient
    frozen = len(results.personal_updates)
    really_failed = any(update.died or update.late for update in results.updates)  # on a node, and not by design
    given = {"bandwidth_hz": allocation.bandwidth_hz[admitted].tolist() + [0.0] * frozen}
    given |= {key: values.tolist() + [1.0] * frozen for key, values in plan.chosen.items()}
    given |= {} if plan.bits is not None else {"bits": plan.sent_bits.tolist() + [0] * frozen}
    given |= {} if plan.blocks is None else {"blocks": plan.blocks + [[] for _ in range(frozen)]}
    return RoundRecord(
        round=new.round,
        simulated_s=float(new.slots["simulated_s"]),
        latency_s=float(finished.latency_s),
        deadline_s=allocation.deadline_s,
        **accuracy_figures(setup, scores),
        train_loss=mean_loss(results.updates, samples),
        mean_ratio=float(plan.ratios[ids].mean()) if len(ids) else None,
        max_ratio=float(plan.ratios[ids].max()) if len(ids) else None,
        bits=plan.bits,
        rounding_error=outcome.rounding_error,
        bytes_up=int(measured.bytes_up.sum()),
        bytes_down=int(measured.bytes_down),
        joules=float(measured.joules.sum()),
        flops=float(measured.flops.sum()),
        grad_norm=float(np.linalg.norm(gradient.astype(np.float64))),
        pruning_error=float(np.dot(weights, outcome.pruning_error)) if len(ids) else None,
        dense_latency_s=dense_deadline(problem)[0],
        equal_dense_latency_s=equal_dense_latency(problem),
        price_per_hz=allocation.price_per_hz,
        residual=certificate.residual if certificate else None,
        gap=allocation.gap if allocation.gap is not None else certificate.gap if certificate else None,
        status=allocation.status,
        message=allocation.message,
        frozen=count_frozen(new),
        privacy=privacy_log(setup, new, finished),
        faults=outcome.log if setup.experiment.faulty or outcome.log.refused or really_failed else None,
        devices=device_rows(
            new,
            results.all,
            given,
            measured,
            finished.work.pruning_error,
            {} if setup.experiment.privacy.hides_scores else scores,
        ),
    )


def privacy_log(setup: Setup, new: State, finished: Finished) -> PrivacyLog | None:
    """Returns what protected the round, with what capping its cuts cost; None where nothing is protected."""
    plan, log = finished.plan, finished.delivery.privacy
    if log is None or log.exchange_bytes is None:
        return spent_log(setup, new, log)
    asked = plan.allocation.prune_ratio[plan.admitted_places]
    return spent_log(setup, new, replace(log, withheld=float(plan.ratios[plan.devices].mean() - asked.mean())))


def spent_log(setup: Setup, new: State, log: PrivacyLog | None = None) -> PrivacyLog | None:
    """Returns a round's log with what its run has spent of its budget so far, None where nothing is protected."""
    budget, settings = setup.budget, setup.experiment.privacy
    if budget is None:
        return None if settings.none else log or PrivacyLog()
    spent = budget.spent(int(new.slots["privacy_rounds"].max(initial=0)))
    return replace(log or PrivacyLog(), clip=settings.clip, noise=budget.one.noise, epsilon=spent)


def device_rows(
    new: State, updates: Sequence[Update], given: Mapping[str, Sequence[Any]], measured: Measurement, errors: Array, scores: Scores
) -> DeviceRows:  # fmt: skip
    """Returns the figures by device, all in the order of the updates; given: what the allocation gave them, bandwidth_hz and more."""
    ids = [update.device for update in updates]
    return DeviceRows(
        id=ids,
        prune_ratio=new.slots["prune_ratio"][ids].tolist(),
        **given,
        compute_s=measured.compute_s.tolist(),
        uplink_s=measured.uplink_s.tolist(),
        downlink_s=measured.downlink_s.tolist(),
        latency_s=measured.latency_s.tolist(),
        pruning_error=errors.tolist(),
        joules=measured.joules.tolist(),
        bytes_up=[int(size) for size in measured.bytes_up],
        bytes_down=None if measured.received is None else measured.received.tolist(),
        train_loss=[update.train_loss for update in updates],
        accuracy=[_accuracy(scores.get(device)) for device in ids] if scores else None,
    )


def mean_loss(updates: Sequence[Update], samples: Array) -> float | None:
    """Returns the training loss averaged with weights D_k over the devices that have one."""
    losses = {update.device: update.train_loss for update in updates if update.train_loss is not None}
    of = samples[list(losses)]
    return float(np.dot(of / max(of.sum(), 1), list(losses.values()))) if losses else None


def count_frozen(new: State) -> int | None:
    """Returns how many devices no longer train u from the next round on; None where none ever stops."""
    return int(new.slots["frozen"].sum()) if "frozen" in new.slots else None


def _accuracy(score: Score | None) -> float | None:
    return None if score is None else score.correct / score.total


def accuracy_figures(setup: Setup, scores: Scores) -> Mapping[str, float | None]:
    """Returns the accuracies of a record, None in a round that was not tested."""
    count = setup.scenario.num_devices
    own = {device: score for device, score in scores.items() if device < count}
    fresh = [score.correct / score.total for device, score in scores.items() if device >= count]
    samples = setup.scenario.partition.train.sizes
    nothing = dict.fromkeys(("accuracy", "accuracy_mean", "accuracy_p10"))
    figures = accuracies(own, samples) if own else nothing
    return {**figures, "fresh_accuracy": float(np.mean(fresh)) if fresh else None}
