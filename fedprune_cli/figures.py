"""Figures as SVG text. Colours are Okabe and Ito's, safe for the colour-blind; lines and text take the page's colour."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
)
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW)
MARKERS = "osD^vPX"
INK = "#123456"  # stands for the page's text colour until the SVG is written


def draw(plot: Callable[[Any], None], width: float = 7.2, height: float = 3.6, columns: int = 1) -> str:
    """Returns an SVG with what `plot` draws on the axes; the same figure gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "fedprune", "font.family": "sans-serif", "font.size": 10,
        "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.grid": True, "grid.color": INK, "grid.alpha": 0.15, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none",
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        plot(figure.subplots(1, columns))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor").replace(INK.upper(), "currentColor")


def embed(svg: str, label: str, prefix: str) -> str:
    """Returns the SVG for a page: scaled to its box, named for screen readers, its ids its own."""
    svg = re.sub(r'id="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def tested(rounds: Sequence[Record]) -> list[Record]:
    """Returns the rounds whose models were tested."""
    return [record for record in rounds if record["accuracy"] is not None]


def accuracy_figure(rounds: Sequence[Record]) -> str:
    """Accuracy against simulated seconds: devices' weighted mean and 10th percentile, and a fresh device."""

    def plot(axes: Any) -> None:
        curves = (("accuracy", "devices, weighted mean", BLUE, "-"), ("accuracy_p10", "devices, 10th percentile", ORANGE, "--"),
                  ("fresh_accuracy", "fresh device", GREEN, ":"))  # fmt: skip
        for key, label, colour, line in curves:
            points = [(r["simulated_s"], 100 * r[key]) for r in tested(rounds) if r[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), line, color=colour, label=label, marker="o", markersize=3)
        axes.set(xlabel="simulated time (s)", ylabel="accuracy (%)")
        axes.legend(loc="lower right")

    return draw(plot)


def latency_figure(rounds: Sequence[Record]) -> str:
    """Latency of each round: the slowest device's computation and radio, beside the dense optimum."""

    def plot(axes: Any) -> None:
        busy = [r for r in rounds if r["devices"]["id"]]
        slowest = [int(np.argmax(r["devices"]["latency_s"])) for r in busy]
        x = [r["round"] for r in busy]
        bottom = np.zeros(len(busy))
        for key, label, colour in (
            ("downlink_s", "downlink", SKY),
            ("compute_s", "computation", BLUE),
            ("uplink_s", "uplink", ORANGE),
        ):
            part = np.array([r["devices"][key][at] for r, at in zip(busy, slowest, strict=True)])
            axes.bar(x, part, bottom=bottom, width=0.85, color=colour, label=label)
            bottom += part
        axes.plot(x, [r["dense_latency_s"] for r in busy], color=RED, linewidth=1.2, label="dense, optimal bandwidth")
        axes.plot(
            x,
            [r["equal_dense_latency_s"] for r in busy],
            color=PURPLE,
            linewidth=1.2,
            linestyle="--",
            label="dense, equal bandwidth",
        )
        axes.set(xlabel="round", ylabel="latency of the slowest device (s)")
        axes.set_ylim(top=1.35 * max([*bottom, *(r["equal_dense_latency_s"] for r in busy)], default=1.0))
        axes.legend(loc="upper right", ncols=2)

    return draw(plot)


def allocation_figure(rounds: Sequence[Record]) -> str:
    """Ratio and bandwidth of each device: mean over the rounds and the range from the 10th to the 90th percentile."""

    def plot(both: Any) -> None:
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
                for device, value in zip(record["devices"]["id"], record["devices"].get(key, ()), strict=False):
                    by_device.setdefault(device, []).append(unit * value)
            ids = sorted(by_device)
            mean = np.array([np.mean(by_device[device]) for device in ids])
            low, high = np.array([np.percentile(by_device[device], (10, 90)) for device in ids]).reshape(-1, 2).T
            axes.bar(ids, mean, color=colour, alpha=0.75)
            axes.vlines(ids, low, high, color=INK, linewidth=1)
            axes.set(xlabel="device", ylabel=label)

    return draw(plot, columns=2)


def partition_figure(histogram: Sequence[Sequence[int]], num_training: int) -> str:
    """Samples of each class on each device; the fresh devices stand above the line."""
    from matplotlib.ticker import MaxNLocator

    def plot(axes: Any) -> None:
        counts = np.array(histogram)
        image = axes.imshow(counts, aspect="auto", cmap="cividis", interpolation="nearest", origin="lower")
        if num_training < len(counts):
            axes.axhline(num_training - 0.5, color=RED, linewidth=1)
        axes.figure.colorbar(image, label="samples")
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="class", ylabel="device")

    return draw(plot, height=3.2 + 0.03 * min(len(histogram), 100))


def progress_figure(curves: Mapping[str, Sequence[Sequence[Record]]], target: float | None) -> str:
    """Accuracy against simulated seconds, a curve a run, a colour a method."""

    def plot(axes: Any) -> None:
        for at, (method, runs) in enumerate(curves.items()):
            for number, rounds in enumerate(runs):
                points = [(r["simulated_s"], 100 * r["accuracy"]) for r in tested(rounds)]
                axes.plot(
                    *zip(*points, strict=True), color=COLOURS[at % len(COLOURS)], label=method if number == 0 else None,
                    marker=MARKERS[at % len(MARKERS)], markersize=3, markevery=max(len(points) // 12, 1), linewidth=1.3, alpha=0.9,
                )  # fmt: skip
        if target is not None:
            axes.axhline(100 * target, color=INK, linewidth=0.8, linestyle=":", label=f"target {100 * target:.1f} %")
        axes.set(xlabel="simulated time (s)", ylabel="device accuracy (%)")
        axes.legend(loc="lower right")

    return draw(plot)


def frontier_figure(rows: Sequence[Mapping[str, float]], deadline_s: float) -> str:
    """The least mean ratio that each deadline needs, and the deadline that was asked for."""

    def plot(axes: Any) -> None:
        axes.plot(
            [row["deadline_s"] for row in rows],
            [row["mean_ratio"] for row in rows],
            color=BLUE,
            marker="o",
            markersize=3,
        )
        axes.axvline(deadline_s, color=RED, linewidth=1, label="this deadline")
        axes.set(xlabel="deadline of the round (s)", ylabel="least weighted mean ratio")
        axes.legend()

    return draw(plot)


def calibration_figure(points: Sequence[Record]) -> str:
    """A step's measured time against what the latency model says, by ratio: with channels left out, and with masks alone."""

    def plot(axes: Any) -> None:
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

    return draw(plot)


def split_figure(split: Mapping[str, tuple[float, float, float]]) -> str:
    """Seconds a round: what is left, and what pruning and optimal bandwidth took off the dense round on equal bandwidth."""

    def plot(axes: Any) -> None:
        names = list(split)
        left, pruning, bandwidth = np.array(list(split.values())).T
        axes.barh(names, left, color=BLUE, label="left")
        axes.barh(names, np.maximum(pruning, 0), left=left, color=ORANGE, label="saved by pruning")
        axes.barh(
            names, np.maximum(bandwidth, 0), left=left + np.maximum(pruning, 0), color=SKY, label="saved by bandwidth"
        )
        axes.invert_yaxis()
        axes.set(xlabel="mean latency of a round (s)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return draw(plot, height=1.6 + 0.35 * len(split))
