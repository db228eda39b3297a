"""Bits per value chosen for each device together with ratio and bandwidth: P1 over the upper hull of each device's curves.

A device that sends values of q bits keeps phi_kq(b), and is worth w_k x_k / (1 + omega_q / K), as `Payload` says of all devices together.
The best of several concave curves is not concave, so a price alone proves the sum

    g(price) = price B + sum_k max_q max_b [w_kq phi_kq(b) - price b]

to be an upper bound, and not that it is reached: at the least bound all devices but those that switch there have their answer. The
switching ones are tried in turn, P1 with these bits is solved exactly, and what is left open to the bound is stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedprune_cli.allocate.certificate import TOLERANCE
from fedprune_cli.allocate.deadline import least_feasible
from fedprune_cli.allocate.kkt import best_response, certify, curves_of, solve_p1
from fedprune_cli.allocate.limits import SMALLEST
from fedprune_cli.allocate.policy import Policy, build_allocation, nobody, proven, settle, with_deadline
from fedprune_cli.allocate.problem import Allocation, Problem, kept_on, most_kept, required_bandwidth
from fedprune_cli.allocate.stretches import Curves
from fedprune_cli.errors import InfeasibleError
from fedprune_cli.store.state import Array

CLOSE = 1e-10  # of ln price: where the search for the least bound ends
TRIES = 16  # of those that switch at the last price


@dataclass(frozen=True)
class Widths:
    """A problem whose devices may send values of several widths.

    share: of the problem's payload that each width makes of it [Q]; discount: what a kept share then counts, 1 / (1 + omega_q / K) [Q].
    """

    problem: Problem
    share: Array
    discount: Array

    def at(self, width: Array) -> Problem:
        """Returns the problem in which each device has the width `width` [K], by its place."""
        p = self.problem
        return replace(p, payload_bits=p.payload_bits * self.share[width], weight=p.weight * self.discount[width])

    def all_at(self, width: int) -> Problem:
        """Returns the problem in which all devices have one width."""
        return self.at(np.full(len(self.problem.weight), width))

    def fits(self, width: Array, room: float = TOLERANCE) -> bool:
        """Whether the band has room for what every device must keep, and the share `room` of it to spare."""
        at = self.at(width)
        return bool(required_bandwidth(at, at.min_kept).sum() <= at.bandwidth_hz * (1 - room))


@dataclass(frozen=True)
class Mixed:
    """The widths chosen [K], by their places, the bandwidth [K] and the price of P1 with them; its value, and what no choice exceeds."""

    width: Array
    bandwidth_hz: Array
    price_per_hz: float
    value: float
    bound: float

    def gap(self, weight: Array) -> float:
        """Returns how far it may be from the best choice, relative to the sum of weights."""
        return (self.bound - self.value) / max(float(weight.sum()), SMALLEST)


def solve_widths(widths: Widths) -> Mixed:
    """Returns the widths and bandwidths of the largest discounted sum w x, to a gap that is stated.

    Raises InfeasibleError where not even the smallest payloads leave room for what the devices must keep.
    """
    fewest = np.full(len(widths.problem.weight), int(widths.share.argmin()))
    if not widths.fits(fewest, -TOLERANCE):
        raise InfeasibleError(
            "bits per device: even the fewest bits leave no room for what the devices must keep; raise the deadline"
        )
    each = [(at, curves_of(at)) for at in map(widths.all_at, range(len(widths.share)))]
    ends = np.concatenate([np.append(curves.log_bottom, curves.log_top) for _, curves in each])
    ends = ends[np.isfinite(ends)]
    low, high = (float(end) for end in (ends.min(initial=0.0) - 1, ends.max(initial=0.0) + 1))
    (few, _, bound), (many, used_hz, least) = (_at_price(widths, each, end) for end in (high, low))
    wanted = float(np.max([at.weight * most_kept(at) for at, _ in each], 0).sum())  # where no hertz costs anything
    bound = min(bound, least, wanted)
    if used_hz <= widths.problem.bandwidth_hz:  # there is room for all that anybody wants
        few, high = many, low
    while high - low > CLOSE:
        log_price = 0.5 * (low + high)
        width, used_hz, value = _at_price(widths, each, log_price)
        bound = min(bound, value)
        if used_hz > widths.problem.bandwidth_hz:
            low, many = log_price, width
        else:
            high, few = log_price, width
    uniform = [np.full(len(few), q) for q in range(len(widths.share))]
    fitting = [width for width in (*_between(few, many), *uniform) if widths.fits(width)] or [fewest]
    best = max((_answer(widths, width) for width in fitting), key=lambda one: one.value)
    return replace(best, bound=max(bound, best.value))


def _at_price(widths: Widths, each: Sequence[tuple[Problem, Curves]], log_price: float) -> tuple[Array, float, float]:
    """Returns the best width of each device by itself [K], the bandwidth that they take together, and the dual function."""
    price, profit, taken_hz = float(np.exp(log_price)), list[Array](), list[Array]()
    for at, curves in each:
        kept, b = best_response(at, curves, price)
        possible = np.isfinite(required_bandwidth(at, at.min_kept))
        profit.append(np.where(possible, at.weight * kept - price * b, -np.inf))
        taken_hz.append(b)
    width = np.argmax(profit, 0)
    total = price * widths.problem.bandwidth_hz + float(np.max(profit, 0).sum())
    return width, float(np.array(taken_hz)[width, np.arange(len(width))].sum()), total


def _between(few: Array, many: Array) -> list[Array]:
    """Returns widths from `few` to `many`, the devices that differ switching one after the other, at most TRIES of these choices."""
    switching = np.flatnonzero(few != many)
    counts = np.unique(np.linspace(0, len(switching), TRIES).round().astype(int))
    place = np.full(len(few), len(few))
    place[switching] = np.arange(len(switching))
    return [np.where(place < count, many, few) for count in counts]


def _answer(widths: Widths, width: Array) -> Mixed:
    at = widths.at(width)
    bandwidth_hz, price = solve_p1(at)
    return Mixed(width, bandwidth_hz, price, float(at.weight @ kept_on(at, bandwidth_hz)), np.inf)


@dataclass(frozen=True)
class Menu:
    """What a value may take on the uplink: bits [Q]; share: of the problem's payload that they make of it [Q];

    omega: the relative square of what rounding to them changes [Q], which K devices' mean has 1 / K of.
    """

    bits: Array
    share: Array
    omega: Array


def allocate_bits(problem: Problem, policy: Policy, menu: Menu) -> tuple[Problem, Allocation]:
    """Returns the problem with the bits that were chosen for each device, and its allocation.

    A round is infeasible where the fewest bits are too many: with them the policy says who is admitted and by when. The certificate is
    that of P1 with the bits chosen; how far other bits might be better is the allocation's gap.
    """
    least = int(menu.share.argmin())
    few = replace(problem, payload_bits=problem.payload_bits * menu.share[least])
    settled = settle(with_deadline(few), policy, least_feasible)
    chosen = np.full(len(problem.weight), least)
    if not settled.admitted.any():
        return few, replace(nobody(few, settled), bits=menu.bits[chosen])
    places = np.flatnonzero(settled.admitted)
    discount = 1 / (1 + menu.omega / len(places))
    widths = Widths(replace(problem.take(places), deadline_s=settled.feasible.deadline_s), menu.share, discount)
    mixed = solve_widths(widths)
    at = widths.at(mixed.width)
    kept, gap = kept_on(at, mixed.bandwidth_hz), mixed.gap(widths.problem.weight)
    certificate = proven(certify(at, kept, mixed.bandwidth_hz, mixed.price_per_hz))
    if settled.status == "feasible" and gap <= TOLERANCE:
        settled = replace(settled, status="optimal")
    chosen[places] = mixed.width
    whole = Widths(problem, menu.share, discount).at(chosen)
    answer = build_allocation(
        whole, replace(settled, feasible=at), kept, mixed.bandwidth_hz, mixed.price_per_hz, certificate
    )
    objective = float(widths.problem.weight @ kept)
    return whole, replace(answer, bits=menu.bits[chosen], objective=objective, gap=gap)
