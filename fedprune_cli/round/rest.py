"""A round at rest: every device is in outage, in quarantine, frozen, out of budget or not drawn. Nothing is sent; the frozen take steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedprune_cli.execute import Executor
from fedprune_cli.learn.prune import build_masks
from fedprune_cli.meter import Measurement
from fedprune_cli.round.bill import charge_frozen
from fedprune_cli.round.evaluate import evaluate_round
from fedprune_cli.round.record import accuracy_figures, count_frozen, device_rows, spent_log
from fedprune_cli.round.roster import Roster, spent
from fedprune_cli.round.setup import Setup
from fedprune_cli.round.work import personal_tasks, train_devices
from fedprune_cli.store.memory import Slots
from fedprune_cli.store.record import DeviceRows, FaultLog, RoundRecord
from fedprune_cli.store.state import State


def rest(setup: Setup, state: State, roster: Roster, workers: Executor) -> tuple[State, RoundRecord]:
    """Returns the state after the round, and its record. Memories learn nothing from it."""
    experiment, frozen = setup.experiment, roster.frozen
    masks = build_masks(experiment.pruner, state, state.slots["prune_ratio"], experiment.seed, setup.blueprint.layout)
    updates = train_devices(setup, workers, personal_tasks(setup, state, masks, frozen))
    measured = charge_frozen(setup, masks, frozen, roster.gain_linear[frozen]) if updates else None
    latency_s = float(measured.latency_s.max()) if measured else 0.0
    if measured and experiment.meter.idle:
        measured = measured.idling(setup.scenario.fleet.idle_power_w[frozen], np.full(len(frozen), latency_s))
    personal = state.personal.replaced({update.device: update.personal for update in updates})
    slots = {**state.slots, "simulated_s": state.slots["simulated_s"] + latency_s}
    new = replace(state, round=state.round + 1, personal=personal, slots=slots, masks=masks.arrays())
    scores = evaluate_round(setup, new, masks, workers)
    status, message = _why(setup, state.slots, roster, working=bool(updates))
    idle = RoundRecord(
        round=new.round,
        simulated_s=float(new.slots["simulated_s"]),
        latency_s=0.0,
        **accuracy_figures(setup, scores),
        deadline_s=None,
        train_loss=None,
        mean_ratio=None,
        max_ratio=None,
        bits=None,
        rounding_error=None,
        pruning_error=None,
        dense_latency_s=None,
        equal_dense_latency_s=None,
        price_per_hz=None,
        residual=None,
        gap=None,
        bytes_up=0.0,
        bytes_down=0.0,
        joules=0.0,
        flops=0.0,
        grad_norm=0.0,
        status=status,
        message=message,
        frozen=count_frozen(new),
        privacy=spent_log(setup, new),
        faults=FaultLog(quarantined=roster.quarantined.tolist()) if experiment.faulty else None,
        devices=DeviceRows(),
    )
    if measured is None:
        return new, idle
    rows = device_rows(
        new,
        updates,
        {"bandwidth_hz": [0.0] * len(updates)},
        measured,
        masks.dropped_norms(state.shared, frozen),
        scores,
    )
    return new, _charged(idle, measured, rows)


def _why(setup: Setup, slots: Slots, roster: Roster, *, working: bool) -> tuple[str, str]:
    """Returns the status and the message of a round that nobody trained the shared part in."""
    if not len(roster.here):
        return "idle", "every device is in outage"
    if len(roster.able):
        return "idle", f"the draw took none of the {len(roster.able)} devices that could take part"
    if setup.budget is not None and not len(np.setdiff1d(roster.here, spent(setup, slots))):
        used, of = setup.budget.spent(setup.budget.rounds), f"{setup.budget.epsilon:g} at delta {setup.budget.delta:g}"
        return "spent", f"every device that is not in outage has spent its privacy budget: epsilon {used:.4g} of {of}"
    if np.isin(roster.here, roster.quarantined).any() and not working:
        return "idle", "every device that is not in outage is in quarantine or frozen"
    return "frozen", "every device that is not in outage is frozen"


def _charged(idle: RoundRecord, measured: Measurement, rows: DeviceRows) -> RoundRecord:
    """Returns the record with what the frozen devices cost; with nothing to send, it is the same on any bandwidth."""
    latency_s = float(measured.latency_s.max())
    return replace(
        idle,
        latency_s=latency_s,
        bytes_down=int(measured.bytes_down),
        joules=float(measured.joules.sum()),
        flops=float(measured.flops.sum()),
        dense_latency_s=latency_s,
        equal_dense_latency_s=latency_s,
        devices=rows,
    )
