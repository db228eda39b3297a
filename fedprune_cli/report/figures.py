"""The figures of the reports. Each function returns a drawing, and draws nothing by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedprune_cli.report.drawing import BLUE, COLOURS, GREEN, INK, MARKERS, ORANGE, PURPLE, RED, SKY, Drawing
from fedprune_cli.report.estimate import Array, Estimate, band
from fedprune_cli.report.read import accuracies
from fedprune_cli.store.record import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = 200  # points of a mean curve
FRONTIER_RATIOS = (0.0, 0.5, 0.8)  # for all devices alike, of which the fewest joules are drawn


def accuracy_figure(rounds: Sequence[RoundRecord]) -> Drawing:
    """Accuracy against simulated seconds: devices' weighted mean and 10th percentile, and a fresh device."""

    def plot(axes: Axes) -> None:
        curves = (("accuracy", "devices, weighted mean", BLUE, "-"), ("accuracy_p10", "devices, 10th percentile", ORANGE, "--"),
                  ("fresh_accuracy", "fresh device", GREEN, ":"))  # fmt: skip
        for key, label, colour, line in curves:
            tests = ((test.simulated_s, getattr(test, key)) for test in accuracies(rounds))
            points = [(simulated_s, 100 * value) for simulated_s, value in tests if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), line, color=colour, label=label, marker="o", markersize=3)
        axes.set(xlabel="simulated time (s)", ylabel="accuracy (%)")
        axes.legend(loc="lower right")

    return Drawing(plot)


def latency_figure(rounds: Sequence[RoundRecord]) -> Drawing:
    """Latency of each round: the slowest device's computation and radio, beside the dense optimum."""

    def plot(axes: Axes) -> None:
        busy = [r for r in rounds if r.devices.id]
        slowest = [int(np.argmax(r.devices.latency_s)) for r in busy]
        x = [r.round for r in busy]
        bottom, equal_s = np.zeros(len(busy)), [r.equal_dense_latency_s or 0.0 for r in busy]
        for key, label, colour in (
            ("downlink_s", "downlink", SKY),
            ("compute_s", "computation", BLUE),
            ("uplink_s", "uplink", ORANGE),
        ):
            part = np.array([getattr(r.devices, key)[at] for r, at in zip(busy, slowest, strict=True)])
            axes.bar(x, part, bottom=bottom, width=0.85, color=colour, label=label)
            bottom += part
        axes.plot(
            x, [r.dense_latency_s or 0.0 for r in busy], color=RED, linewidth=1.2, label="dense, optimal bandwidth"
        )
        axes.plot(
            x,
            equal_s,
            color=PURPLE,
            linewidth=1.2,
            linestyle="--",
            label="dense, equal bandwidth",
        )
        axes.set(xlabel="round", ylabel="latency of the slowest device (s)")
        axes.set_ylim(top=1.35 * max([*bottom, *equal_s], default=1.0))
        axes.legend(loc="upper right", ncols=2)

    return Drawing(plot)


def allocation_figure(rounds: Sequence[RoundRecord]) -> Drawing:
    """Ratio and bandwidth of each device: mean over the rounds and the range from the 10th to the 90th percentile."""

    def plot(both: Array) -> None:
        for axes, key, unit, label, colour in zip(
            both,
            ("prune_ratio", "bandwidth_hz"),
            (1, 1e-6),
            ("pruning ratio", "bandwidth (MHz)"),
            (BLUE, ORANGE),
            strict=True,
        ):
            by_device: dict[int, list[float]] = {}
            for record in rounds:
                for device, value in zip(record.devices.id, getattr(record.devices, key), strict=True):
                    by_device.setdefault(device, []).append(unit * value)
            ids = sorted(by_device)
            mean = np.array([np.mean(by_device[device]) for device in ids])
            low, high = np.array([np.percentile(by_device[device], (10, 90)) for device in ids]).reshape(-1, 2).T
            axes.bar(ids, mean, color=colour, alpha=0.75)
            axes.vlines(ids, low, high, color=INK, linewidth=1)
            axes.set(xlabel="device", ylabel=label)

    return Drawing(plot, columns=2)


def partition_figure(histogram: Sequence[Sequence[int]], num_training: int) -> Drawing:
    """Samples of each class on each device; the fresh devices stand above the line."""
    from matplotlib.ticker import MaxNLocator

    def plot(axes: Axes) -> None:
        counts = np.array(histogram)
        image = axes.imshow(counts, aspect="auto", cmap="cividis", interpolation="nearest", origin="lower")
        if num_training < len(counts):
            axes.axhline(num_training - 0.5, color=RED, linewidth=1)
        axes.figure.colorbar(image, label="samples")
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="class", ylabel="device")

    return Drawing(plot, height=3.2 + 0.03 * min(len(histogram), 100))


def progress_figure(curves: Mapping[str, Sequence[Sequence[RoundRecord]]], target: float | None) -> Drawing:
    """Mean accuracy over seeds against simulated seconds, a colour a method, with its 95 % interval where there are seeds."""

    def plot(axes: Axes) -> None:
        for at, (method, runs) in enumerate(curves.items()):
            points = [
                np.array([(test.simulated_s, 100 * test.accuracy) for test in accuracies(rounds)]).T for rounds in runs
            ]
            first, last = max(x[0] for x, _ in points), min(x[-1] for x, _ in points)
            if first > last:
                continue  # no moment that all seeds have: no mean to draw
            x = np.linspace(first, last, GRID)
            mean, half = band([np.interp(x, *curve) for curve in points])
            colour, marker = COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]
            axes.plot(
                x, mean, label=method, color=colour, marker=marker, markersize=4, markevery=GRID // 8, linewidth=1.4
            )
            if half is not None:
                axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        if target is not None:
            axes.axhline(100 * target, color=INK, linewidth=0.8, linestyle=":", label=f"target {100 * target:.1f} %")
        axes.set(xlabel="simulated time (s)", ylabel="device accuracy (%)")
        axes.set_ylim(top=min(axes.get_ylim()[1], 101))
        axes.legend(loc="lower right", fontsize=8)

    return Drawing(plot, height=4.2)


def finals_figure(finals: Mapping[str, Mapping[str, Estimate]]) -> Drawing:
    """Final accuracies by method: devices' mean, their 10th percentile and a fresh device, with 95 % intervals."""

    def plot(axes: Axes) -> None:
        kinds = dict.fromkeys(kind for of in finals.values() for kind in of)
        for at, kind in enumerate(kinds):
            shown = {method: of[kind] for method, of in finals.items() if kind in of}
            y = np.array([list(finals).index(method) for method in shown]) + 0.22 * (at - (len(kinds) - 1) / 2)
            mean = 100 * np.array([final.mean for final in shown.values()])
            half = 100 * np.array([final.half_width or 0.0 for final in shown.values()])
            axes.errorbar(
                mean,
                y,
                xerr=half,
                linestyle="",
                color=COLOURS[at],
                marker=MARKERS[at],
                markersize=4,
                capsize=2,
                label=kind,
            )
        axes.set_yticks(range(len(finals)), list(finals))
        axes.invert_yaxis()
        axes.set(xlabel="final accuracy (%)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return Drawing(plot, height=1.4 + 0.4 * len(finals))


def target_figure(times: Mapping[str, Estimate | str]) -> Drawing:
    """Simulated seconds to the target accuracy by method, with 95 % intervals; who misses it on a seed says so."""

    def plot(axes: Axes) -> None:
        reached = {method: time for method, time in times.items() if not isinstance(time, str)}
        y = [list(times).index(method) for method in reached]
        half = [time.half_width or 0.0 for time in reached.values()]
        axes.barh(y, [time.mean for time in reached.values()], xerr=half, color=BLUE, ecolor=INK, capsize=3)
        for at, time in enumerate(times.values()):
            if isinstance(time, str):
                axes.text(0, at, f" {time}", va="center")
        axes.set_yticks(range(len(times)), list(times))
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set(xlabel="simulated time to the target accuracy (s)")

    return Drawing(plot, height=1.2 + 0.35 * len(times))


def convergence_figure(rounds: Sequence[RoundRecord]) -> Drawing:
    """The squared gradient norm averaged over the rounds so far, beside the bound's shape fitted to it, and the pruning error."""
    from scipy.optimize import nnls

    error = np.array([r.pruning_error for r in rounds if r.pruning_error is not None])
    number = np.arange(1, len(error) + 1)
    measured = np.cumsum([r.grad_norm**2 for r in rounds if r.pruning_error is not None]) / number
    shape = np.stack([1 / np.sqrt(number), np.cumsum(error) / number, np.ones(len(error))], axis=1)
    fitted = shape @ nnls(shape, measured)[0] if len(error) else measured

    def plot(both: Array) -> None:
        left, right = both
        left.plot(number, measured, color=BLUE, marker="o", markersize=3, label="measured")
        left.plot(number, fitted, "--", color=ORANGE, label="shape of the bound, fitted")
        left.set(xlabel="rounds", ylabel="mean squared gradient norm")
        left.set_ylim(bottom=0)
        left.legend()
        right.plot(number, error, color=GREEN, marker="s", markersize=3)
        right.set(xlabel="round", ylabel="pruning error, mean ‖u − u·mₖ‖²")

    return Drawing(plot, columns=2)


def frontier_figure(rows: Sequence[Mapping[str, float]], deadline_s: float) -> Drawing:
    """The least mean ratio that each deadline needs, and the deadline that was asked for; beside it the joules, where they are known.

    Of joules there are those of the least mean ratio, and the fewest at one ratio for all, from the first deadline that it meets.
    """
    deadlines_s = [row["deadline_s"] for row in rows]

    def ratio(axes: Axes) -> None:
        axes.plot(deadlines_s, [row["mean_ratio"] for row in rows], color=BLUE, marker="o", markersize=3)
        axes.axvline(deadline_s, color=RED, linewidth=1, label="this deadline")
        axes.set(xlabel="deadline of the round (s)", ylabel="least weighted mean ratio")
        axes.legend()

    def both(pair: Array) -> None:
        left, right = pair
        ratio(left)
        curves = [("joules", "least mean ratio", BLUE, "o")] + [
            (f"joules_at_{of:g}", f"fewest at ratio {of:g}", colour, marker)
            for of, colour, marker in zip(FRONTIER_RATIOS, (ORANGE, GREEN, PURPLE), "sD^", strict=True)
        ]
        for key, label, colour, marker in curves:
            right.plot(deadlines_s, [row[key] for row in rows], color=colour, marker=marker, markersize=3, label=label)
        right.axvline(deadline_s, color=RED, linewidth=1)
        right.set(xlabel="deadline of the round (s)", ylabel="energy of the round (J)")
        right.set_ylim(bottom=0)
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)

    return Drawing(both, width=9.6, columns=2) if rows and "joules" in rows[0] else Drawing(ratio)


def calibration_figure(points: Sequence[Mapping[str, float]]) -> Drawing:
    """A step's measured time against what the latency model says, by ratio: with channels left out, and with masks alone."""

    def plot(axes: Axes) -> None:
        x = [p["ratio"] for p in points]
        measured, low, high = (np.array([1e3 * p[key] for p in points]) for key in ("measured_s", "low_s", "high_s"))
        axes.errorbar(
            x,
            measured,
            (measured - low, high - measured),
            color=BLUE,
            marker="o",
            markersize=4,
            label="measured, whole channels",
        )
        axes.plot(
            x, [1e3 * p["modelled_s"] for p in points], "--", color=ORANGE, marker="s", markersize=4, label="modelled"
        )
        axes.plot(
            x,
            [1e3 * p["masked_s"] for p in points],
            ":",
            color=GREEN,
            marker="D",
            markersize=4,
            label="measured, masks alone",
        )
        axes.set(xlabel="pruning ratio", ylabel="time of a step (ms)")
        axes.set_ylim(bottom=0)
        axes.legend()

    return Drawing(plot)


def split_figure(split: Mapping[str, tuple[float, float, float, float]]) -> Drawing:
    """Seconds per round: what is left, with its 95 % interval, and what pruning and optimal bandwidth took off equal bandwidth."""

    def plot(axes: Axes) -> None:
        names = list(split)
        left, pruning, bandwidth, half = np.array(list(split.values())).T
        axes.barh(names, left, xerr=half, color=BLUE, ecolor=INK, capsize=3, label="left")
        axes.barh(names, np.maximum(pruning, 0), left=left, color=ORANGE, label="off by pruning, bits or steps")
        axes.barh(
            names, np.maximum(bandwidth, 0), left=left + np.maximum(pruning, 0), color=SKY, label="off by bandwidth"
        )
        axes.invert_yaxis()
        axes.set(xlabel="mean latency of a round (s)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return Drawing(plot, height=1.6 + 0.35 * len(split))


def pareto_figure(points: Mapping[str, tuple[Estimate, Estimate]], front: Sequence[str]) -> Drawing:
    """Final accuracy against simulated seconds, with 95 % intervals; those in `front` are joined and named."""

    def plot(axes: Axes) -> None:
        for name, (time_s, accuracy) in points.items():
            best = name in front
            axes.errorbar(
                time_s.mean,
                100 * accuracy.mean,
                xerr=time_s.half_width,
                yerr=None if accuracy.half_width is None else 100 * accuracy.half_width,
                color=BLUE if best else INK,
                alpha=1.0 if best else 0.5,
                marker="o" if best else "s",
                markersize=5,
                capsize=2,
                linestyle="",
            )
        line = [(points[name][0].mean, 100 * points[name][1].mean) for name in front]
        axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=1)
        for name, at in zip(front, line, strict=True):
            axes.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=8, parse_math=False)
        axes.set(xlabel="simulated time of the run (s)", ylabel="final accuracy (%)")
        axes.set_xlim(left=0)

    return Drawing(plot, height=4.2)


@dataclass(frozen=True)
class Axis:
    """A parameter and its values, as they stand along one side of a heat map."""

    name: str
    values: Sequence[str]


def heat_figure(cells: Array, rows: Axis, columns: Axis, label: str) -> Drawing:
    """A figure for each pair of two parameters' values, float64 [rows, columns], NaN where there is none."""

    def plot(axes: Axes) -> None:
        image = axes.imshow(cells, cmap="cividis", aspect="auto")
        low, high = np.nanmin(cells), np.nanmax(cells)
        for (row, column), value in np.ndenumerate(cells):
            if not np.isnan(value):
                ink = "black" if value > (low + high) / 2 else "white"
                axes.text(column, row, f"{value:.4g}", ha="center", va="center", color=ink)
        axes.grid(visible=False)
        axes.set_xticks(range(len(columns.values)), list(columns.values), parse_math=False)
        axes.set_yticks(range(len(rows.values)), list(rows.values), parse_math=False)
        axes.set_xlabel(columns.name, parse_math=False)
        axes.set_ylabel(rows.name, parse_math=False)
        axes.figure.colorbar(image, label=label)

    return Drawing(plot, height=1.6 + 0.5 * len(rows.values))
