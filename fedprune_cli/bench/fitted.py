"""A fleet and a channel from what a pilot measured: each device's speed and uplink by medians, and how far the model was off.

Compute: t = m w + n s, with w the seconds that the counted FLOPs should take, n steps of s seconds each. Where the FLOPs of a step differ
enough between rounds for a line to foretell rounds that it has not seen better than a proportion does, m and s are the line's of median
slopes (Theil and Sen); else m is the median of measured / modelled, and s is what it was, times m.

Uplink: nobody on the way divides a pilot's band as the allocation says; every node has the link that it has. So a device's rate is the
median of bits / seconds, at a bandwidth of its own, neither more nor less, so wide that all have the same bits per second and Hz.
Downlink: one power of the base station, at which the node that waits longest for a broadcast, or has the slowest copies, waits as it did.
Ignored: what a message takes however small it is, which is in the rate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import theilslopes

from fedprune_cli.bench.seen import Drawn, Pilot, Seen, read_drawn, read_pilot
from fedprune_cli.errors import ConfigError, DeviceError
from fedprune_cli.report.page import csv_text
from fedprune_cli.round.setup import Setup
from fedprune_cli.store import folder
from fedprune_cli.store.state import Array
from fedprune_cli.terminal import Table
from fedprune_cli.world.fleet import Fleet
from fedprune_cli.world.measured import RANGES

FOLDS = 10
APART = 1.1  # times which a step's FLOPs differ at least before a line is looked for
BETTER = 0.9  # of the error of a proportion, which a line must be under to be taken
BITS_PER_HZ = 4.0
MOST_DOWN_BITS_PER_HZ = 100.0  # a downlink so far beyond the uplinks takes no time that counts
NOISE_W_PER_HZ = 10 ** (-174 / 10 - 3)


@dataclass(frozen=True)
class Off:
    """How far a model is from what was measured: `before` and `after` the fit the median of |modelled / measured - 1|.

    spread: between the quartiles of measured / fitted, which no constant speed explains.
    """

    before: float
    after: float
    spread: float


@dataclass(frozen=True)
class FittedDevice:
    """One device. slower: how many times the seconds of its FLOPs that the run's fleet says; step_s: of a step besides, and whether the
    rounds tell it from the FLOPs; flops_per_s: counted ones, of the whole model; uplink_bps: bits/s; downlink_bps: of copies of its own,
    None where there is a broadcast or nothing is metered.
    """

    device: int
    rounds: int
    slower: float
    step_s: float
    identified: bool
    cycles_per_flop: float
    flops_per_s: float
    compute: Off
    uplink_bps: float
    uplink: Off
    downlink_bps: float | None


@dataclass(frozen=True)
class Fit:
    """The devices, the downlink's bits/s, of the slowest copies where each has its own (None where nothing is metered), and the slowest
    device of each round, before and after.

    drawn: what nodes measured of energy, which is not fitted: it has in it what the machine does besides.
    """

    devices: tuple[FittedDevice, ...]
    downlink_bps: float | None
    round: Off
    rounds: int
    drawn: tuple[Drawn, ...]


def fit_run(setup: Setup, run_dir: Path) -> Fit:
    """Returns the fit of a run on nodes; raises CheckpointError for a run that has nothing to fit, DeviceError for impossible figures."""
    fleet, experiment = setup.scenario.fleet, setup.experiment
    if experiment.devices.fresh:
        raise ConfigError(
            f"{run_dir}: devices.fresh={experiment.devices.fresh}: must be 0, devices that never train are not measured"
        )
    pilot = read_pilot(setup, run_dir)
    known = np.zeros(len(fleet.cpu_hz)) if fleet.practice is None else fleet.practice.step_s
    devices = [
        _device(fleet, seen, float(known[seen.device]), _counted(setup, seen.device), unicast=pilot.unicast)
        for seen in pilot.seen
    ]
    down_bps = _copies(devices) if pilot.unicast else _downlink(pilot)
    rates = _down_rates(fleet, devices, down_bps)
    return Fit(tuple(devices), down_bps, *_rounds(pilot, devices, rates), read_drawn(run_dir))


def _device(fleet: Fleet, seen: Seen, known_s: float, counted: float, *, unicast: bool) -> FittedDevice:
    """Returns the fit of one device; known_s: its step's fixed seconds so far; counted: FLOPs for each that is weighed by its layer."""
    slower, step_s, identified = fit_compute(seen.work_s, seen.steps, seen.compute_s, known_s)
    cycles = slower * float(fleet.cycles_per_flop[seen.device])
    least, most = RANGES["cycles_per_flop"]
    if not least <= cycles <= most:
        raise DeviceError(
            f"device-{seen.device}: cycles_per_flop comes out as {cycles:.3g}: must be in [{least:g}, {most:g}]"
        )
    fitted_s = slower * seen.work_s + seen.steps * step_s
    bps = float(np.median(seen.bits / seen.uplink_s))
    return FittedDevice(
        seen.device, len(seen.round), slower, step_s, identified, cycles,
        counted * float(fleet.cpu_hz[seen.device]) / cycles,
        _off(seen.modelled_compute_s, fitted_s, seen.compute_s), bps, _off(seen.modelled_uplink_s, seen.bits / bps, seen.uplink_s),
        _bps(seen) if unicast else None,
    )  # fmt: skip


def _bps(seen: Seen) -> float | None:
    """Returns the median rate of a device's copies; None where nothing is metered."""
    took = (seen.bits_down > 0) & (seen.downlink_s > 0)
    if not (took.any() and seen.modelled_downlink_s.any()):
        return None
    return float(np.median(seen.bits_down[took] / seen.downlink_s[took]))


def _copies(devices: Sequence[FittedDevice]) -> float | None:
    """Returns the rate of the slowest copies."""
    return min((one.downlink_bps for one in devices if one.downlink_bps is not None), default=None)


def fit_compute(work_s: Array, steps: Array, compute_s: Array, known_s: float) -> tuple[float, float, bool]:
    """Returns m, s and whether s is the rounds' own, for rounds [R] that took compute_s; known_s: s as it was believed to be."""
    by_step, measured = work_s / steps, compute_s / steps

    def proportion(at: Array) -> tuple[float, float]:
        m = float(np.median(measured[at] / (by_step[at] + known_s)))
        return m, m * known_s

    def line(at: Array) -> tuple[float, float]:
        slope, fixed_s, *_ = theilslopes(measured[at], by_step[at], method="joint")
        return float(slope), float(fixed_s)

    every = np.ones(len(steps), dtype=bool)
    if by_step.max() >= APART * by_step.min():
        m, s = line(every)
        errors = [_left_out(fit, by_step, measured) for fit in (line, proportion)]
        if m > 0 and s >= 0 and errors[0] < BETTER * errors[1]:
            return m, s, True
    return (*proportion(every), False)


def _left_out(fit: Callable[[Array], tuple[float, float]], by_step: Array, measured: Array) -> float:
    """Returns the median relative error on rounds that a fit has not seen; infinite where it cannot be made without them."""
    fold, foretold = np.arange(len(measured)) % FOLDS, np.zeros(len(measured))
    for one in range(min(FOLDS, len(measured))):
        rest = fold != one
        if np.ptp(by_step[rest]) == 0:
            return float("inf")
        m, s = fit(rest)
        foretold[~rest] = m * by_step[~rest] + s
    return float(np.median(np.abs(foretold / measured - 1)))


def _off(before_s: Array, after_s: Array, measured_s: Array) -> Off:
    low, high = np.percentile(measured_s / after_s, [25, 75])
    errors = [float(np.median(np.abs(modelled / measured_s - 1))) for modelled in (before_s, after_s)]
    return Off(errors[0], errors[1], float(high - low))


def _counted(setup: Setup, device: int) -> float:
    """Returns a device's counted FLOPs of a round in proportion to what they weigh by kind of layer, before anything is pruned."""
    practice, cost, schedule = setup.scenario.fleet.practice, setup.blueprint.cost, setup.schedule(device)
    if practice is None:
        return 1.0
    weighted = cost.weighted({kind: float(scale[device]) for kind, scale in practice.flop_scale.items()})
    flops, weighed = (sum(phase.samples * sum(of[phase.kind]) for phase in schedule) for of in (cost.flops, weighted))
    return float(flops / weighed)


def _downlink(pilot: Pilot) -> float | None:
    """Returns the bits/s at which a round's broadcast takes as long as the node took that waited longest for what of it was sent."""
    rates = []
    for number in _numbers(pilot):
        here = [(seen, seen.round == number) for seen in pilot.seen if number in seen.round]
        wait_s = max(float(seen.downlink_s[at][0]) for seen, at in here)
        bits = max(float(seen.bits_down[at][0]) for seen, at in here)  # of one broadcast, the same for all
        if bits and wait_s > 0:
            rates.append(bits / wait_s)
    return float(np.median(rates)) if rates else None


def _numbers(pilot: Pilot) -> list[int]:
    """Returns the numbers of the rounds that some device has."""
    return sorted({int(number) for seen in pilot.seen for number in seen.round})


def _rounds(pilot: Pilot, devices: Sequence[FittedDevice], rates: Sequence[float]) -> tuple[Off, int]:
    """Returns how far the seconds of rounds, which the slowest device decides, are modelled off, and of how many rounds that is."""
    before, after, measured = [], [], []
    fitted_s = [
        _fitted_s(seen, one) + seen.bits_down / bps for seen, one, bps in zip(pilot.seen, devices, rates, strict=True)
    ]
    for number in _numbers(pilot):
        here = [
            (seen, took_s, seen.round == number)
            for seen, took_s in zip(pilot.seen, fitted_s, strict=True)
            if number in seen.round
        ]
        before.append(max(float(seen.modelled_s[at][0]) for seen, _, at in here))
        measured.append(max(float(seen.measured_s[at][0]) for seen, _, at in here))
        after.append(max(float(took_s[at][0]) for _, took_s, at in here))
    return _off(np.array(before), np.array(after), np.array(measured)), len(measured)


def _fitted_s(seen: Seen, one: FittedDevice) -> Array:
    return one.slower * seen.work_s + seen.steps * one.step_s + seen.bits / one.uplink_bps


def table(fit: Fit) -> Table:
    """Returns the fit for the terminal: of each device its compute and its uplink, and of the rounds as a whole."""
    rows = []
    for one in fit.devices:
        step = f"{1e3 * one.step_s:.3g}" if one.identified else "-"
        rows.append(
            [
                f"{one.device} compute",
                str(one.rounds),
                f"{one.flops_per_s / 1e6:.4g} MFLOP/s",
                step,
                *_shown(one.compute),
            ]
        )
        rows.append(
            [f"{one.device} uplink", str(one.rounds), f"{one.uplink_bps / 1e3:.4g} kbit/s", "-", *_shown(one.uplink)]
        )
    rows.append(["round", str(fit.rounds), "-", "-", *_shown(fit.round)])
    headers = ["device", "rounds", "fitted", "ms a step", "off before", "after", "spread"]
    return Table.of(
        "A pilot's seconds against the model, before and after the fit", headers, rows, elsewhere="in --json"
    )


def _shown(off: Off) -> list[str]:
    before = f"{100 * off.before:.0f} %" if off.before < 10 else f"x {1 + off.before:.3g}"
    return [before, f"{100 * off.after:.0f} %", f"{100 * off.spread:.0f} %"]


def sentence(fit: Fit) -> str:
    """Says what the table does not: the downlink, what its columns are, and what nobody measured."""
    down = "not metered" if fit.downlink_bps is None else f"{fit.downlink_bps / 1e3:.4g} kbit/s"
    down += ", the slowest device's" * any(one.downlink_bps for one in fit.devices)
    return (
        f"Downlink: {down}. Off: the median of |modelled / measured - 1|; spread: between the quartiles of measured / fitted. "
        f"Energy: {_drawn(fit.drawn)}; joules stay those of the run's fleet."
    )


def _drawn(drawn: Sequence[Drawn]) -> str:
    """Says what nodes measured of energy beside what the model says."""
    if not drawn:
        return "not measured"
    some = [f"{one.measured_j:.3g} J of {one.of} on device {one.device} ({one.modelled_j:.3g})" for one in drawn[:5]]
    more = ", and more in --json" * (len(drawn) > 5)
    return f"a round took, while a node worked (and by the model), {', '.join(some)}{more}; whatever else ran is in it, so it is not fitted"


def to_json(fit: Fit) -> dict[str, object]:
    """Returns the fit as one JSON object. joules: what nodes measured, None where none did."""
    plain = asdict(fit)
    return plain | {"joules": plain.pop("drawn") or None}


def write(out: Path, setup: Setup, fit: Fit) -> None:
    """Writes fitted.json, fleet.csv, and devices/fitted.yaml and channel/fitted.yaml for `--config-dir`; raises OutputError."""
    rows, channel = fleet_rows(setup.scenario.fleet, fit), channel_yaml(setup.scenario.fleet, fit)
    with folder.writing(out):
        for group in ("devices", "channel"):
            (out / group).mkdir(parents=True, exist_ok=True)
        (out / "fitted.json").write_text(json.dumps(to_json(fit), indent=1) + "\n")
        (out / "fleet.csv").write_text(csv_text([*rows[0]], [[*row.values()] for row in rows]))
        (out / "devices" / "fitted.yaml").write_text(
            f"# Devices as a pilot measured them.\ndefaults: [table]\nfile: {json.dumps(str((out / 'fleet.csv').resolve()))}\n"
        )
        (out / "channel" / "fitted.yaml").write_text(channel)


def fleet_rows(fleet: Fleet, fit: Fit) -> list[dict[str, object]]:
    """Returns the rows of a table for devices=table: speeds and uplinks as fitted, everything else as in the run's own fleet."""
    rows = []
    for one, width_hz in zip(fit.devices, widths_hz(fit.devices), strict=True):
        at, budget_j, practice = one.device, float(fleet.energy_budget_j[one.device]), fleet.practice
        row: dict[str, object] = {
            "id": f"device-{at}" if fleet.names is None else fleet.names[at],
            "cpu_ghz": _number(fleet.cpu_hz[at] / 1e9), "cycles_per_flop": _number(one.cycles_per_flop),
            "tx_power_dbm": _number(10 * np.log10(fleet.tx_power_w[at]) + 30), "gain_db": _number(_gain_db(width_hz, fleet.tx_power_w[at])),
            "min_bandwidth_mhz": _number(width_hz / 1e6), "max_bandwidth_mhz": _number(width_hz / 1e6),
            "energy_budget_j": _number(budget_j) if np.isfinite(budget_j) else "",
            "energy_coefficient": _number(fleet.energy_coefficient[at]), "radio_power_w": _number(fleet.radio_power_w[at]),
            "radio_circuit_w": _number(fleet.radio_circuit_w[at]), "idle_power_w": _number(fleet.idle_power_w[at]),
            "step_ms": _number(1e3 * one.step_s),
        }  # fmt: skip
        scales = (
            {}
            if practice is None
            else {kind: practice.flop_scale[kind][at] for kind in ("dense", "depthwise", "recurrent")}
        )
        rows.append(row | {f"{kind}_scale": _number(scale) for kind, scale in scales.items()})
    return rows


def widths_hz(devices: Sequence[FittedDevice]) -> list[float]:
    """Returns each device's bandwidth, as a table has it."""
    return [_number(one.uplink_bps / BITS_PER_HZ / 1e6) * 1e6 for one in devices]


def _gain_db(width_hz: float, tx_power_w: float) -> float:
    """Returns the gain at which a device of this power has BITS_PER_HZ over its bandwidth."""
    return float(10 * np.log10((2**BITS_PER_HZ - 1) * NOISE_W_PER_HZ * width_hz / tx_power_w))


def _bs_power_w(fleet: Fleet, devices: Sequence[FittedDevice], down_bps: float) -> tuple[float, Array, float]:
    """Returns the base station's power at which the downlink is as fitted, the devices' gains [K], and the band in Hz."""
    widths = np.array(widths_hz(devices))
    band_hz = float(widths.sum()) * (1 + 1e-9)  # what a sum of decimals lacks
    gains = np.array(
        [10 ** (_gain_db(width, fleet.tx_power_w[one.device]) / 10) for one, width in zip(devices, widths, strict=True)]
    )
    copies = [one.downlink_bps or math.inf for one in devices]
    own = min(copies) < math.inf
    slowest = int(np.argmin(copies if own else gains))
    bits_per_hz = min(down_bps / (widths[slowest] if own else band_hz), MOST_DOWN_BITS_PER_HZ)
    return float(np.expm1(bits_per_hz * np.log(2)) * NOISE_W_PER_HZ * band_hz / gains[slowest]), gains, band_hz


def _down_rates(fleet: Fleet, devices: Sequence[FittedDevice], down_bps: float | None) -> list[float]:
    """Returns the bits/s at which each device has what it waits for, as the fitted channel will say."""
    if down_bps is None or all(one.downlink_bps is None for one in devices):
        return [down_bps or math.inf] * len(devices)
    power_w, gains, band_hz = _bs_power_w(fleet, devices, down_bps)
    rates: Array = np.array(widths_hz(devices)) * np.log2(1 + power_w * gains / (NOISE_W_PER_HZ * band_hz))
    return list(rates.tolist())


def channel_yaml(fleet: Fleet, fit: Fit) -> str:
    """Returns a `channel` choice without fading whose band is the sum of the links, and whose downlink is as the pilot's was."""
    power_w, _, band_hz = _bs_power_w(fleet, fit.devices, fit.downlink_bps or 0.0)
    lines = [
        "# Links of their own, as a pilot measured them; goes with devices=fitted.", "defaults: [urban]",
        f"bandwidth_mhz: {band_hz / 1e6:.12g} # the links' bandwidths together: {BITS_PER_HZ:g} bits per second and Hz each",
        "fading: none # a link's rate is its median", "noise_dbm_per_hz: -174",
    ]  # fmt: skip
    if fit.downlink_bps is not None:
        lines.append(
            f"bs_power_dbm: {10 * np.log10(power_w) + 30:.9g} # the downlink: {fit.downlink_bps / 1e3:.4g} kbit/s"
        )
    return "\n".join(lines) + "\n"


def _number(value: float) -> float:
    """Returns a figure in nine digits, as files have it."""
    return float(f"{value:.9g}")
