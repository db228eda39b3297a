"""An audit of a finished run's allocations: certificates from the definitions, and cvxpy's own answer for some rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedprune_cli import folder
from fedprune_cli.allocate.kkt import TOLERANCE, certify
from fedprune_cli.errors import CertificateError
from fedprune_cli.run import (
    Record,
    Setup,
    allocate,
    estimate,
    frozen_devices,
    participants,
    round_problems,
    rounding_scale,
)
from fedprune_cli.state import Array

if TYPE_CHECKING:
    from rich.table import Table

CVXPY_TOLERANCE = 1e-5  # of sum w x, Clarabel's own exactness on wild channels


@dataclass(frozen=True)
class Findings:
    """What was checked and what was found; `failures` is empty for a sound run."""

    rounds: int
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
        table.add_row("rounds whose recorded ratios and bandwidths follow from the configuration", str(self.rounds))
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
    """Returns the findings on all recorded rounds; the Nth, 2Nth, ... are also solved by cvxpy, at their own deadline."""
    from fedprune_cli.allocate.reference import solve_p1_cvxpy

    experiment = setup.experiment
    records = folder.read_log(run_dir / "rounds.jsonl")
    failures: list[str] = []
    residual = gap = difference = 0.0
    certified = solved = unsolved = 0
    slots = dict(setup.initial.slots)
    for number, record in enumerate(records):
        conditions = setup.scenario.at(number)
        ids = participants(setup, conditions, number, slots)
        frozen = frozen_devices(setup, conditions, slots)
        if not len(ids):
            slots["simulated_s"] = np.array(record["simulated_s"])
            if record["devices"]["id"] != frozen.tolist():
                failures.append(f"round {record['round']}: the recorded devices are not what the configuration gives")
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
    return Findings(len(records), certified, residual, gap, solved, unsolved, difference, tuple(failures))
