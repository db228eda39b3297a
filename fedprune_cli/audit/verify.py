"""An audit of a run: checksums, records against state and summary, the meter's figures again, certificates, cvxpy's own answers.

What cannot be known without training again is taken from the record: how many entries of a slice of whole channels a device kept,
and how long the masks were that were sent; both are held to what they can be at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprune_cli.allocate.kkt import certify
from fedprune_cli.allocate.problem import TOLERANCE, rate
from fedprune_cli.errors import CertificateError, CheckpointError
from fedprune_cli.meter import build_load, downlink_s, measure
from fedprune_cli.round.all import (
    Record,
    Setup,
    allocate,
    estimate,
    frozen_devices,
    participants,
    plan,
    round_problems,
    rounding_scale,
    sends_masks,
    summarise,
)
from fedprune_cli.store import folder
from fedprune_cli.store.state import Array, State
from fedprune_cli.wire.masks import encode_mask
from fedprune_cli.wire.quantize import BITS_PER_PARAM, BLOCK

if TYPE_CHECKING:
    from rich.table import Table

CVXPY_TOLERANCE = 1e-5  # of sum w x, Clarabel's own exactness on wild channels
LEARNED = (
    "simulated_s",
    "frozen",
    "recent_loss",
    "rounding",
    "error_per_ratio",
)  # of the state's slots, what records tell
METER_TOLERANCE = 1e-9  # relative: the same formulas, in another order


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
        from rich.table import Table

        table = Table("check", "result")
        state = "finished" if self.finished else "NOT FINISHED: what there is was checked; there is no summary yet"
        table.add_row("rounds", f"{self.rounds} of {self.planned}, {state}")
        files = "all" if self.finished else "config.yaml, manifest.json, records, state and personal parts"
        table.add_row("checksums", f"{files} as written")
        table.add_row("state and summary against the records", "the last round's clock, ratios and sums")
        followed = f"{self.rounds - self.inherited}" + (
            f"; {self.inherited} more are of the run it branches from: verify that one" if self.inherited else ""
        )
        table.add_row("rounds whose recorded ratios and bandwidths follow from the configuration", followed)
        table.add_row(
            "seconds, joules and bytes of a device's round, metered again",
            f"{self.metered}, {self.bounded} of them within bounds only",
        )
        table.add_row("rounds with a certificate, recomputed", str(self.certified))
        table.add_row("largest KKT residual", f"{self.residual:.2e}")
        table.add_row("largest duality gap", f"{self.gap:.2e}")
        table.add_row(
            "rounds solved again by cvxpy (Clarabel)", f"{self.solved_again}, {self.unsolved} more it could not solve"
        )
        table.add_row("largest difference of the objective", f"{self.difference:.2e}")
        table.add_row("verdict", "sound" if not self.failures else f"{len(self.failures)} failures")
        return table


def next_slots(setup: Setup, slots: Mapping[str, Array], record: Record) -> dict[str, Array]:
    """Returns what the next round's problem needs to know, from a round's record."""
    ids, ratio, error, loss = (
        record["devices"].get(key, []) for key in ("id", "prune_ratio", "pruning_error", "train_loss")
    )
    training = sum(not slots["frozen"][device] for device in ids) if "frozen" in slots else len(ids)  # they come first
    devices = np.array(ids[:training], dtype=int)
    learned = setup.experiment.weights.next_slots(
        slots, devices, np.array(ratio[:training]), np.array(error[:training])
    )
    stopped = setup.experiment.participation.next_slots(slots, devices, loss[:training])
    if "faults" in record:
        latency_s = np.array(record["devices"].get("latency_s", [])[:training])
        guarded = setup.experiment.failsafe.next_slots(
            slots, record["round"] - 1, devices, latency_s, record["deadline_s"], record["faults"]
        )
        learned |= guarded
    if "rounding" in slots and record["rounding_error"] is not None:
        learned["rounding"] = rounding_scale(record["bits"], record["rounding_error"])
    return {**slots, **learned, **stopped, "simulated_s": np.array(record["simulated_s"])}


def verify_run(setup: Setup, run_dir: Path, every: int) -> Findings:
    """Returns the findings on all recorded rounds; the Nth, 2Nth, ... are also solved by cvxpy, at their own deadline.

    Raises CheckpointError when a file is not what its checksum says: then nothing in it says anything.
    """
    from fedprune_cli.allocate.reference import solve_p1_cvxpy

    experiment = setup.experiment
    folder.check(run_dir)
    if folder.is_pruned(run_dir):
        raise CheckpointError(f"{run_dir}: its checkpoint was pruned, there is no state to hold its records against")
    state, records, summary = (
        folder.read_whole_state(run_dir),
        folder.read_records(run_dir),
        folder.read_summary(run_dir),
    )
    failures: list[str] = []
    residual = gap = difference = 0.0
    certified = solved = unsolved = metered = bounded = 0
    slots = dict(setup.initial.slots)
    begun = experiment.branch.round if experiment.branch else 0
    for number, record in enumerate(records):
        conditions = setup.scenario.at(number)
        ids = participants(setup, conditions, number, slots)
        frozen = frozen_devices(setup, conditions, slots)
        wrong = sums(record, float(slots["simulated_s"]), frozen, waits=experiment.failsafe.late == "wait")
        failures += [f"round {record['round']}: {what}" for what in wrong]
        if not len(ids):
            slots["simulated_s"] = np.array(record["simulated_s"])
            if record["devices"]["id"] != frozen.tolist():
                failures.append(f"round {record['round']}: the recorded devices are not what the configuration gives")
                continue
            metered += len(frozen)
            failures += [
                f"round {record['round']}: {what}" for what in meter_again(setup, record, number, 0, ids, frozen)
            ]
            continue
        if number < begun:  # allocated under another configuration: the run it branches from
            slots = next_slots(setup, slots, record)
            continue
        believed, gain = estimate(setup, conditions.gain_linear, number)
        problems = round_problems(believed, ids, gain[ids], number, slots)
        bits, allocation = allocate(experiment, problems, number, slots)
        problem = problems.by_bits[bits]
        slots = next_slots(setup, slots, record)
        taking = np.flatnonzero(allocation.admitted)
        recorded = np.array([record["devices"][key][: len(taking)] for key in ("prune_ratio", "bandwidth_hz")])
        recomputed = np.array([allocation.prune_ratio[taking], allocation.bandwidth_hz[taking]])
        if record["devices"]["id"] != [*ids[taking].tolist(), *frozen.tolist()] or not np.array_equal(
            recorded, recomputed
        ):
            failures.append(f"round {record['round']}: the recorded allocation is not what the configuration gives")
            continue
        again = meter_again(setup, record, number, taking.size, ids, frozen)
        failures += [f"round {record['round']}: {what}" for what in again]
        metered += len(record["devices"]["id"])
        bounded += len(record["devices"]["id"]) if setup.layout is not None else 0
        if allocation.certificate is None or not len(taking):
            continue
        certified += 1
        at = replace(problem.take(taking), deadline_s=allocation.deadline_s)
        proof = certify(at, 1 - recorded[0], recorded[1], float(record["price_per_hz"]))
        residual, gap = max(residual, proof.residual), max(gap, abs(proof.gap))
        if not max(proof.residual, abs(proof.gap)) <= TOLERANCE:
            failures.append(
                f"round {record['round']}: residual {proof.residual:.2e}, gap {proof.gap:.2e}, above {TOLERANCE:g}"
            )
        if every > 0 and (number + 1) % every == 0:
            try:
                objective, _ = solve_p1_cvxpy(at)
            except CertificateError:
                unsolved += 1
                continue
            solved += 1
            apart = abs(objective - float(at.weight @ (1 - recorded[0]))) / float(at.weight.sum())
            difference = max(difference, apart)
            if apart > CVXPY_TOLERANCE:
                failures.append(f"round {record['round']}: cvxpy's optimum differs by {apart:.2e}")
    failures += state_failures(state, records, slots)
    if summary is not None and summary != summarise(experiment, run_dir):
        failures.append("summary.json is not what the records and the state give")
    return Findings(
        len(records), min(begun, len(records)), experiment.rounds, summary is not None, metered, bounded, certified,
        residual, gap, solved, unsolved, difference, tuple(failures),
    )  # fmt: skip


def sums(record: Record, before_s: float, frozen: Array, *, waits: bool) -> Iterator[str]:
    """Yields what is wrong with the sums of a round that began at `before_s`; waits: whether the server waits for late updates."""
    devices, log = record["devices"], record.get("faults", {})
    columns = {key: devices.get(key) or [0.0] for key in ("latency_s", "bytes_up", "joules", "prune_ratio")}
    missing = {
        device for kind in ("died", "lost", "delayed", *([] if waits else ["late"])) for device in log.get(kind, ())
    }
    of_device = list(zip(devices["id"], columns["latency_s"], strict=False))
    arrived_s = max((took for device, took in of_device if device not in missing and device not in frozen), default=0.0)
    frozen_s = max((took for device, took in of_device if device in frozen), default=0.0)
    expected = {
        "latency_s": max(arrived_s + log.get("waited_s", 0.0), frozen_s),
        "bytes_up": sum(columns["bytes_up"]),
        "joules": math.fsum(columns["joules"]),
        "simulated_s": before_s + record["latency_s"],
    }
    for key, value in expected.items():
        if not math.isclose(record[key], value, rel_tol=METER_TOLERANCE):
            yield f"{key} is {record[key]!r}, its devices give {value!r}"
    for key in ("accuracy", "accuracy_mean", "accuracy_p10", "fresh_accuracy", "mean_ratio", "max_ratio"):
        if record[key] is not None and not 0 <= record[key] <= 1:
            yield f"{key} is {record[key]!r}, must be in [0, 1]"


def meter_again(setup: Setup, record: Record, number: int, training: int, ids: Array, frozen: Array) -> Iterator[str]:
    """Yields what differs from the meter's figures for the recorded ratios, bandwidths and bytes; the frozen devices stand last."""
    experiment, size, rows = setup.experiment, setup.cost.shared_params, record["devices"]
    devices, gain = np.array(rows["id"], dtype=int), setup.scenario.at(number).gain_linear
    if not len(devices):
        return
    stopped = np.arange(len(devices)) >= training
    sent = np.array(rows["bytes_up"], dtype=float)
    kept = np.rint((1 - np.array(rows["prune_ratio"])) * size)
    coded = code_bytes(kept, record["bits"] or BITS_PER_PARAM)
    fates = experiment.faults.draw(
        experiment.seed, number, experiment.rounds, setup.scenario.num_devices, devices[:training]
    )
    work = np.append(fates.work, np.ones(len(devices) - training))  # below 1 for who died in mid-round
    at_most = work < 1 if setup.layout is None else np.ones(len(devices), dtype=bool)
    wrong = (sent > np.where(stopped, 0, coded)) | (~at_most & (sent != np.where(stopped, 0, coded)))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        yield f"device {devices[at]} sent {sent[at]:.0f} bytes, its ratio gives {'' if setup.layout is None else 'at most '}{coded[at]:.0f}"
    if setup.layout is not None and record["bits"] == BITS_PER_PARAM:
        kept = np.where(stopped, kept, sent / 4)
    share = kept / max(size, 1)
    masks = 8 * record["bytes_down"] - BITS_PER_PARAM * size  # what was broadcast beside u
    units = size if setup.layout is None else sum(group.units for group in setup.layout.groups)
    most = 8 * len(devices) * len(encode_mask(np.arange(units) % 2 == 0)) if sends_masks(setup) else 0
    exact = setup.layout is None
    if not -1 <= masks <= most + 8 and (exact or masks > most + 8):
        yield f"{record['bytes_down']} bytes were broadcast, of which {masks / 8:.0f} would be masks: must be in 0..{most // 8}"
    if not exact or (stopped.any() and sends_masks(setup)):
        return
    bits_down = np.where(stopped, 8.0 * record["bytes_down"], BITS_PER_PARAM * size + max(masks, 0.0))
    hears = {False: gain[ids], True: gain[np.concatenate([ids, frozen])]}
    plans = [plan(setup, device, frozen=bool(still)) for device, still in zip(devices, stopped, strict=True)]
    load = build_load(setup.scenario.fleet, devices, plans, [setup.cost] * len(devices), experiment.training.batch_size)
    snr_hz = load.fleet.tx_power_w * gain[devices] / experiment.channel.noise_w_per_hz
    again = measure(
        load,
        rate_bps=rate(np.array(rows["bandwidth_hz"]), snr_hz),
        kept=share,
        payload_bytes=np.where(work < 1, coded, sent),
        bits_down=0.0,
        t_down_s=np.array(
            [
                downlink_s(experiment.meter, experiment.channel, hears[bool(still)], bits)
                for bits, still in zip(bits_down, stopped, strict=True)
            ]
        ),
    )
    again = again.cut_short(work, load.fleet.tx_power_w)
    for key in ("compute_s", "uplink_s", "downlink_s", "latency_s", "joules", "bytes_up"):
        recorded, computed = np.array(rows[key], dtype=float), getattr(again, key)
        apart = ~np.isclose(recorded, computed, rtol=METER_TOLERANCE, atol=0)
        if apart.any():
            at = int(np.flatnonzero(apart)[0])
            yield f"device {devices[at]}: {key} is {recorded[at]!r}, the meter gives {computed[at]!r}"
    if not math.isclose(record["flops"], again.flops.sum(), rel_tol=METER_TOLERANCE):
        yield f"flops is {record['flops']!r}, the meter gives {again.flops.sum()!r}"


def code_bytes(kept: Array, bits: int) -> Array:
    """Returns how many bytes the code of `kept` values [K] has: of a value that is rounded, its bits and its block's scale."""
    if bits == BITS_PER_PARAM:
        return 4 * kept
    return 4 * np.ceil(kept / BLOCK) + np.ceil(kept * bits / 8)


def state_failures(state: State, records: list[Record], slots: Mapping[str, Array]) -> list[str]:
    """Returns what in the checkpoint is not what the records lead to; `slots` is what they say that the next round knows."""
    last: dict[str, Any] = {
        "prune_ratio": np.zeros(len(state.personal)),
        **{k: v for k, v in slots.items() if k in LEARNED},
    }
    for record in records:
        last["prune_ratio"][record["devices"]["id"]] = record["devices"].get("prune_ratio", [])
    failures = [
        f"the state's {name} is not what the records lead to"
        for name, value in last.items()
        if not np.allclose(state.slots[name], value, rtol=METER_TOLERANCE, atol=0, equal_nan=True)
    ]
    if state.round != len(records):
        failures.append(f"the state is of round {state.round}, there are {len(records)} records")
    trained = {device for record in records for device in record["devices"]["id"]}
    if len(state.personal.initial) and trained != {*np.flatnonzero(state.personal.place >= 0).tolist()}:
        failures.append("the state's personal parts are not those of the devices that trained")
    return failures
