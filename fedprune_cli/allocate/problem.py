"""The allocation problem, its equations, and what an answer consists of (model.md, sections 3 and 4).

t_k = x_k (a_k + c_k / r_k(b_k)) + d_k        x_k = 1 - rho_k
r_k(b) = b log2(1 + min(S_k, s_k / b))
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from fedprune_cli.allocate.certificate import TOLERANCE, Certificate
from fedprune_cli.allocate.curve import LEAST, Choice, Curve, curve_of_means
from fedprune_cli.allocate.freedom import FIXED, Freedom, Means
from fedprune_cli.allocate.inverse import LN2, bandwidth_of, log_snr_for_rate, rate
from fedprune_cli.allocate.limits import IN_RANGE, LARGEST, SMALLEST, Limits, in_range, refuse_first
from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array

TIGHT = 1e-12  # relative slack within which a bound counts as met
SAMPLE = 4_096  # devices that guess the price for a much larger number
LATEST = 1e100  # seconds: what the largest payload takes at the least rate
NO_LINK = 1e-9  # a signal below this share of the noise in the whole band (-90 dB) carries nothing


@dataclass(frozen=True)
class Problem:
    """One round's problem, float64 [K] and SI.

    shared_compute_s a: compute time of the whole shared part; payload_bits c: bits of the whole shared part;
    fixed_s d: time that pruning does not touch; snr_hz s = p h / N0; weight w; max_ratio rho_max, the cap of each device;
    bandwidth_hz B; deadline_s T, infinite when open; ids: of the devices, int [K], their positions when None;
    titles: what messages call them, str [K], their ids when None; limits: None when there are none; energies: the same figures of
    devices that nothing limits, None where they are not known; block_hz: of the resource blocks that the band consists of, None where
    it has none; only an allocator of whole blocks asks; waited: rounds for which each has been left out [K], so that `drop` takes those
    first who waited longest, None where it does not ask; freedom: what devices choose beside the ratio; block_gain: each device's gain
    in each block relative to its own [K, N], None where all are alike; only an allocator that says which blocks asks; max_snr S: the
    signal-to-noise ratio, linear, that a device does not exceed or makes no use of, infinite where it has no such cap, None where
    nobody has.
    A signal below NO_LINK of the noise in the band is no link, and becomes s = 0.
    Raises ConfigError naming the first bad entry.
    """

    shared_compute_s: Array
    payload_bits: Array
    fixed_s: Array
    snr_hz: Array
    weight: Array
    max_ratio: Array
    bandwidth_hz: float
    deadline_s: float
    ids: Array | None = None
    limits: Limits | None = None
    titles: Array | None = None
    energies: Limits | None = None
    block_hz: float | None = None
    waited: Array | None = None
    freedom: Freedom = FIXED
    block_gain: Array | None = None
    max_snr: Array | None = None

    def __post_init__(self) -> None:
        size = len(self.weight)
        if size == 0:
            raise ConfigError("an allocation problem needs at least one device")
        for name in ("limits", "energies"):
            if (of := getattr(self, name)) is not None and len(of.tx_power_w) != size:
                raise ConfigError(f"{name}: {len(of.tx_power_w)} entries for {size} devices")
        if not SMALLEST <= self.bandwidth_hz <= LARGEST:
            raise ConfigError(
                f"bandwidth_hz={self.bandwidth_hz:g}: must be > 0 and finite ({SMALLEST:g} to {LARGEST:g})"
            )
        if not (self.deadline_s == 0 or SMALLEST <= self.deadline_s <= LATEST or self.deadline_s == np.inf):
            raise ConfigError(f"deadline_s={self.deadline_s}: must be >= 0 (0, or {SMALLEST:g} to {LATEST:g})")
        amount = f"finite and >= 0 {IN_RANGE}"
        for name in ("shared_compute_s", "payload_bits", "fixed_s", "weight"):
            refuse_first(name, getattr(self, name), in_range(getattr(self, name)), amount, self.called)
        refuse_first("snr_hz", self.snr_hz, (self.snr_hz >= 0) & (self.snr_hz <= LARGEST), amount, self.called)
        good = (self.max_ratio >= 0) & (self.max_ratio <= 1)
        refuse_first("max_ratio", self.max_ratio, good, "in [0, 1]", self.called)
        if self.max_snr is not None:
            good = in_range(self.max_snr) & (self.max_snr > 0) | (self.max_snr == np.inf)
            refuse_first("max_snr", self.max_snr, good, f"> 0 ({SMALLEST:g} to {LARGEST:g}, or infinite)", self.called)
            if self.chooses and self.log_cap is not None:
                raise ConfigError(
                    "allocator.clock and allocator.power are not chosen under a cap on the signal-to-noise ratio: fix both, or choose "
                    "channel.max_bits_per_hz=null and channel.p0_dbm=null"
                )
        weak = (self.snr_hz > 0) & (self.snr_hz < NO_LINK * self.bandwidth_hz)
        if weak.any():
            object.__setattr__(self, "snr_hz", np.where(weak, 0.0, self.snr_hz))

    @property
    def min_kept(self) -> Array:
        """The least fraction each device may keep, 1 - rho_max [K]."""
        return 1.0 - self.max_ratio

    def take(self, index: Array) -> Problem:
        """Returns the problem of some of the devices, in that order."""
        whole = ("bandwidth_hz", "deadline_s", "ids", "limits", "energies", "block_hz", "freedom")
        arrays = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in whole}
        limits, energies = (None if of is None else of.take(index) for of in (self.limits, self.energies))
        chosen = {name: array[index] for name, array in arrays.items() if array is not None}
        return replace(self, ids=self.names[index], limits=limits, energies=energies, **chosen)

    @property
    def chooses(self) -> bool:
        """Whether clock or power are worth a choice: without an energy budget both stay at their tops."""
        return bool(self.freedom) and self.limits is not None and bool(np.isfinite(self.limits.energy_budget_j).any())

    @property
    def log_cap(self) -> Array | None:
        """C = ln(1 + S) [K], infinite where a device has no cap; None where nobody has."""
        return None if self.max_snr is None or np.isinf(self.max_snr).all() else np.log1p(self.max_snr)

    @property
    def linked(self) -> Array:
        """Whether each device can send what it has to, bool [K]: it has a link, or nothing to send."""
        return (self.snr_hz > 0) | (self.payload_bits == 0)

    @property
    def spends(self) -> Limits | None:
        """What computing and sending cost each device, limited or not; None where that is not known."""
        return self.energies if self.limits is None else self.limits

    @property
    def names(self) -> Array:
        """The ids of the devices, int [K]."""
        return np.arange(len(self.weight)) if self.ids is None else self.ids

    @property
    def called(self) -> Array:
        """What the devices are called in messages [K]: by a table's ids, or else by their numbers."""
        return self.names if self.titles is None else self.titles

    @property
    def most_hz(self) -> Array:
        """The most bandwidth each device may be given [K]."""
        everything = np.full(len(self.weight), self.bandwidth_hz)
        return everything if self.limits is None else np.minimum(everything, self.limits.max_bandwidth_hz)

    @property
    def least_hz(self) -> Array:
        """The least bandwidth each device must be given, whatever it does with it [K]."""
        return np.zeros(len(self.weight)) if self.limits is None else self.limits.min_bandwidth_hz


Status = Literal["optimal", "feasible", "stretched", "dropped"]


@dataclass(frozen=True)
class Allocation:
    """Who gets what.

    prune_ratio rho, bandwidth_hz b, rate_bps r, latency_s t: [K], of no meaning where not `admitted`;
    deadline_s: the deadline that holds, later than asked when status is `stretched`;
    binds: for each device `deadline`, `energy`, `deadline, energy`, `dense` (nothing pruned), `max_ratio` (pruned to its cap), `ratio`
    (pruned as it was told, with time to spare), `compute` or `dropped`;
    price_per_hz: what one more hertz adds to sum w x, 0 for allocators without a price;
    objective: sum w x over the admitted; certificate: None for allocators that claim no optimality;
    message: who was dropped, what was missing and which knob helps, or empty; block_hz: of which each bandwidth is a whole multiple,
    None where any bandwidth may be given; joules: of computing and sending [K], None for allocators that do not look at them;
    clock, power: what of its full clock and of its full radiated power each device uses, in (0, 1] [K], None where they are not chosen;
    bits: of each device's values, int [K], where each has its own; owner: the place of the device that has each block, int [N], -1 where
    none has it, where it matters which; gap: of an answer that is not proven the best, how far from it a bound says it may be, relative.
    """

    prune_ratio: Array
    bandwidth_hz: Array
    rate_bps: Array
    latency_s: Array
    deadline_s: float
    admitted: Array
    binds: tuple[str, ...]
    price_per_hz: float
    objective: float
    certificate: Certificate | None
    status: Status
    message: str
    block_hz: float | None = None
    joules: Array | None = None
    clock: Array | None = None
    power: Array | None = None
    bits: Array | None = None
    owner: Array | None = None
    gap: float | None = None


def upload_s(problem: Problem, kept: Array, bandwidth_hz: Array) -> Array:
    """Returns x c / r(b) [K], seconds; 0 for a device that keeps nothing to send, infinite where a device must send and has no rate."""
    bits = kept * problem.payload_bits
    with np.errstate(divide="ignore"):
        return np.where(
            bits > 0, bits / np.where(bits > 0, rate(bandwidth_hz, problem.snr_hz, problem.log_cap), 1.0), 0.0
        )


def latency(problem: Problem, kept: Array, bandwidth_hz: Array) -> Array:
    """Returns t = x (a + c / r(b)) + d [K], seconds, at the chosen clock and power; infinite where a device must send and has no rate."""
    if not problem.chooses:
        return kept * problem.shared_compute_s + upload_s(problem, kept, bandwidth_hz) + problem.fixed_s
    clock, power = pace(problem, kept)
    means, sent_s = means_of(problem), upload_s(replace(problem, snr_hz=problem.snr_hz * power), kept, bandwidth_hz)
    compute_s = kept * means.compute_s + means.fixed_compute_s
    return problem.fixed_s - means.fixed_compute_s + compute_s / clock + sent_s


def energy(limits: Limits, kept: Array, upload_s: Array) -> Array:
    """Returns the joules [K] per round of devices that keep `kept` and send for `upload_s` seconds."""
    return kept * limits.shared_energy_j + limits.tx_power_w * upload_s + limits.fixed_energy_j


@dataclass(frozen=True)
class Resource:
    """A budget that a device's kept fraction x spends [K]: x (work + transfer / r) + fixed <= budget. `left` is budget - fixed."""

    left: Array
    work: Array
    transfer: Array

    def kept(self, rate_bps: Array) -> Array:
        """Returns the most a device can keep, left r / (work r + transfer), not capped at 1; 0 when nothing is left."""
        free = self.transfer == 0
        left = np.maximum(self.left, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            most = np.where(free, left / self.work, left * rate_bps / (self.work * rate_bps + self.transfer))
        return np.where(np.isnan(most), np.where(free, 1.0, 0.0), most)

    def rate(self, kept: Array) -> Array:
        """Returns the rate [K] at which a device that keeps `kept` spends all it may; infinite where no rate suffices."""
        left, transfer = self.left - kept * self.work, kept * self.transfer
        with np.errstate(divide="ignore", invalid="ignore"):
            needed = np.where(left > 0, transfer / left, np.inf)
        return np.where((transfer == 0) & (left >= 0), 0.0, needed)


def resources(problem: Problem) -> tuple[Resource, ...]:
    """Returns time, and energy where the problem limits it."""
    time = Resource(problem.deadline_s - problem.fixed_s, problem.shared_compute_s, problem.payload_bits)
    limits = problem.limits
    if limits is None or not np.isfinite(limits.energy_budget_j).any():
        return (time,)
    joules = limits.energy_budget_j - limits.fixed_energy_j
    return time, Resource(joules, limits.shared_energy_j, limits.tx_power_w * problem.payload_bits)


def curve_of(problem: Problem) -> Curve:
    """Returns what each share costs the devices of a problem with limits [K]."""
    return curve_of_means(means_of(problem))


def means_of(problem: Problem) -> Means:
    """Returns what the devices of a problem with limits have at their disposal [K]."""
    limits, size = limits_of(problem), len(problem.weight)
    computing_s = (
        np.zeros(size) if limits.fixed_compute_s is None else np.minimum(limits.fixed_compute_s, problem.fixed_s)
    )
    circuit_w = np.zeros(size) if limits.circuit_w is None else limits.circuit_w
    slows = problem.freedom.clock & (problem.shared_compute_s + computing_s > 0)
    computes = ~slows | (computing_s > 0)  # whether the fixed joules are those of computing
    return Means(
        compute_s=problem.shared_compute_s,
        fixed_compute_s=computing_s,
        time_s=np.minimum(problem.deadline_s, LATEST) - (problem.fixed_s - computing_s),
        compute_j=limits.shared_energy_j,
        fixed_j=np.where(computes, limits.fixed_energy_j, 0.0),
        budget_j=limits.energy_budget_j - np.where(computes, 0.0, limits.fixed_energy_j),
        circuit_w=circuit_w,
        amplifier_w=limits.tx_power_w - circuit_w,
        bits=problem.payload_bits,
        snr_hz=problem.snr_hz,
        slows=slows,
        dims=np.full(size, problem.freedom.power),
    )


def limits_of(problem: Problem) -> Limits:
    """Returns the limits of a problem that has some; raises ConfigError."""
    if problem.limits is None:
        raise ConfigError("limits: an allocation problem without limits has no energy to choose by")
    return problem.limits


def pace(problem: Problem, kept: Array) -> tuple[Array, Array]:
    """Returns which shares of its full clock and radiated power each device uses that keeps `kept` [K]: those of the least bandwidth.

    On more bandwidth than that it sends as strongly and is done sooner.
    """
    if not problem.chooses:
        return np.ones(len(kept)), np.ones(len(kept))
    choice = _choice_of(problem, kept)
    return choice.clock, choice.power


def short_of(problem: Problem, kept: Array) -> tuple[Array, Array]:
    """Whether time and whether energy is spent by devices that choose and keep `kept` [K], two of bool."""
    means, choice = means_of(problem), _choice_of(problem, kept)
    late = choice.compute_s + choice.send_s >= means.time_s * (1 - TOLERANCE)
    return late, ~late | (choice.clock < 1) | (choice.power < 1)


def _choice_of(problem: Problem, kept: Array) -> Choice:
    curve = curve_of(problem)
    return curve.at(curve.place(kept))


def kept_fraction(problem: Problem, bandwidth_hz: Array) -> Array:
    """Returns min(phi, psi) on bandwidths b [K]: the most that the deadline and the energy allow, not capped at 1; 0 when T < d.

    At most 1 where a clock or a power is chosen.
    """
    rate_bps = rate(bandwidth_hz, problem.snr_hz, problem.log_cap)
    if problem.chooses:
        curve = curve_of(problem)
        kept = curve.share(curve.kept(bandwidth_hz, rate_bps))
        return np.where(kept > 2 * LEAST, np.minimum(kept, 1.0), 0.0)
    return np.minimum.reduce([resource.kept(rate_bps) for resource in resources(problem)])


def possible(problem: Problem) -> Array:
    """Whether the deadline and the energy allow each device what pruning does not touch, bool [K]."""
    if problem.chooses:
        return means_of(problem).most >= 0
    return np.logical_and.reduce([resource.left >= 0 for resource in resources(problem)])


def kept_on(problem: Problem, bandwidth_hz: Array) -> Array:
    """Returns x [K] on bandwidths b: all that the deadline and the energy allow, within the bounds of x."""
    return np.clip(kept_fraction(problem, bandwidth_hz), problem.min_kept, 1.0)


def most_kept(problem: Problem) -> Array:
    """Returns the most that each device could keep with the whole band to itself [K]."""
    everything = np.where(problem.payload_bits > 0, problem.most_hz, 0.0)
    return np.minimum(1.0, kept_fraction(problem, everything))


def fit_band(problem: Problem, bandwidth_hz: Array) -> Array:
    """Returns bandwidths [K] that the band has room for: all scaled down alike, or what they have above their least."""
    total_hz = bandwidth_hz.sum()
    if total_hz <= problem.bandwidth_hz:
        return bandwidth_hz
    scaled_hz = bandwidth_hz * (problem.bandwidth_hz / total_hz)
    least_hz = problem.least_hz
    if (scaled_hz >= least_hz * (1 - TOLERANCE)).all():
        return scaled_hz
    above_hz = np.maximum(bandwidth_hz - least_hz, 0.0)
    room_hz = max(problem.bandwidth_hz - least_hz.sum(), 0.0)
    return least_hz + above_hz * min(room_hz / max(above_hz.sum(), SMALLEST), 1.0)


def required_rate(problem: Problem, kept: Array) -> Array:
    """Returns the least rate [K] at which a device that keeps `kept` meets the deadline and its energy budget; infinite if none."""
    return np.maximum.reduce([resource.rate(kept) for resource in resources(problem)])


def required_bandwidth(problem: Problem, kept: Array) -> Array:
    """Returns the least bandwidth [K] at which a device can keep `kept`; infinite where none suffices."""
    bandwidth_hz = _least_chosen(problem, kept) if problem.chooses else _least_fixed(problem, kept)
    if problem.limits is None:
        return bandwidth_hz
    beyond = bandwidth_hz > problem.limits.max_bandwidth_hz * (1 + TIGHT)
    return np.where(beyond, np.inf, np.clip(bandwidth_hz, problem.least_hz, problem.limits.max_bandwidth_hz))


def _least_fixed(problem: Problem, kept: Array) -> Array:
    needed = required_rate(problem, kept)
    reachable = needed < problem.snr_hz / LN2
    bandwidth_hz = bandwidth_of(log_snr_for_rate(needed, problem.snr_hz, problem.log_cap), problem.snr_hz)
    silent = (needed == 0) & ((kept * problem.payload_bits == 0) | (problem.snr_hz > 0))
    return np.where(silent, 0.0, np.where(reachable, bandwidth_hz, np.inf))


def _least_chosen(problem: Problem, kept: Array) -> Array:
    curve, silent = curve_of(problem), kept * problem.payload_bits == 0
    fits = kept <= curve.most * (1 + TIGHT)
    needed = np.where(silent, 0.0, curve.at(curve.place(kept)).bandwidth_hz)
    return np.where(fits, needed, np.inf)
