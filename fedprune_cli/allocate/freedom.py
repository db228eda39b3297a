"""A device that chooses its clock and the power that it radiates: the least bandwidth on which it keeps a share (model.md, section 4).

To keep x a device computes A(x) = a x + c0 seconds and J(x) = e x + e0 joules at its full clock. A cycle costs kappa f^2 joules, so in
tau >= A seconds it costs J A^2 / tau^2. It sends y = c x bits in v seconds, of which it radiates the energy of eps <= v at full power:

    u log2(1 + s eps / u) >= y,  u = v b        tau + v <= T'        J A^2 / tau^2 + circuit v + amplifier eps <= E

The least u is U(y, eps). ln U is jointly convex in (ln y, ln eps) and everything else a posynomial, so the least b(x) = min U / v is
log-log convex with an elasticity of at least 1: convex and increasing. What a device can keep is therefore concave in its bandwidth, as in P1.
In L = ln(1 + s eps / u) it is y = u L / ln 2, and d ln U / d ln y = 1 + rho, d ln U / d ln eps = -rho, rho = (1 - e^-L) / h(L).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fedprune_cli.allocate.inverse import BLOCK, LN2, log_ratio_slope, log_snr_fast, rate_slope
from fedprune_cli.allocate.roots import increasing_roots
from fedprune_cli.store.state import Array

LEAST = 1e-280  # of the model: what a device keeps that keeps nothing, so that its logarithm is a number


@dataclass(frozen=True)
class Freedom:
    """What devices choose beside the ratio: the clock, the radiated power; a device's own limits are the tops of both."""

    clock: bool = False
    power: bool = False

    def __bool__(self) -> bool:
        return self.clock or self.power


FIXED = Freedom()


@dataclass(frozen=True)
class Choice:
    """How a device keeps a share on the least bandwidth [n].

    bandwidth_hz b, infinite where no bandwidth suffices; elasticity d ln b / d ln x; bend: about how the elasticity grows with ln x (exactly
    at full clock and power); compute_s tau, send_s v; clock, power: what of the full clock and of the full radiated power it uses, in (0, 1].
    """

    bandwidth_hz: Array
    elasticity: Array
    bend: Array
    compute_s: Array
    send_s: Array
    clock: Array
    power: Array


@dataclass(frozen=True)
class Means:
    """What devices that choose have at their disposal [n], in SI.

    compute_s a, fixed_compute_s c0: seconds at the full clock; time_s T'; compute_j e, fixed_j e0: joules at the full clock; budget_j E;
    circuit_w: what the radio draws whatever it radiates, amplifier_w: what it draws beside that at full power; bits c; snr_hz s at full
    power; slows: whether the clock is chosen, bool; dims: whether the power is, bool.
    """

    compute_s: Array
    fixed_compute_s: Array
    time_s: Array
    compute_j: Array
    fixed_j: Array
    budget_j: Array
    circuit_w: Array
    amplifier_w: Array
    bits: Array
    snr_hz: Array
    slows: Array
    dims: Array

    def take(self, index: Array | slice) -> Means:
        """Returns the means of some of the devices."""
        return Means(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def drawn_w(self) -> Array:
        """What the radio draws at full power [n]."""
        return self.circuit_w + self.amplifier_w

    @property
    def kink(self) -> Array:
        """The share [n] at which full clock and full power spend time and energy exactly, where b(x) has a kink; infinite where none is."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            left_j = self.budget_j - self.fixed_j - self.drawn_w * (self.time_s - self.fixed_compute_s)
            at = left_j / (self.compute_j - self.drawn_w * self.compute_s)
        return np.where(at > 0, at, np.inf)

    @property
    def most(self) -> Array:
        """The share [n] with which neither time nor energy is left to send, at most 1; -1 where not even nothing can be kept."""
        a, c0, e, e0, E = self.compute_s, self.fixed_compute_s, self.compute_j, self.fixed_j, self.budget_j
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            least_j = np.where(self.slows & (c0 < self.time_s), e0 * (c0 / self.time_s) ** 2, e0)
            by_time = np.where(a > 0, (self.time_s - c0) / a, np.inf)
            # each term of (e x + e0) ((a x + c0) / T')^2 <= E by itself bounds x, and the least bound is not far from the root
            work, fixed = a / self.time_s, c0 / self.time_s
            bounds = (np.cbrt(E / e) / np.cbrt(work) ** 2, np.sqrt(E / e0) / work, E / e / fixed**2)
            x = np.fmin.reduce([np.where(np.isnan(bound), np.inf, bound) for bound in bounds])
            for _ in range(60):
                A, J = work * x + fixed, e * x + e0
                step = (J * A - E / A) / (e * A + 2 * work * J)
                x, before = np.where(step > 0, np.maximum(x - step, 0.0), x), x
                if (before - x <= 1e-16 * before).all() or not np.isfinite(x).any():
                    break
            by_energy = np.where(self.slows, x, np.where(e > 0, (E - e0) / e, np.inf))
        begins = (self.time_s >= c0) & (least_j <= E)
        return np.where(begins, np.minimum(1.0, np.minimum(by_time, by_energy)), -1.0)

    @property
    def late(self) -> Array:
        """Whether it is energy rather than time that is short above the kink, bool [n]: each kept share costs more than its time saves."""
        return self.compute_j > self.drawn_w * self.compute_s

    def short(self, kept: Array) -> Array:
        """Whether energy is short at x = `kept`, bool [n]: full clock and full power until the deadline would be too much."""
        full_j = self.compute_j * kept + self.fixed_j
        with np.errstate(over="ignore"):
            return ~(full_j + self.drawn_w * (self.time_s - self.compute_s * kept - self.fixed_compute_s) <= self.budget_j)

    def at(self, kept: Array, short: Array | None = None) -> Choice:
        """Returns how each device keeps `kept` [n] > 0 on the least bandwidth; short: on which side of a kink, where it is known."""
        short = self.short(kept) if short is None else short
        parts = [slice(at, at + BLOCK) for at in range(0, len(kept), BLOCK)] or [slice(0)]
        choices = [self.take(part)._at(kept[part], short[part]) for part in parts]
        return Choice(*(np.concatenate([getattr(one, field.name) for one in choices]) for field in fields(Choice)))

    def _at(self, x: Array, short: Array) -> Choice:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            work = _Work.of(self, x)
            spare_s = self.time_s - work.full_s
            # at full clock and power all the time is spent, unless that is too much energy
            slope = -work.full_s * work.s_slope / spare_s
            way = _Way(work.full_s, spare_s, spare_s, slope, slope)
            few = np.flatnonzero(short)
            if len(few):
                means = self.take(few)
                way = way.put(few, means._at_full_power(work.take(few)))
                dims = few[means.dims & (way.send_s[few] > 0)]
                if len(dims):
                    way = way.put(dims, self.take(dims)._at_chosen_power(work.take(dims), way.take(dims)))
            return self._choice(work, way)

    def _at_full_power(self, work: _Work) -> _Way:
        """Returns how the energy is spent at full power: the longest sending that it allows, at the clock that leaves the most of it."""
        A, J, T, P = work.full_s, work.full_j, self.time_s, self.drawn_w
        g = self.budget_j / P - T
        # tau^3 + g tau^2 = A^2 J / P has one positive root, which J / P (A / tau)^2 - tau - g approaches from the left without leaving it
        cube_s = np.cbrt(J / P) * np.cbrt(A) ** 2
        first_s = np.where(g < 0, np.maximum(-g, cube_s), np.sqrt(0.5) * np.minimum(cube_s, A * np.sqrt(J / P / g)))
        tau = np.where(self.slows, np.maximum(first_s, A), A)
        for _ in range(60):
            pull = J / P * (A / tau) ** 2
            step = np.where(self.slows, (pull - tau - g) / (2 * pull / tau + 1), 0.0)
            tau = tau + np.where(step > 0, step, 0.0)
            if not (step > 1e-15 * tau).any():
                break
        spent_j = np.where(self.slows, J * (A / tau) ** 2, J)
        v = np.where(self.slows & (spent_j > 0.5 * self.budget_j), T - tau, (self.budget_j - spent_j) / P)
        slope = -spent_j * work.j_slope / (v * (self._braking(spent_j, tau) + P))
        return _Way(tau, v, v, slope, slope)

    def _braking(self, spent_j: Array, compute_s: Array) -> Array:
        """Returns the joules [n] that a second less of computing costs."""
        return np.where(self.slows, 2 * spent_j / compute_s, 0.0)

    def _at_chosen_power(self, work: _Work, full: _Way) -> _Way:
        """Returns the best way from full power on to less power for longer: rho v (2 C / tau + circuit) = amplifier eps."""
        A, J, T = work.full_s, work.full_j, self.time_s
        low = np.clip(np.log(full.send_s) - np.log(T - full.send_s), -700.0, 700.0)
        high = np.clip(np.log(T - A) - np.log(A), low, 700.0)
        at_low, at_high = self._balance(work, low)[0] >= 0, self._balance(work, high)[0] <= 0
        inner = np.flatnonzero(~(at_low | at_high))
        means, some = self.take(inner), work.take(inner)

        def values(index: Array, z: Array) -> tuple[Array, Array]:
            every = len(index) == len(inner)
            return means._balance(some, z) if every else means.take(index)._balance(some.take(index), z)

        z = high
        z[inner] = increasing_roots(values, low[inner], high[inner], np.minimum(0.5 * (low + high), low + 1.0)[inner])
        _, v, tau, spent_j, eps = self._spent(work, z)
        inner = _Way(tau, v, eps, np.zeros(len(v)), -spent_j * work.j_slope / (self.amplifier_w * eps))
        last_s = T - A
        rest = (self.budget_j - J - self.circuit_w * last_s) / self.amplifier_w
        a_x = A * work.s_slope
        slow = _Way(A, last_s, rest, -a_x / last_s, (self.circuit_w * a_x - J * work.own_slope) / (self.amplifier_w * rest))
        return inner.put(np.flatnonzero(at_high), slow.take(np.flatnonzero(at_high))).put(
            np.flatnonzero(at_low), full.take(np.flatnonzero(at_low))
        )

    def _spent(self, work: _Work, z: Array) -> tuple[Array, Array, Array, Array, Array]:
        """Returns v / T', v, tau, the joules of computing and what is left to radiate, in seconds of full power, where ln(v / (T' - v)) = z."""
        part = 1 / (1 + np.exp(-z))
        v, tau = self.time_s * part, np.where(self.slows, self.time_s / (1 + np.exp(z)), work.full_s)
        spent_j = np.where(self.slows, work.full_j * (work.full_s / tau) ** 2, work.full_j)
        return part, v, tau, spent_j, (self.budget_j - spent_j - self.circuit_w * v) / self.amplifier_w

    def _balance(self, work: _Work, z: Array) -> tuple[Array, Array]:
        """Returns the logarithm of (rho v (2 C / tau + circuit)) / (amplifier eps), which increases with z, and its derivative."""
        part, v, tau, spent_j, eps = self._spent(work, z)
        L = log_snr_fast(np.log(self.snr_hz * eps / work.nats))
        tail, q, h = np.exp(-L), -np.expm1(-L), rate_slope(L)
        brake = self._braking(spent_j, tau)
        cost = brake + self.circuit_w
        value = np.log(q / h * v * cost) - np.log(self.amplifier_w * eps)
        value = np.where((eps > 0) & (L > 0), value, np.inf)
        d_eps = -v * cost * (1 - part) / (self.amplifier_w * eps)
        d_L = d_eps / log_ratio_slope(L)
        return value, (tail / q - q / h) * d_L + (1 - part) + 3 * brake * part / cost - d_eps

    def _choice(self, work: _Work, way: _Way) -> Choice:
        L = log_snr_fast(np.log(self.snr_hz * way.radiated_s / work.nats))
        tail, q, h = np.exp(-L), -np.expm1(-L), rate_slope(L)
        rho, v, eps = q / h, way.send_slope, way.radiated_slope
        possible = (way.send_s > 0) & (way.radiated_s > 0) & (L > 0)
        b = np.where(possible, work.nats / L / way.send_s, np.inf)
        elasticity = np.where(possible, 1 + rho * (1 - eps) - v, np.inf)
        bend = rho * ((q / h - tail / q) * (1 - eps) ** 2 / log_ratio_slope(L) - eps * (1 - eps)) - v * (1 - v)
        clock = np.where(self.slows & (way.compute_s > work.full_s), work.full_s / way.compute_s, 1.0)
        power = np.where(way.radiated_s < way.send_s, way.radiated_s / way.send_s, 1.0)
        return Choice(b, elasticity, np.where(possible, bend, np.nan), way.compute_s, way.send_s, clock, power)

    def kept(self, bandwidth_hz: Array, rate_bps: Array) -> Array:
        """Returns the most that each device can keep [n] on bandwidths b, whose rates at full power are `rate_bps`; 0 where nothing.

        Newton on ln b(x) in ln x, guarded by what full clock and power keep and by what time alone allows.
        """
        parts = [slice(at, at + BLOCK) for at in range(0, len(bandwidth_hz), BLOCK)] or [slice(0)]
        return np.concatenate([self.take(part)._kept(bandwidth_hz[part], rate_bps[part]) for part in parts])

    def _kept(self, bandwidth_hz: Array, rate_bps: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            time_s, joules = self.time_s - self.fixed_compute_s, self.budget_j - self.fixed_j
            by_time = time_s * rate_bps / (self.compute_s * rate_bps + self.bits)
            by_energy = joules * rate_bps / (self.compute_j * rate_bps + self.drawn_w * self.bits)
            by_energy = np.where(np.isinf(joules), np.inf, by_energy)
            sends = self.bits > 0
            top = np.where(sends, np.minimum(by_time, self.most), self.most)
            sure = np.where(sends, np.clip(np.minimum(top, by_energy), 0.0, None), top)
            x, low, high = np.maximum(sure, LEAST), np.log(np.maximum(sure, LEAST)), np.log(np.maximum(top, LEAST))
            open_ = np.flatnonzero(high > low)
            if not len(open_):
                return np.where(top > LEAST, np.minimum(x, 1.0), 0.0)
            means, goal = self.take(open_), np.log(bandwidth_hz[open_])

            def values(index: Array, X: Array) -> tuple[Array, Array]:
                choice = means.take(index).at(np.exp(X))
                return np.log(choice.bandwidth_hz) - goal[index], choice.elasticity

            x[open_] = np.exp(increasing_roots(values, low[open_], high[open_], np.maximum(0.5 * (low + high), high - 1.0)[open_]))
            return np.where(top > LEAST, np.minimum(x, 1.0), 0.0)


@dataclass(frozen=True)
class _Work:
    """What keeping a share asks for [n]: full_s A, full_j J, nats y ln 2; s_slope, own_slope d ln A, d ln J / d ln x; j_slope that of C at a given tau."""

    full_s: Array
    full_j: Array
    nats: Array
    s_slope: Array
    own_slope: Array
    j_slope: Array

    @staticmethod
    def of(means: Means, x: Array) -> _Work:
        A, J = means.compute_s * x + means.fixed_compute_s, means.compute_j * x + means.fixed_j
        s_slope = np.where(A > 0, means.compute_s * x / A, 0.0)
        own_slope = np.where(J > 0, means.compute_j * x / J, 0.0)
        return _Work(A, J, LN2 * means.bits * x, s_slope, own_slope, own_slope + np.where(means.slows, 2 * s_slope, 0.0))

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
