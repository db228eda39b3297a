"""The stretches of bandwidth over which devices compete, and what a hertz is worth on them, in L = ln(1 + s/b) (model.md, section 4).

On Shannon's rate r = R g(L) and r' = h(L) / ln 2, as `kkt` says. Below b = s / S, where a cap S on the signal-to-noise ratio holds,
the rate is in proportion to the bandwidth, and with C = ln(1 + S) the same formulas hold with

    g(L) = C / (e^L - 1),   h(L) = C

There w phi' still increases with L, unless A = 0: then it is the same all along, and at that price a device takes any part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np

from fedprune_cli.allocate.chosen import Conditions
from fedprune_cli.allocate.inverse import BLOCK, MAX_LOG_SNR, bandwidth_of, log_ratio_slope, rate_slope
from fedprune_cli.allocate.limits import SMALLEST
from fedprune_cli.allocate.problem import SAMPLE, TIGHT, Problem, kept_fraction
from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class Curves:
    """The stretches of bandwidth over which devices compete, and their marginal value as a function of L.

    A device has one, or two where its energy budget takes over from its deadline or the other way round: the first runs from
    its least bandwidth to the crossing, the second on from there. A cap on the signal-to-noise ratio cuts that which holds it in two, in
    the same way. All share the device's L.
    index: the device, log_m, A: [n]; wide, narrow: L at the most and at the least bandwidth of the stretch;
    base_hz: what the stretches before it hold; log_bottom, log_top: ln(w x') at wide and narrow; alpha: 0 for w x, 1 for w ln x,
    2 for -w / x, of which m has the constants; cap: C of the stretches on which the rate is in proportion to the bandwidth, infinite
    for the others, None where there is no such stretch.
    """

    index: Array
    snr_hz: Array
    log_m: Array
    A: Array
    wide: Array
    narrow: Array
    base_hz: Array
    log_bottom: Array
    log_top: Array
    alpha: float = field(default=0.0, kw_only=True)
    cap: Array | None = field(default=None, kw_only=True)

    def bandwidth(self, L: Array) -> Array:
        """Returns the bandwidth [n] that each stretch adds to its device."""
        return bandwidth_of(L, self.snr_hz) - self.base_hz

    def worth(self, kept: Array) -> Array:
        """Returns what x [K] is worth, per weight: x, or ln x, which begins at that of SMALLEST."""
        return np.log(np.maximum(kept, SMALLEST)) if self.alpha else kept

    def per_device(self, values: Array, count: int) -> Array:
        """Returns the sum of `values` [n] over each device's stretches [count]."""
        return np.bincount(self.index, values, count)

    def value_and_slope(self, L: Array, part: slice = slice(None)) -> tuple[Array, Array]:
        """Returns ln(w phi'), increasing in L, and its derivative, for the devices of `part`."""
        log_m, A = self.log_m[part], self.A[part]
        tail, q = np.exp(-L), -np.expm1(-L)  # e^-L and 1 - e^-L
        h = L - q
        with np.errstate(divide="ignore", invalid="ignore"):
            bend = 1 / q - 1 / L
            if (small := L < 0.02).any():  # where the differences above lose their digits
                h = np.where(small, rate_slope(L), h)
                bend = np.where(small, log_ratio_slope(L), bend)
            top, rise = L, q / h
            if self.cap is not None and (linear := np.isfinite(cap := self.cap[part])).any():
                top, h = np.where(linear, cap, L), np.where(linear, cap, h)
                rise, bend = np.where(linear, 0.0, rise), np.where(linear, 1 / q, bend)
            Ag, steep = A * top * tail / q, 2 - self.alpha
            value, slope = log_m + np.log(h) - steep * np.log1p(Ag), rise + steep * Ag / (1 + Ag) * bend
            if self.alpha:  # bend is -d ln g / dL
                value, slope = value - self.alpha * np.log(top * tail / q), slope + self.alpha * bend
            return value, slope

    def log_value(self, L: Array) -> Array:
        """Returns ln(w phi') [n]."""
        return self.value_and_slope(L)[0]

    def log_snr_at(self, log_price: float, start: Array) -> Array:
        """Returns L [n] at which each device's marginal value is the price, within its bounds.

        Newton in ln L, in which the curve is nearly straight; bisection of ln L where a step leaves the bracket or gets nowhere.
        """
        parts = [slice(at, at + BLOCK) for at in range(0, len(start), BLOCK)]
        return np.concatenate([self._log_snr_at(log_price, start[part], part) for part in parts])

    def _log_snr_at(self, log_price: float, start: Array, part: slice) -> Array:
        low, high = self.wide[part], self.narrow[part]
        widest, narrowest = low, high
        tops = self.log_top[part] <= log_price
        bottoms = self.log_bottom[part] >= log_price
        bound = tops | bottoms
        L = np.clip(start, low, high)
        if self.cap is not None and (linear := np.isfinite(cap := self.cap[part])).any():
            L = np.where(linear, np.clip(self._log_snr_of_linear(log_price, cap, part), low, high), L)
            bound |= linear
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for turn in range(200):
                value, slope = self.value_and_slope(L, part)
                error = value - log_price
                open_ = ~(bound | (np.abs(error) <= 1e-13))
                if not open_.any():
                    break
                if turn < 6:  # mostly that is all it takes
                    L = np.clip(L * np.exp(-error / (L * slope)), low, high)
                    continue
                low, high = np.where(error < 0, L, low), np.where(error > 0, L, high)
                step = L * np.exp(-error / (L * slope))
                halve = (step <= low) | (step >= high) | ((turn % 3 == 2) & (np.abs(error) > 0.1))
                if halve.any():
                    step = np.where(halve, np.sqrt(low * high), step)
                L = np.where(open_, step, L)
        return np.where(tops, narrowest, np.where(bottoms, widest, L))

    def _log_snr_of_linear(self, log_price: float, cap: Array, part: slice) -> Array:
        """Returns L where the marginal value of a stretch in proportion to its bandwidth is the price: (1 + A g)^(2 - alpha) g^alpha = K.

        Any L where it is the price all along.
        """
        A = self.A[part]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            log_K = np.clip(self.log_m[part] + np.log(cap) - log_price, -MAX_LOG_SNR, MAX_LOG_SNR)
            if self.alpha == 0:
                g = np.expm1(0.5 * log_K) / A
            elif self.alpha == 1:
                K = np.exp(log_K)
                g = 2 * K / (1 + np.sqrt(1 + 4 * A * K))
            else:  # A is 0
                g = np.exp(log_K / self.alpha)
            return np.nan_to_num(np.log1p(cap / g), nan=0.0, posinf=MAX_LOG_SNR)

    def rate_slope(self, L: Array) -> Array:
        """Returns h [n], r'(b) ln 2."""
        slope = rate_slope(L)
        return slope if self.cap is None else np.where(np.isfinite(self.cap), self.cap, slope)

    @property
    def counts(self) -> Array:
        """Which stretches [n] are worth anything."""
        return np.isfinite(self.log_m)

    def ends(self) -> tuple[Array, Array]:
        """Returns the most and the least bandwidth of each stretch [n]."""
        return self.bandwidth(self.wide), self.bandwidth(self.narrow)

    def dearest(self) -> float:
        """Returns the least price at which nobody takes more than its least."""
        return float(np.exp(min(self.log_top[self.counts].max(initial=-np.inf), MAX_LOG_SNR)))

    def fill(self, budget_hz: float) -> tuple[Array, float]:
        """Returns the bandwidth [n] and the price at which the stretches use the budget up."""
        return _fill(self, budget_hz)

    def response(self, price_per_hz: float) -> Array:
        """Returns the bandwidth [n] that is best at a price, each device on its own."""
        return self.bandwidth(self.log_snr_at(float(np.log(price_per_hz)), np.sqrt(self.wide * self.narrow)))

    def conditions(self, problem: Problem, kept: Array, bandwidth_hz: Array, price_per_hz: float) -> Conditions:
        """Returns how far x = `kept` [K] on b [K] are from the conditions of optimality."""
        return self.conditions_at(bandwidth_hz, price_per_hz, _ends(problem, self, kept[self.index]))

    def conditions_at(self, bandwidth_hz: Array, price_per_hz: float, ends: tuple[Array, Array]) -> Conditions:
        """Returns the same; ends: which stretches [n] are used up, and which are not begun."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            L = np.log1p(self.snr_hz / bandwidth_hz[self.index])
            L = np.clip(L, self.wide, np.minimum(self.narrow, MAX_LOG_SNR))
            log_ratio = self.log_value(L) - np.log(price_per_hz)
        error = np.where(self.counts, np.expm1(np.minimum(log_ratio, 700.0)), -1.0)
        return Conditions(error, -error, *ends)

    def take(self, index: Array | slice) -> Curves:
        """Returns the curves of some of the devices."""
        cap = None if self.cap is None else self.cap[index]
        return replace(self, cap=cap, **{name: getattr(self, name)[index] for name in ARRAYS})

    def capped(self, log_cap: Array | None) -> Curves:
        """Returns the curves of devices whose L counts up to C = `log_cap` [K]: what of a stretch is beyond it, and then the rest."""
        if log_cap is None or not (linear := self.narrow > (cap := log_cap[self.index])).any():
            return self
        straight = np.where(linear, cap, np.inf)
        first = replace(self, wide=np.where(linear, np.maximum(self.wide, cap), self.wide))
        rest = np.flatnonzero(linear & (self.wide < cap))
        second = replace(self.take(rest), narrow=cap[rest], base_hz=bandwidth_of(cap[rest], self.snr_hz[rest]))
        joined = (np.concatenate([getattr(first, name), getattr(second, name)]) for name in ARRAYS)
        return Curves(*joined, alpha=self.alpha, cap=np.append(straight, np.full(len(rest), np.inf)))

    def ended(self) -> Curves:
        """Returns the curves with the marginal values at their ends."""
        return replace(self, log_bottom=self.log_value(self.wide), log_top=self.log_value(self.narrow))


ARRAYS = tuple(one.name for one in fields(Curves) if one.name not in ("alpha", "cap"))


def _fill(curves: Curves, budget_hz: float) -> tuple[Array, float]:
    """Returns the bandwidth [n] and the price at which the stretches use the budget up: Newton on ln(sum b) in ln(price), guarded.

    The budget closes to 1e-13. Scaling the rest away would be worse: where floors take nearly the whole band, it is large for the others.
    Where many bandwidths are best at one price, because the rate is in proportion to them, what is left is shared among those who want it.
    """
    count, stepped = len(curves.index), curves.cap is not None
    worth = curves.counts
    low, high = float(curves.log_bottom[worth].min()), float(curves.log_top[worth].max())
    L = np.clip(np.log1p(curves.snr_hz * count / budget_hz), curves.wide, curves.narrow)
    log_price = np.median(curves.log_value(L)[worth])
    if count > 2 * SAMPLE:  # what a sample of the devices would pay is a good place to start
        sample = curves.take(slice(None, None, count // SAMPLE))
        share_hz = budget_hz * len(sample.index) / count
        least_hz, most_hz = (float(sample.bandwidth(end).sum()) for end in (sample.narrow, sample.wide))
        if least_hz < share_hz < most_hz and np.isfinite(sample.log_m).any():
            log_price = np.log(_fill(sample, share_hz)[1])
    log_price = float(np.clip(log_price, low, high))
    for turn in range(200):
        L = curves.log_snr_at(log_price, L)
        b = curves.bandwidth(L)
        excess = float(b.sum()) / budget_hz - 1
        if abs(excess) <= 1e-13 or high - low <= 1e-15 * max(abs(low), abs(high)):
            break
        low, high = (log_price, high) if excess > 0 else (low, log_price)
        free = (curves.wide < L) & (curves.narrow > L)
        # d ln b / dL = -1 / (1 - e^-L)
        steepness = curves.value_and_slope(L)[1]
        slope = -float(((b + curves.base_hz)[free] / -np.expm1(-L[free]) / steepness[free]).sum()) / b.sum()
        step = log_price - np.log1p(excess) / slope if slope < 0 and excess > -1 else np.nan
        step = step if low < step < high and not (stepped and turn > 9 and turn % 2) else 0.5 * (low + high)
        L = np.where(
            free, L + (step - log_price) / np.where(free, steepness, 1.0), L
        )  # where each device is about to be
        log_price = step
    if stepped and abs(excess) > 1e-13:
        ends = np.nextafter(low, -np.inf), np.nextafter(high, np.inf)
        more_hz, fewer_hz = (curves.bandwidth(curves.log_snr_at(float(at), L)) for at in ends)
        spare_hz, wanted_hz = budget_hz - float(fewer_hz.sum()), float((more_hz - fewer_hz).sum())
        b = fewer_hz + (more_hz - fewer_hz) * min(max(spare_hz / max(wanted_hz, SMALLEST), 0.0), 1.0)
    return b, float(np.exp(log_price))


def _ends(problem: Problem, curves: Curves, kept: Array) -> tuple[Array, Array]:
    """Returns which stretches [n] are used up and which are not begun, for the devices' x = `kept` [n]."""
    most, least = np.ones(len(kept)), problem.min_kept[curves.index]
    if (problem.limits is not None or curves.cap is not None) and len(kept):
        p = problem.take(curves.index)
        most, least = (
            np.clip(kept_fraction(p, bandwidth_of(end, p.snr_hz)), p.min_kept, 1.0)
            for end in (curves.wide, curves.narrow)
        )
    return kept >= most - TIGHT, kept <= least + TIGHT
