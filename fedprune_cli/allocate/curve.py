"""A device that chooses its clock and the power that it radiates: the least bandwidth on which it keeps a share (model.md, section 4).

To keep x a device computes A(x) = a x + c0 seconds and J(x) = e x + e0 joules at its full clock. A cycle costs kappa f^2 joules, so in
tau >= A seconds it costs J A^2 / tau^2. It sends y = c x bits in v seconds, of which it radiates the energy of eps <= v at full power:

    u log2(1 + s eps / u) >= y,  u = v b        tau + v <= T'        J A^2 / tau^2 + circuit v + amplifier eps <= E

The least u is U(y, eps). ln U is jointly convex in (ln y, ln eps) and everything else a posynomial, so the least b(x) = min U / v is
log-log convex with an elasticity of at least 1: convex and increasing. What a device can keep is therefore concave in its bandwidth,
as in P1.
In L = ln(1 + s eps / u) it is y = u L / ln 2, and d ln U / d ln y = 1 + rho, d ln U / d ln eps = -rho, rho = (1 - e^-L) / h(L).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fedprune_cli.allocate.freedom import Means
from fedprune_cli.allocate.inverse import BLOCK, LN2, log_ratio_slope, log_snr_fast, rate_slope
from fedprune_cli.allocate.roots import SMOOTH, increasing_roots
from fedprune_cli.store.state import Array

LEAST = 1e-280  # of the model: what a device keeps that keeps nothing, so that its logarithm is a number
END = 230.0  # z of a device that keeps all that it can on any bandwidth


@dataclass(frozen=True)
class Choice:
    """How a device keeps a share on the least bandwidth [n].

    bandwidth_hz b, infinite where no bandwidth suffices; elasticity d ln b / d ln x; bend: about how the elasticity grows with ln x
    (exactly at full clock and power); compute_s tau, send_s v; clock, power: what of the full clock and of the full radiated power it
    uses, in (0, 1]; split: ln(v / (scale - v)), where a search for the next choice begins.
    """

    bandwidth_hz: Array
    elasticity: Array
    bend: Array
    compute_s: Array
    send_s: Array
    clock: Array
    power: Array
    split: Array


@dataclass(frozen=True)
class Curve:
    """The least bandwidth b of devices as a function of what they keep [n], in z = ln(x / (end - x)).

    most: the share with which neither time nor energy is left to send; end: that, or 2 where it is more; spare_s, spare_j: what is left
    of both there. Near the end b has all the digits of end - x, which x has not.
    """

    means: Means
    most: Array
    end: Array
    spare_s: Array
    spare_j: Array

    def take(self, index: Array | slice) -> Curve:
        """Returns the curves of some of the devices."""
        return Curve(
            self.means.take(index), self.most[index], self.end[index], self.spare_s[index], self.spare_j[index]
        )

    def place(self, kept: Array) -> Array:
        """Returns z [n] of x = `kept`, at most END."""
        kept = np.maximum(kept, LEAST)
        with np.errstate(divide="ignore"):
            return np.log(kept) - np.log(np.maximum(self.end - kept, self.end * np.exp(-END)))

    def share(self, z: Array) -> Array:
        """Returns x [n] at z."""
        return self.end / (1 + np.exp(-z))

    @property
    def kink(self) -> Array:
        """z [n] where full clock and full power spend time and energy exactly and b has a kink; NaN where it has none."""
        m = self.means
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            left_j = m.budget_j - m.fixed_j - m.drawn_w * (m.time_s - m.fixed_compute_s)
            at = left_j / (m.compute_j - m.drawn_w * m.compute_s)
            return np.where((at > LEAST) & (at < self.end), self.place(at), np.nan)

    @property
    def late(self) -> Array:
        """Whether it is energy rather than time that is short above the kink, bool [n]: a share costs more than its time saves."""
        return self.means.compute_j > self.means.drawn_w * self.means.compute_s

    def short(self, z: Array) -> Array:
        """Whether energy is short at z, bool [n]: full clock and full power until the deadline would be too much."""
        m, x = self.means, self.share(z)
        with np.errstate(over="ignore"):
            spare_s = m.time_s - m.compute_s * x - m.fixed_compute_s
            return ~(m.compute_j * x + m.fixed_j + m.drawn_w * spare_s <= m.budget_j)

    def at(self, z: Array, short: Array | None = None, split: Array | None = None) -> Choice:
        """Returns how each device keeps its share at z [n] on the least bandwidth.

        short: on which side of a kink, where it is known; split: of a choice that is not far away, NaN where there is none.
        """
        short = self.short(z) if short is None else short
        split = np.full(len(z), np.nan) if split is None else split
        parts = [slice(at, at + BLOCK) for at in range(0, len(z), BLOCK)] or [slice(0)]
        choices = [self.take(part)._at(z[part], short[part], split[part]) for part in parts]
        return Choice(*(np.concatenate([getattr(one, field.name) for one in choices]) for field in fields(Choice)))

    def _at(self, z: Array, short: Array, split: Array) -> Choice:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            work = _Work.of(self, z)
            # at full clock and power all the time is spent, unless that is too much energy
            slope = -self.means.compute_s * work.kept / work.spare_s
            way = _Way(work.full_s, work.spare_s, work.spare_s, slope, slope)
            few = np.flatnonzero(short)
            if len(few):
                means, some = (self.means, work) if len(few) == len(z) else (self.means.take(few), work.take(few))
                spent = _at_full_power(means, some)
                dims = np.flatnonzero(means.dims & (spent.send_s > 0))
                if len(dims) == len(few):
                    spent = _at_chosen_power(means, some, spent, split[few])
                elif len(dims):
                    chosen = _at_chosen_power(means.take(dims), some.take(dims), spent.take(dims), split[few][dims])
                    spent = spent.put(dims, chosen)
                way = spent if len(few) == len(z) else way.put(few, spent)
            return _choice(self.means, work, way)

    def kept(self, bandwidth_hz: Array, rate_bps: Array) -> Array:
        """Returns z [n] of the most that each device can keep on bandwidths b, whose rates at full power are `rate_bps`, at least that
        of LEAST.
        """
        parts = [slice(at, at + BLOCK) for at in range(0, len(bandwidth_hz), BLOCK)] or [slice(0)]
        return np.concatenate([self.take(part)._kept(bandwidth_hz[part], rate_bps[part]) for part in parts])

    def _kept(self, bandwidth_hz: Array, rate_bps: Array) -> Array:
        m = self.means
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            # what full clock and power keep is a good place to start
            by_time = (m.time_s - m.fixed_compute_s) * rate_bps / (m.compute_s * rate_bps + m.bits)
            by_energy = (m.budget_j - m.fixed_j) * rate_bps / (m.compute_j * rate_bps + m.drawn_w * m.bits)
            sure = np.where(np.isinf(m.budget_j), by_time, np.fmin(by_time, np.fmax(by_energy, 0.5 * by_time)))
            start, goal = self.place(np.minimum(sure, self.end)), np.log(bandwidth_hz)
            low = self.place(np.full(len(goal), LEAST))
            high = np.where((rate_bps > 0) & (self.most > 0), END, low)
            high = np.where((m.bits > 0) | (self.most <= 0), high, low)

            split = np.full(len(goal), np.nan)

            def values(index: Array, z: Array) -> tuple[Array, Array]:
                curve = self if len(index) == len(goal) else self.take(index)
                choice = curve.at(z, split=split[index])
                split[index] = choice.split
                return np.log(choice.bandwidth_hz) - goal[index], choice.elasticity / (1 + np.exp(z))

            return np.where((m.bits > 0) | (self.most <= 0), increasing_roots(values, low, high, start), END)


@dataclass(frozen=True)
class _Work:
    """What keeping a share asks for [n]: kept x; full_s A, full_j J, nats y ln 2; s_slope, j_slope d ln A, d ln J / d ln x.

    spare_s T' - A; spare_j: the joules that computing leaves, in all the time there is where the clock is chosen.
    """

    kept: Array
    full_s: Array
    full_j: Array
    nats: Array
    s_slope: Array
    j_slope: Array
    spare_s: Array
    spare_j: Array

    @staticmethod
    def of(curve: Curve, z: Array) -> _Work:
        m, end = curve.means, curve.end
        x, rest = curve.share(z), end / (1 + np.exp(z))
        A, J = m.compute_s * x + m.fixed_compute_s, m.compute_j * x + m.fixed_j
        s_slope, j_slope = np.where(A > 0, m.compute_s * x / A, 0.0), np.where(J > 0, m.compute_j * x / J, 0.0)
        end_s = m.compute_s * end + m.fixed_compute_s
        slowed = m.compute_j * (end_s / m.time_s) ** 2 + J * (m.compute_s / m.time_s) * ((end_s + A) / m.time_s)
        spare_j = curve.spare_j + rest * np.where(m.slows, slowed, m.compute_j)
        return _Work(x, A, J, LN2 * m.bits * x, s_slope, j_slope, curve.spare_s + m.compute_s * rest, spare_j)

    def take(self, index: Array) -> _Work:
        return _Work(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class _Way:
    """How time and energy are spent [n]: compute_s tau, send_s v, radiated_s eps; d ln v and d ln eps / d ln x, of the envelope."""

    compute_s: Array
    send_s: Array
    radiated_s: Array
    send_slope: Array
    radiated_slope: Array

    def take(self, index: Array) -> _Way:
        return _Way(*(getattr(self, field.name)[index] for field in fields(self)))

    def put(self, index: Array, other: _Way) -> _Way:
        """Returns these ways with those of some of the devices replaced."""
        columns = []
        for field in fields(self):
            column = getattr(self, field.name).copy()
            column[index] = getattr(other, field.name)
            columns.append(column)
        return _Way(*columns)


def _spent_j(means: Means, work: _Work, compute_s: Array) -> Array:
    """Returns the joules of computing [n] in so many seconds."""
    return np.where(means.slows, work.full_j * (work.full_s / compute_s) ** 2, work.full_j)


def _braking(means: Means, spent_j: Array, compute_s: Array) -> Array:
    """Returns the joules [n] that a second less of computing costs."""
    return np.where(means.slows, 2 * spent_j / compute_s, 0.0)


def _hurry(means: Means, spent_j: Array, compute_s: Array) -> Array:
    """Returns the joules [n] of computing per second of sending, beyond what computing all the time would cost."""
    return np.where(means.slows, spent_j * (1 + compute_s / means.time_s) / means.time_s, 0.0)


def _at_full_power(means: Means, work: _Work) -> _Way:
    """Returns how the energy is spent at full power: the longest sending that it allows, at the clock that leaves the most of it."""
    A, J, P = work.full_s, work.full_j, means.drawn_w
    g = means.budget_j / P - means.time_s
    # tau^3 + g tau^2 = A^2 J / P has one positive root, which Newton on J / P (A / tau)^2 - tau - g approaches from the left
    cube_s = np.cbrt(J / P) * np.cbrt(A) ** 2
    first_s = np.where(g < 0, np.maximum(-g, cube_s), np.sqrt(0.5) * np.minimum(cube_s, A * np.sqrt(J / P / g)))
    tau = np.where(means.slows, np.fmax(first_s, A), A)
    for _ in range(60):
        pull = J / P * (A / tau) ** 2
        step = np.where(means.slows, (pull - tau - g) / (2 * pull / tau + 1), 0.0)
        tau = tau + np.where(step > 0, step, 0.0)
        if not (step > 1e-15 * tau).any():
            break
    spent_j = _spent_j(means, work, tau)
    v = work.spare_j / (P + _hurry(means, spent_j, tau))
    rise = work.j_slope + np.where(means.slows, 2 * work.s_slope, 0.0)
    slope = -spent_j * rise / (v * (_braking(means, spent_j, tau) + P))
    return _Way(tau, v, v, slope, slope)


def _at_chosen_power(means: Means, work: _Work, full: _Way, start: Array) -> _Way:
    """Returns the best way from full power on to less power for longer: rho v (2 C / tau + circuit) = amplifier eps."""
    A = work.full_s
    rest_s = np.where(means.slows, full.compute_s, means.scale_s - full.send_s)
    low = np.clip(np.log(full.send_s) - np.log(rest_s), -700.0, 700.0)
    rest_s = np.where(means.slows, A, means.scale_s - work.spare_s)
    high = np.clip(np.log(work.spare_s) - np.log(rest_s), low, 700.0)

    def values(index: Array, u: Array) -> tuple[Array, Array]:
        every = len(index) == len(low)
        return _balance(means, work, u) if every else _balance(means.take(index), work.take(index), u)

    start = np.where(np.isnan(start), np.minimum(0.5 * (low + high), low + 1.0), start)
    u = increasing_roots(values, low, high, start, near=SMOOTH)
    last_digits = 1e-14 * np.maximum(np.abs(u), 1.0)
    _, v, tau, spent_j, eps = _split(means, work, u)
    rise = work.j_slope + np.where(means.slows, 2 * work.s_slope, 0.0)
    way = _Way(tau, v, eps, np.zeros(len(v)), -spent_j * rise / (means.amplifier_w * eps))
    last_s, a_x = work.spare_s, A * work.s_slope
    left_j = np.where(means.slows, means.budget_j - work.full_j, work.spare_j) - means.circuit_w * last_s
    slope = (means.circuit_w * a_x - work.full_j * work.j_slope) / left_j
    slow = _Way(A, last_s, left_j / means.amplifier_w, -a_x / last_s, slope)
    at_low, at_high = u <= low + last_digits, u >= high - last_digits
    if (
        both := np.flatnonzero(at_low & at_high)
    ).size:  # at the kink it is the sign that says which of the two comes next
        longer = _balance(means.take(both), work.take(both), high[both])[0] < 0
        at_low[both], at_high[both] = ~longer, longer
    for which, other in ((at_high, slow), (at_low, full)):
        places = np.flatnonzero(which)
        way = way.put(places, other.take(places))
    return way


def _split(means: Means, work: _Work, u: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Returns v / scale, v, tau, the joules of computing and the seconds of full power that are left, where ln(v / (scale - v)) = u."""
    part = 1 / (1 + np.exp(-u))
    v, tau = means.scale_s * part, np.where(means.slows, means.time_s / (1 + np.exp(u)), work.full_s)
    spent_j = _spent_j(means, work, tau)
    left_j = work.spare_j - v * (_hurry(means, spent_j, tau) + means.circuit_w)
    return part, v, tau, spent_j, left_j / means.amplifier_w


def _balance(means: Means, work: _Work, u: Array) -> tuple[Array, Array]:
    """Returns the logarithm of (rho v (2 C / tau + circuit)) / (amplifier eps), which increases with u, and its derivative."""
    part, v, tau, spent_j, eps = _split(means, work, u)
    L = log_snr_fast(np.log(means.snr_hz * eps / work.nats))
    tail, q, h = np.exp(-L), -np.expm1(-L), rate_slope(L)
    brake = _braking(means, spent_j, tau)
    cost = brake + means.circuit_w
    value = np.log(q / h * v * cost) - np.log(means.amplifier_w * eps)
    value = np.where((eps > 0) & (L > 0), value, np.inf)
    d_eps = -v * cost * (1 - part) / (means.amplifier_w * eps)
    d_L = d_eps / log_ratio_slope(L)
    return value, (tail / q - q / h) * d_L + (1 - part) + 3 * brake * part / cost - d_eps


def _choice(means: Means, work: _Work, way: _Way) -> Choice:
    L = log_snr_fast(np.log(means.snr_hz * way.radiated_s / work.nats))
    tail, q, h = np.exp(-L), -np.expm1(-L), rate_slope(L)
    rho, v, eps = q / h, way.send_slope, way.radiated_slope
    possible = (way.send_s > 0) & (way.radiated_s > 0) & (L > 0)
    b = np.where(possible, work.nats / L / way.send_s, np.inf)
    elasticity = np.where(possible, 1 + rho * (1 - eps) - v, np.inf)
    bend = rho * ((q / h - tail / q) * (1 - eps) ** 2 / log_ratio_slope(L) - eps * (1 - eps)) - v * (1 - v)
    clock = np.where(means.slows & (way.compute_s > work.full_s), work.full_s / way.compute_s, 1.0)
    power = np.where(way.radiated_s < way.send_s, way.radiated_s / way.send_s, 1.0)
    split = np.log(way.send_s) - np.log(means.scale_s - way.send_s)
    return Choice(b, elasticity, np.where(possible, bend, np.nan), way.compute_s, way.send_s, clock, power, split)


def curve_of_means(means: Means) -> Curve:
    """Returns the devices' least bandwidths as functions of what they keep."""
    most = means.most
    end = np.clip(most, LEAST, 2.0)
    A, J = means.compute_s * end + means.fixed_compute_s, means.compute_j * end + means.fixed_j
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        spare_j = means.budget_j - np.where(means.slows, J * (A / means.time_s) ** 2, J)
        by_time = means.compute_s * end >= (means.time_s - means.fixed_compute_s) * (1 - 1e-15)
    at_end = most == end
    spare_s = np.where(at_end & by_time, 0.0, np.maximum(means.time_s - A, 0.0))
    return Curve(means, most, end, spare_s, np.where(at_end & ~by_time, 0.0, np.maximum(spare_j, 0.0)))
