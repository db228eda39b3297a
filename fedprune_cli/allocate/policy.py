"""What happens to a round that cannot meet its deadline, and the allocation of one that can (model.md, section 4, "Infeasible")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedprune_cli.allocate.certificate import TOLERANCE, Certificate
from fedprune_cli.allocate.deadline import Least
from fedprune_cli.allocate.freedom import Freedom
from fedprune_cli.allocate.inverse import rate
from fedprune_cli.allocate.problem import (
    TIGHT,
    Allocation,
    Problem,
    Status,
    kept_on,
    latency,
    pace,
    required_bandwidth,
    resources,
    short_of,
)
from fedprune_cli.errors import CertificateError, ConfigError, InfeasibleError, require
from fedprune_cli.store.state import Array

Policy = Literal["stretch", "drop", "fail"]
POLICIES: tuple[Policy, ...] = ("stretch", "drop", "fail")
Solve = Callable[[Problem], tuple[Array, float]]  # bandwidth [K] and price of a feasible problem
Certify = Callable[[Problem, Array, Array, float], Certificate]  # of x [K], b [K] and a price


@dataclass(frozen=True)
class Settled:
    """What the policy makes of a round: a problem of the admitted devices that can be solved, who they are (bool [K]), and why.

    Where nobody is admitted `feasible` is the whole problem, and nothing is to be solved.
    """

    feasible: Problem
    admitted: Array
    status: Status
    message: str


def as_policy(name: str) -> Policy:
    """Returns the policy of that name; raises ConfigError."""
    require(name in POLICIES, "on_infeasible", name, "'stretch', 'drop' or 'fail'")
    return next(policy for policy in POLICIES if policy == name)


def as_freedom(clock: str, power: str) -> Freedom:
    """Returns what devices choose, of two words that are each `fixed` or `chosen`; raises ConfigError."""
    for name, word in (("clock", clock), ("power", power)):
        require(word in ("fixed", "chosen"), name, word, "'fixed' or 'chosen'")
    return Freedom(clock == "chosen", power == "chosen")


def can_meet(problem: Problem, least_s: float, least: Least) -> bool:
    """Whether the problem's deadline is at least `least_s`, and that in digits and not only in theory."""
    return least_s < np.inf and least_s <= problem.deadline_s * (1 + TIGHT) and least.holds(problem)


def _stretched(problem: Problem, least_s: float, least: Least) -> Problem:
    """Returns the problem with the deadline `least_s`, or as many last digits later as it takes to meet it."""
    later, step_s = replace(problem, deadline_s=least_s), float(np.spacing(least_s))
    while not can_meet(later, least_s, least):
        if step_s > least_s:
            raise InfeasibleError(
                f"no deadline can be computed for devices {listed(problem.called)}: their figures are too far apart"
            )
        later, step_s = replace(problem, deadline_s=least_s + step_s), 2 * step_s
    return later


def settle(problem: Problem, policy: Policy, least: Least) -> Settled:
    """Returns what the policy for infeasible rounds makes of a problem.

    `drop` admits devices in the order of least bandwidth per weight as long as they fit; the message bounds what a better set could
    add (the fractional knapsack's bound). Where the problem says for how long each has waited, those who waited longest come first, and
    what room they leave goes to the others in that order: whoever fits alone has its turn. `stretch` moves the deadline to the smallest
    feasible one, and drops only those whom no deadline helps. `fail` raises InfeasibleError.
    """
    everyone = np.ones(len(problem.weight), dtype=bool)
    if least.has_room(problem):
        return Settled(problem, everyone, "feasible", "")
    feasible_s = least(problem)
    if can_meet(problem, feasible_s, least):
        return Settled(problem, everyone, "feasible", "")
    missing = _missing(problem, feasible_s, least)
    if policy == "fail":
        knobs = "the deadline, pruner.max_ratio or channel.bandwidth_mhz"
        if problem.limits is not None:
            knobs += ", devices.max_bandwidth_mhz or devices.energy_budget_j"
        raise InfeasibleError(f"{missing}: raise {knobs}, or choose allocator.on_infeasible=stretch or drop")
    if policy == "stretch" and feasible_s < np.inf:
        stretched = _stretched(problem, feasible_s, least)
        return Settled(stretched, everyone, "stretched", f"{missing}: stretched to {stretched.deadline_s:.6g} s")
    if policy == "stretch":
        admitted, bound = _largest_set(replace(problem, deadline_s=np.inf), least)
    else:
        admitted, bound = _largest_set(problem, least)
    message = f"{missing}: {_dropped(problem, admitted, bound)}"
    rest = problem.take(np.flatnonzero(admitted)) if admitted.any() else problem
    if policy == "stretch" and admitted.any() and not can_meet(rest, rest_s := least(rest), least):
        later = _stretched(rest, rest_s, least)
        return Settled(later, admitted, "stretched", f"{message}; stretched to {later.deadline_s:.6g} s")
    return Settled(rest, admitted, "dropped", message)


def leave_out(problem: Problem, gone: Array) -> Settled:
    """Returns a round without the devices `gone` (bool [K]), whom nothing helps: what an allocator without a policy makes of them."""
    if not gone.any():
        return Settled(problem, ~gone, "feasible", "")
    message = f"no bandwidth helps devices {listed(problem.called[gone])}: {_dropped(problem, ~gone, 0.0)}"
    return Settled(problem if gone.all() else problem.take(np.flatnonzero(~gone)), ~gone, "dropped", message)


def _missing(problem: Problem, feasible_s: float, least: Least) -> str:
    """Says what an infeasible round lacks."""
    floor_hz = required_bandwidth(problem, problem.min_kept)
    hopeless = np.flatnonzero(np.isinf(floor_hz))
    if feasible_s == np.inf:
        always = replace(problem, deadline_s=np.inf)
        never = ~least.alone(always, required_bandwidth(always, problem.min_kept))
        if never.any():  # not those whom a later deadline would help
            hopeless = np.flatnonzero(never)
    missing_hz = floor_hz.sum() - problem.bandwidth_hz
    text = f"for devices that may drop {problem.max_ratio.max():.3g} of the shared part "
    if feasible_s < np.inf:
        text += f"the deadline of {problem.deadline_s:.6g} s is {feasible_s - problem.deadline_s:.6g} s too early"
    else:
        text += "no deadline is late enough"
    if not hopeless.size and (not least.counts_hz or missing_hz <= 0):
        return text
    if not hopeless.size:
        return text + f" (or {missing_hz / 1e6:.6g} MHz are missing)"
    return text if feasible_s < np.inf else text + f": no bandwidth helps devices {listed(problem.called[hopeless])}"


def _largest_set(problem: Problem, least: Least) -> tuple[Array, float | None]:
    """Returns who is admitted (bool [K]), and the weight that no other set can add, None where that is not what is looked at.

    It is the longest prefix that fits, cheapest least bandwidth per weight first; where devices have waited, the longest prefix of those
    that could take part at all, by rounds waited and then by that cost, and of the others as many as still fit.
    """
    floor_hz = required_bandwidth(problem, problem.min_kept)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = floor_hz / problem.weight
    alone = least.alone(problem, floor_hz)
    # those whom nothing helps stand behind those without a weight: with one of them among the first nobody would fit
    order = np.lexsort((np.where(np.isnan(cost), 0.0, cost), ~alone))
    if problem.waited is not None:
        turn = order[np.argsort(-problem.waited[order], kind="stable")]
        turn = turn[alone[turn]]
        first = turn[: _longest_prefix(problem, turn, 0, least)]
        order = np.concatenate([first, order[~np.isin(order, first)]])
        fits = _longest_prefix(problem, order, len(first), least)
        return np.isin(np.arange(len(order)), order[:fits]), None
    fits = _longest_prefix(problem, order[:-1], 0, least)  # all together do not fit
    admitted = np.zeros(len(order), dtype=bool)
    admitted[order[:fits]] = True
    next_one = order[fits]
    if not least.counts_hz:
        return admitted, None
    if not alone[next_one] or not 0 < floor_hz[next_one] < np.inf:
        return admitted, 0.0
    room_hz = max(problem.bandwidth_hz - floor_hz[admitted].sum(), 0.0)
    share = room_hz / floor_hz[next_one]
    return admitted, float(problem.weight[next_one] * least.most(share))


def _longest_prefix(problem: Problem, order: Array, fits: int, least: Least) -> int:
    """Returns how many devices of an order fit together, of which the first `fits` do: by bisection, for one more never makes room."""
    too_many = len(order) + 1
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        some = problem.take(order[:count])
        if can_meet(some, least(some), least):
            fits = count
        else:
            too_many = count
    return fits


def _dropped(problem: Problem, admitted: Array, bound: float | None) -> str:
    others = "those who waited longest came first" if problem.waited is not None else "another choice may admit more"
    rule = others if bound is None else f"no other choice admits more than {bound:.3g} more"
    return f"dropped devices {listed(problem.called[~admitted])} with {problem.weight[~admitted].sum():.3g} of the weight; {rule}"


def listed(devices: Array | Sequence[str]) -> str:
    """Returns the first ten devices, and how many more there are, for a message."""
    return ", ".join(map(str, devices[:10])) + (f" and {len(devices) - 10} more" if len(devices) > 10 else "")


def solve_under_policy(
    problem: Problem, policy: Policy, solve: Solve, least: Least, certify: Certify | None = None
) -> Allocation:
    """Returns the allocation that `solve` finds, under the policy; one that claims to be optimal gives what certifies it.

    Every device keeps all that its bandwidth allows. Raises CertificateError when an optimal solution is not what it claims.
    """
    settled = settle(with_deadline(problem), policy, least)
    if not settled.admitted.any():
        return nobody(problem, settled)
    feasible = settled.feasible
    bandwidth_hz, price = solve(feasible)
    kept = kept_on(feasible, bandwidth_hz)
    certificate = proven(certify(feasible, kept, bandwidth_hz, price)) if certify else None
    if certify and settled.status == "feasible":
        settled = replace(settled, status="optimal")
    return build_allocation(problem, settled, kept, bandwidth_hz, price, certificate)


def proven(certificate: Certificate) -> Certificate:
    """Returns the certificate; raises CertificateError when the solution is not what it claims to be."""
    if not certificate.holds:
        raise CertificateError(
            f"the allocation's KKT residual is {certificate.residual:.3g} and its gap {certificate.gap:.3g}, above {TOLERANCE:g}"
        )
    return certificate


def with_deadline(problem: Problem) -> Problem:
    """Returns the problem; raises ConfigError when its deadline is open."""
    if problem.deadline_s == np.inf:
        raise ConfigError("deadline_s=inf: must be finite for an allocator that aims at it")
    return problem


def nobody(problem: Problem, settled: Settled) -> Allocation:
    """Returns the allocation of a round that admits no device."""
    return build_allocation(problem, settled, np.zeros(0), np.zeros(0), 0.0, None)


def build_allocation(
    problem: Problem, settled: Settled, kept: Array, bandwidth_hz: Array, price: float, certificate: Certificate | None
) -> Allocation:
    """Returns the allocation of all K devices from the figures of the admitted ones."""
    admitted, deadline_s = settled.admitted, settled.feasible.deadline_s
    x, b = np.zeros(len(admitted)), np.zeros(len(admitted))
    x[admitted], b[admitted] = kept, bandwidth_hz
    at = replace(problem, deadline_s=deadline_s)
    clock, power = pace(at, x)
    rate_bps = rate(b, problem.snr_hz * power, problem.log_cap)
    binds = np.full(len(admitted), "deadline", dtype=object)
    binds[problem.payload_bits == 0] = "compute"
    if problem.chooses:
        late, spent = short_of(at, x)
        binds[spent] = np.where(late, "deadline, energy", "energy")[spent]
    elif len(of := resources(at)) > 1:
        binds[of[1].kept(rate_bps) < of[0].kept(rate_bps)] = "energy"
    binds[x <= problem.min_kept + TIGHT] = "max_ratio"
    binds[x >= 1 - TIGHT] = "dense"
    binds[~admitted] = "dropped"
    return Allocation(
        prune_ratio=np.where(admitted, 1.0 - x, 1.0),
        bandwidth_hz=b,
        rate_bps=rate_bps,
        latency_s=np.where(admitted, latency(at, x, b), 0.0),
        deadline_s=float(deadline_s),
        admitted=admitted,
        binds=tuple(binds),
        price_per_hz=price,
        objective=float(problem.weight @ x),
        certificate=certificate,
        status=settled.status,
        message=settled.message,
        clock=np.where(admitted, clock, 0.0) if problem.freedom.clock else None,
        power=np.where(admitted, power, 0.0) if problem.freedom.power else None,
    )
