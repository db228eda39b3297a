"""An allocation by itself, and allocators compared by deadline: as JSON, for the terminal and as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from fedprune_cli.allocate.baselines import Allocator
from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.joules import joules, least_joules
from fedprune_cli.allocate.policy import settle
from fedprune_cli.allocate.problem import Problem
from fedprune_cli.allocate.variants import deadlines_at, frontier_answers, least_mean
from fedprune_cli.report import figures
from fedprune_cli.report.page import csv_text, seconds, write_files
from fedprune_cli.report.tables import cell
from fedprune_cli.round.first import FirstRound
from fedprune_cli.terminal import Table

FRONTIER_FRACTIONS = (*np.round(np.arange(0.2, 1.05, 0.05), 2), 1.2, 1.5, 2.0)  # later, only joules fall


class Proof(TypedDict):
    """How far an allocation is from the exact conditions of optimality: the largest KKT residual, and the duality gap, both relative."""

    residual: float
    gap: float


class _Named(TypedDict, total=False):
    name: str


class _Whole(TypedDict, total=False):
    blocks: int
    block_ids: list[int]


class _Spending(TypedDict, total=False):
    joules: float


class _Chosen(TypedDict, total=False):
    clock: float
    cpu_hz: float
    power: float
    tx_power_w: float


class _Compressed(TypedDict, total=False):
    bits: int


class _Bounded(TypedDict, total=False):
    gap: float


class DeviceAnswer(TypedDict):
    """What one device gets. name: what the table calls it, where it does; blocks: of whole ones; block_ids: which, where each has a gain
    of its own; bits: of a value, where each device has its own; binds: which limit holds it;
    clock, power: where they are chosen, what of its full clock and radiated power it uses, and cpu_hz, tx_power_w where they are known;
    joules: of computing and sending, where the objective looks at them.
    """

    id: int
    name: NotRequired[str]
    prune_ratio: float
    bandwidth_hz: float
    blocks: NotRequired[int]
    block_ids: NotRequired[list[int]]
    bits: NotRequired[int]
    clock: NotRequired[float]
    cpu_hz: NotRequired[float]
    power: NotRequired[float]
    tx_power_w: NotRequired[float]
    rate_bps: float
    latency_s: float
    joules: NotRequired[float]
    binds: str
    admitted: bool


class Answer(TypedDict):
    """An allocation as one JSON object. objective: the weighted mean of what is kept; bits: of a value, where they were chosen;

    gap: where it is not proven to be the best, how far it may be from it, relative to the weights.
    """

    status: str
    deadline_s: float
    objective: float
    price_per_hz: float | None
    certificate: Proof | None
    message: str
    bits: NotRequired[int]
    gap: NotRequired[float]
    devices: list[DeviceAnswer]


def answer(first: FirstRound, *, of_several: bool) -> Answer:
    """Returns the first round's allocation as one JSON object.

    of_several: whether the bits were chosen, and are worth a word.
    """
    allocation, certificate = first.allocation, first.allocation.certificate
    compressed: _Compressed = {"bits": first.bits} if of_several and first.bits is not None else {}
    bounded: _Bounded = {} if allocation.gap is None else {"gap": allocation.gap}
    return {
        "status": allocation.status,
        "deadline_s": allocation.deadline_s,
        "objective": allocation.objective,
        "price_per_hz": allocation.price_per_hz,
        "certificate": None
        if certificate is None
        else {"residual": float(certificate.residual), "gap": float(certificate.gap)},
        "message": allocation.message,
        **compressed,
        **bounded,
        "devices": [_device(first, at) for at in range(len(allocation.binds))],
    }


def _device(first: FirstRound, at: int) -> DeviceAnswer:
    allocation = first.allocation
    named: _Named = {"name": first.names[at]} if first.names else {}
    whole: _Whole = {}
    if allocation.block_hz is not None:
        whole = {"blocks": round(float(allocation.bandwidth_hz[at]) / allocation.block_hz)}
    if allocation.owner is not None:
        whole["block_ids"] = np.flatnonzero(allocation.owner == at).tolist()
    of_device: _Compressed = {} if allocation.bits is None else {"bits": int(allocation.bits[at])}
    spending: _Spending = {} if allocation.joules is None else {"joules": float(allocation.joules[at])}
    return {
        "id": at,
        **named,
        "prune_ratio": float(allocation.prune_ratio[at]),
        "bandwidth_hz": float(allocation.bandwidth_hz[at]),
        **whole,
        **of_device,
        **_chosen(first, at),
        "rate_bps": float(allocation.rate_bps[at]),
        "latency_s": float(allocation.latency_s[at]),
        **spending,
        "binds": allocation.binds[at],
        "admitted": bool(allocation.admitted[at]),
    }


def _chosen(first: FirstRound, at: int) -> _Chosen:
    allocation, fleet, chosen = first.allocation, first.fleet, _Chosen()
    if allocation.clock is not None:
        chosen["clock"] = float(allocation.clock[at])
        if fleet is not None:
            chosen["cpu_hz"] = float(allocation.clock[at] * fleet.cpu_hz[at])
    if allocation.power is not None:
        chosen["power"] = float(allocation.power[at])
        if fleet is not None:
            chosen["tx_power_w"] = float(allocation.power[at] * fleet.tx_power_w[at])
    return chosen


def frontier_rows(problem: Problem) -> list[dict[str, float]]:
    """Returns the frontier: deadlines from 20 % of the dense optimum up, and the least mean ratio at each feasible one.

    Where joules are known, also those of that answer, and the fewest at some ratios for all: NaN where one misses the deadline.
    """
    rows = list[dict[str, float]]()
    for fraction, (at, best) in zip(FRONTIER_FRACTIONS, frontier_answers(problem, FRONTIER_FRACTIONS), strict=True):
        if best is None:
            continue
        row = {"fraction": float(fraction), "deadline_s": at.deadline_s, "mean_ratio": least_mean(at, best)}
        if at.spends is not None:
            row["joules"] = float(joules(at, 1 - best.prune_ratio, best.bandwidth_hz).sum())
            row |= {f"joules_at_{ratio:g}": least_joules(at, ratio) for ratio in figures.FRONTIER_RATIOS}
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Rung:
    """A deadline, also as a fraction of the dense optimum, and what each allocator drops there: the weighted mean and the largest ratio.

    An allocator that cannot meet the deadline has None: no round is stretched to look feasible.
    """

    fraction: float
    deadline_s: float
    ratios: Mapping[str, tuple[float, float] | None]

    def as_json(self) -> dict[str, object]:
        """Returns the rung as one JSON object, the allocators by name beside the deadline."""
        return {"fraction": self.fraction, "deadline_s": self.deadline_s, **self.ratios}


def ladder(problem: Problem, allocators: Mapping[str, Allocator], fractions: Sequence[float]) -> list[Rung]:
    """Returns what every allocator drops at deadlines that are fractions of the dense optimum.

    Raises ConfigError naming a fraction that is none, and InfeasibleError naming the devices that no deadline helps.
    """
    deadlines = deadlines_at(problem, fractions)
    settle(replace(problem, deadline_s=math.inf), "fail", least_feasible)  # names whom no deadline helps
    rungs = []
    for fraction, deadline_s in zip(fractions, deadlines.tolist(), strict=True):
        at = replace(problem, deadline_s=deadline_s)
        rungs.append(Rung(fraction, deadline_s, {name: _ratios(at, one) for name, one in allocators.items()}))
    return rungs


def _ratios(problem: Problem, allocator: Allocator) -> tuple[float, float] | None:
    allocation, weight = allocator.solve(problem, 0, 0), problem.weight / (problem.weight.sum() or 1.0)
    met = allocation.deadline_s <= problem.deadline_s * (1 + 1e-9) and bool(allocation.admitted.all())
    return (float(weight @ allocation.prune_ratio), float(allocation.prune_ratio.max())) if met else None


def price_sentence(allocator: str, problem: Problem, price_per_hz: float | None) -> str:
    """Says what one more MHz is worth, from the price (a derivative: it holds for a small change) in what the allocator counts."""
    if not price_per_hz:
        return "Bandwidth has no price here: nobody would prune less for more of it, or this allocator gives none."
    if allocator in ("energy", "weighted"):
        saved = "joules" if allocator == "energy" else "joules, those that seconds are worth included,"
        return f"One more MHz saves {1e6 * price_per_hz:.3g} {saved} per round, for a small change."
    if allocator == "proportional":
        share = 1e8 * price_per_hz / float(problem.weight.sum())
        return f"One more MHz raises the weighted geometric mean of what is kept by {share:.3g} %, for a small change."
    lowered = 1e6 * price_per_hz / float(problem.weight.sum())
    return f"One more MHz lowers the weighted mean ratio by {lowered:.3g}, for a small change."


def allocation_table(result: Answer) -> Table:
    """Returns the devices for the terminal, with the certificate above."""
    certificate = result["certificate"]
    proof = (
        "no certificate"
        if certificate is None
        else f"KKT residual {certificate['residual']:.1e}, gap {certificate['gap']:.1e}"
    )
    bits = f", {result['bits']} bits per value" if "bits" in result else ""
    if "gap" in result:
        proof = f"{proof}; at most {100 * result['gap']:.2g} % of the weight below the best"
    title = f"{result['status']}, deadline {seconds(result['deadline_s'])}{bits}; {proof}" + (
        f"\n{result['message']}" if result["message"] else ""
    )
    rows = [
        [
            device.get("name", str(device["id"])),
            f"{device['prune_ratio']:.3f}",
            f"{device['bandwidth_hz'] / 1e6:.4f}",
            *([str(device["blocks"])] if "blocks" in device else []),
            *([ranges(device["block_ids"])] if "block_ids" in device else []),
            *([str(device["bits"])] if "bits" in device else []),
            *([f"{100 * device['clock']:.1f}"] if "clock" in device else []),
            *([f"{100 * device['power']:.2g}"] if "power" in device else []),
            f"{device['latency_s']:.4g}",
            *([f"{device['joules']:.4g}"] if "joules" in device else []),
            device["binds"],
            f"{device['rate_bps'] / 1e6:.4g}",
        ]
        for device in result["devices"]
    ]
    titles = {"blocks": "blocks", "block_ids": "which", "bits": "bits", "clock": "clock %", "power": "power %"}
    has = {*result["devices"][0]} if result["devices"] else set[str]()
    extra, spent = [title for key, title in titles.items() if key in has], (["joules"] if "joules" in has else [])
    headers = ["device", "ratio", "MHz", *extra, "seconds", *spent, "binds", "Mbit/s"]
    return Table.of(title, headers, rows, folding=["which", "binds"], elsewhere="in --json")


def ranges(numbers: Sequence[int]) -> str:
    """Returns ascending numbers as ranges.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2 5 7-8'
    """
    runs = list[list[int]]()
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def ladder_table(rungs: Sequence[Rung]) -> Table:
    """Returns the rungs of a ladder for the terminal."""
    rows = [
        [f"{rung.fraction:.2f}", seconds(rung.deadline_s), *map(_ratios_text, rung.ratios.values())] for rung in rungs
    ]
    headers = ["of dense", "deadline", *rungs[0].ratios]
    return Table.of("weighted mean / largest pruning ratio", headers, rows, elsewhere="in --json")


def _ratios_text(ratios: tuple[float, float] | None) -> str:
    return "cannot" if ratios is None else f"{ratios[0]:.3f} / {ratios[1]:.3f}"


def write_allocation(out: Path, result: Answer, frontier: Sequence[Mapping[str, float]]) -> Path:
    """Writes allocation.csv and .json, frontier.csv and frontier.svg; returns the first one's path."""
    devices: Sequence[Mapping[str, object]] = result["devices"]
    keys = [*devices[0]]
    columns = [*frontier[0]] if frontier else ["fraction", "deadline_s", "mean_ratio"]
    files = {
        "allocation.csv": csv_text(keys, [[cell(device[key]) for key in keys] for device in devices]),
        "allocation.json": json.dumps(result, indent=1) + "\n",
        "frontier.csv": csv_text(
            columns, [["" if value != value else value for value in row.values()] for row in frontier]
        ),
        "frontier.svg": figures.frontier_figure(frontier, result["deadline_s"]).svg(),
    }
    return write_files(out, files)
