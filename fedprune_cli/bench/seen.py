"""What a pilot's rounds took on each device, read from its folder beside what the model said of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from fedprune_cli.errors import CheckpointError
from fedprune_cli.nodes.energy import read_row
from fedprune_cli.round.setup import Setup
from fedprune_cli.store import folder
from fedprune_cli.store.files import MAX_BYTES, fits, parse_json, read_bytes
from fedprune_cli.store.record import RoundRecord
from fedprune_cli.store.state import Array

LEAST_ROUNDS = 3  # of a device: the median of fewer is no better than any of them
NODE = {"device": int, "compute_s": float, "waiting_s": float}
TIMING = {"round": int, "nodes": [NODE]}
WAYS = {"uplink_s": float, "downlink_s": float, "test_downlink_s": float}  # the last where the round before was tested
SHORTEST_S = 1e-6  # of what was measured: a clock that did not move measures nothing


@dataclass(frozen=True)
class Seen:
    """One device's rounds, float64 [R] each.

    round: their numbers; work_s: the seconds that its FLOPs should take by the run's own fleet, at its full clock; steps: of a round;
    modelled_compute_s, modelled_uplink_s: by the run's records; compute_s, uplink_s: measured; bits: really encoded for the uplink;
    downlink_s: until u was there, whether a test of the round before or the task brought it; bits_down: of the round's broadcast, or of the
    copy of its own, by the run's records.
    """

    device: int
    round: Array
    work_s: Array
    steps: Array
    modelled_compute_s: Array
    compute_s: Array
    bits: Array
    modelled_uplink_s: Array
    uplink_s: Array
    modelled_downlink_s: Array
    downlink_s: Array
    bits_down: Array

    @property
    def measured_s(self) -> Array:
        """What the rounds took on this device, until its update was with the server [R]."""
        return self.downlink_s + self.compute_s + self.uplink_s

    @property
    def modelled_s(self) -> Array:
        """The same by the run's records [R]."""
        return self.modelled_downlink_s + self.modelled_compute_s + self.modelled_uplink_s


@dataclass(frozen=True)
class Pilot:
    """All devices of a run on nodes, each with LEAST_ROUNDS rounds or more. unicast: whether each was metered a copy of its own."""

    seen: tuple[Seen, ...]
    unicast: bool


def read_pilot(setup: Setup, run_dir: Path) -> Pilot:
    """Returns what was measured in a run on nodes; raises CheckpointError for a run without nodes, a damaged line, or too few rounds.

    Left out are devices that died in mid-round or moved nothing, of whose work the record says less than was done.
    """
    records = {record.round: record for record in folder.read_records(run_dir)}
    timings = {number: nodes for number, nodes in _timings(run_dir) if number in records}
    rows: dict[int, list[tuple[float, ...]]] = {device: [] for device in range(setup.scenario.num_devices)}
    brought: dict[float, float] = {}
    for number, nodes in sorted(timings.items()):
        for node in nodes:
            row = _row(setup, records[number], node, brought.get(node["device"], 0.0))
            if row is not None:
                rows[int(node["device"])].append(row)
        brought = {node["device"]: node.get("test_downlink_s", 0.0) for node in nodes}
    for device, found in rows.items():
        if len(found) < LEAST_ROUNDS:
            raise CheckpointError(
                f"{run_dir}: device-{device} has {len(found)} measured rounds: must be at least {LEAST_ROUNDS} to fit it"
            )
    seen = tuple(Seen(device, *np.array(found, dtype=float).T) for device, found in sorted(rows.items()))
    return Pilot(seen, setup.experiment.meter.unicast)


@dataclass(frozen=True)
class Drawn:
    """What a device drew while it trained: of what (`nodes.energy`), in how many rounds, and the medians over these of both figures.

    modelled_j: by the run's records, where it is of computing and of the radio.
    """

    device: int
    of: str
    rounds: int
    measured_j: float
    modelled_j: float


def read_drawn(run_dir: Path) -> tuple[Drawn, ...]:
    """Returns what nodes measured in a run, by device and by what it is of; nothing of those that measured nothing."""
    found = dict[tuple[int, str], list[tuple[float, float]]]()
    for number, nodes in _timings(run_dir):
        for node in nodes:
            try:
                drawn, modelled_j = read_row(node)
            except ValueError as reason:
                raise CheckpointError(f"{run_dir / folder.TIMINGS}: round {number} is damaged ({reason})") from None
            if drawn is not None and modelled_j is not None:
                found.setdefault((int(node["device"]), drawn.of), []).append((drawn.joules, modelled_j))
    return tuple(
        Drawn(device, of, len(joules), *map(float, np.median(joules, axis=0)))
        for (device, of), joules in sorted(found.items())
    )


def _timings(run_dir: Path) -> Iterable[tuple[int, list[Mapping[str, float]]]]:
    """Yields the number of each round in timings.jsonl, and what was measured on its nodes; raises CheckpointError."""
    path = run_dir / folder.TIMINGS
    for number, line in enumerate(read_bytes(path, MAX_BYTES, CheckpointError).splitlines(), start=1):
        try:
            value = parse_json(line)
        except ValueError as reason:
            raise CheckpointError(f"{path}: line {number} is damaged ({reason})") from None
        if isinstance(value, dict) and "nodes" not in value:
            raise CheckpointError(
                f"{run_dir}: a run without nodes, of which nothing was measured; `fedprune serve` makes one with them"
            )
        if not fits(value, TIMING):
            raise CheckpointError(f"{path}: line {number} is damaged (not the seconds of a round on nodes)")
        if any("carried_s" in node for node in value["nodes"]):
            raise CheckpointError(
                f"{run_dir}: a run over Flower, whose messages nobody sees arrive: only execution.kind=nodes can be fitted"
            )
        if not all(fits({"test_downlink_s": 0.0, **node}, WAYS) for node in value["nodes"]):
            raise CheckpointError(f"{path}: line {number} is damaged (not the seconds of a round on nodes)")
        yield value["round"], cast(list[Mapping[str, float]], value["nodes"])


def _row(setup: Setup, record: RoundRecord, node: Mapping[str, float], brought_s: float) -> tuple[float, ...] | None:
    """Returns one round of a device as `Seen` has it; None where it is left out."""
    rows, device = record.devices, int(node["device"])
    died = record.faults is not None and device in record.faults.died
    if device not in rows.id or died or min(node[key] for key in ("compute_s", "uplink_s")) < SHORTEST_S:
        return None
    at = list(rows.id).index(device)
    if not rows.bytes_up[at]:
        return None
    fleet, clock = setup.scenario.fleet, 1.0 if rows.clock is None else rows.clock[at]
    steps = sum(phase.steps for phase in setup.schedule(device))
    fixed_s = 0.0 if fleet.practice is None else steps * float(fleet.practice.step_s[device])
    return (
        record.round, rows.compute_s[at] * clock - fixed_s, steps, rows.compute_s[at], node["compute_s"],
        8 * rows.bytes_up[at] / setup.radio.attempts, rows.uplink_s[at], node["uplink_s"],
        rows.downlink_s[at], node["downlink_s"] + brought_s,
        8 * (record.bytes_down if rows.bytes_down is None else rows.bytes_down[at]),
    )  # fmt: skip
