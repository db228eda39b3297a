"""The sum that a server has in the place of the devices' updates: clipped, noised, and secure where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedprune_cli.learn.prune import Masks, build_masks
from fedprune_cli.privacy.fixed import FixedPoint, point_of
from fedprune_cli.privacy.keepers import fewest_keepers, keepers_by_rank
from fedprune_cli.privacy.noised import clipped, noise_steps, with_share
from fedprune_cli.privacy.secure import Draw, RefusedSumError, Terms, secure_sum
from fedprune_cli.rng import stream
from fedprune_cli.round.plan import Plan
from fedprune_cli.round.setup import Setup
from fedprune_cli.round.summed import SumOrder
from fedprune_cli.serve.aggregate import Contribution
from fedprune_cli.serve.deliver import Arrival, Expected, Sent, sound
from fedprune_cli.store.record import PrivacyLog
from fedprune_cli.store.state import Array, State


def weight_of(setup: Setup, device: int) -> float:
    """Returns what a device's update counts: its training samples D_k, or 1 where these are to stay unknown."""
    return setup.experiment.privacy.weight(float(setup.scenario.partition.train.sizes[device]))


def step_size_of(setup: Setup, device: int) -> float:
    """Returns the sum of the sizes of a device's steps on u, over which its change is spread."""
    steps = sum(phase.steps for phase in setup.schedule(device) if phase.kind != "personal")
    return setup.experiment.training.lr * max(steps, 1)


@dataclass(frozen=True)
class Ranked:
    """The changes of a round's devices in rank order, in which each keeps the first entries.

    order: the entry of each rank, int64 [U]; counts: of the devices that were to send, in their order, n_k; changes: of those that did,
    float64 [n_k].
    """

    order: Array
    devices: Sequence[int]
    counts: Sequence[int]
    changes: Mapping[int, Array]


def sound_or_old(values: Array, old: Array) -> Array:
    """Returns a device's values [n_k], or what they were before, `old` [n_k], where one is not finite, or beyond what is taken.

    A device looks at its own values before it clips or masks them: of a sum the server cannot refuse a part, and that one is missing would
    tell what only its data decide.
    """
    return values if sound(values, len(old)) else old


def checked_by_themselves(old: Array, sent: Sent) -> Sent:
    """Returns what was sent of `old` u [U] where each device that has no sound update sends none of its change."""
    updates = [
        replace(update, shared=sound_or_old(update.shared, old[sent.masks[update.device]])) for update in sent.updates
    ]
    return replace(sent, updates=updates)


def rank_changes(old: Array, sent: Sent, arrivals: Sequence[Arrival]) -> Ranked:
    """Returns the changes that arrived, of `old` u [U]; ties of rank by index, as masks have them.

    Of nodes that handed in a change under masks it is that, and the order is the one that they were told.
    """
    devices = [update.device for update in sent.updates]
    order = sent.masks.order if sent.expected is None else sent.expected.order
    counts = [int(sent.masks[device].sum()) for device in devices]
    if sent.total_of is not None:
        levels = sent.masks.levels(np.array(devices))
        handed_in = {arrival.device: arrival.values for arrival in arrivals}
        return Ranked(np.argsort(levels, kind="stable"), devices, counts, handed_in)
    size_of, changes = dict(zip(devices, counts, strict=True)), {}
    for arrival in arrivals:
        dense = np.zeros(old.size)
        dense[arrival.mask] = arrival.values.astype(np.float64) - old[arrival.mask]
        changes[arrival.device] = dense[order[: size_of[arrival.device]]]
    return Ranked(order, devices, counts, changes)


def protected_sum(
    setup: Setup, state: State, sent: Sent, arrivals: Sequence[Arrival]
) -> tuple[list[Contribution], PrivacyLog]:
    """Returns the mean change as one contribution, none where no sum was made, and what protected it.

    Each entry is the weighted mean over the devices that kept it and arrived; the noise of the sum is divided by their number. Where who
    took part is a secret, both are divided by the number of devices that keep it on average, and a round without any is noise alone.
    """
    ranked = rank_changes(state.shared, sent, arrivals)
    settings = setup.experiment.privacy
    if settings.dp == "client" and sent.total_of is None:  # nodes have done so themselves
        shorter = {device: clipped(mine, settings.clip) for device, mine in ranked.changes.items()}
        ranked = replace(ranked, changes=shorter)
    if not state.shared.size or not (ranked.devices or sent.expected):
        return [], PrivacyLog(devices=0, keepers=0, refused="nobody sends anything")
    log = PrivacyLog(devices=len(ranked.changes), keepers=fewest_keepers(ranked.counts), refused="")
    if not settings.secure:
        if sent.expected is not None:
            total = _noised_total(setup, state.round, ranked, len(sent.expected.keepers))
            return _expected_mean(state.shared, sent.expected, total), log
        return _contributions(setup, state.shared, ranked, _noised_total(setup, state.round, ranked)), log
    log = replace(log, exchange_bytes=setup.blueprint.exchanged_bytes(len(ranked.devices))[0])
    point = fixed_point(setup, ranked.devices)
    try:
        if sent.total_of is not None:
            total = sent.total_of(ranked.changes)
        else:
            told = terms(setup, state.round, ranked.devices, ranked.counts)
            total = secure_sum(told, _whole(setup, state.round, ranked, point), _keys(setup, state.round))
    except RefusedSumError as error:
        return [], replace(log, devices=0, refused=str(error))
    return _contributions(setup, state.shared, ranked, total * point.step), replace(log, bits=point.bits)


def terms(setup: Setup, number: int, devices: Sequence[int], counts: Sequence[int]) -> Terms:
    """Returns what the devices of round `number` are told before they send, `counts` of entries each."""
    settings, experiment = setup.experiment.privacy, setup.experiment
    context = f"{experiment.config_hash}-s{experiment.seed}, round {number + 1}".encode()
    needed = settings.needed(len(devices))
    return Terms(tuple(devices), tuple(counts), needed, settings.least, context, settings.curious)


def sum_order(setup: Setup, number: int, masks: Masks, devices: Sequence[int]) -> SumOrder | None:
    """Returns the secure sum that nodes are to make of round `number`; None where none is, or a simulation makes it of what they sent."""
    experiment = setup.experiment
    if not (experiment.privacy.secure and experiment.execution.remote and devices and len(masks.rank)):
        return None
    counts = [int(masks[device].sum()) for device in devices]
    levels = masks.levels(np.array(devices))
    noise = setup.budget.one.noise if setup.budget and experiment.privacy.dp == "client" else None
    return SumOrder(number, terms(setup, number, devices, counts), fixed_point(setup, devices), levels, noise)


def fixed_point(setup: Setup, devices: Sequence[int]) -> FixedPoint:
    """Returns the fixed point in which these devices' changes are summed."""
    sizes = setup.scenario.partition.train.sizes[list(devices)].tolist()
    return point_of(setup.experiment.privacy, sizes, setup.budget.one.noise if setup.budget else None)


def _keys(setup: Setup, number: int) -> Callable[[int], Draw]:
    """Returns where each device's keys come from: as no other configuration's or round's, and the same when a run is resumed."""
    experiment, configuration = setup.experiment, int(setup.experiment.config_hash, 16)
    return lambda device: stream(experiment.seed, "secure_sum", configuration, number, device).bytes


def _whole(setup: Setup, number: int, ranked: Ranked, point: FixedPoint) -> dict[int, Array]:
    """Returns what each device puts under its masks: its change as whole numbers, times what it counts, or with its share of the noise.

    Clipped changes are rounded towards zero, which leaves none longer than it was. Of the noise each device adds as much that those
    who are left in the end have enough: its variance is divided by the fewest that may be left of those that keep the entry and tell the
    server nothing.
    """
    settings, budget = setup.experiment.privacy, setup.budget
    if settings.dp != "client" or budget is None:
        return {device: point.whole(mine) * int(weight_of(setup, device)) for device, mine in ranked.changes.items()}
    told = terms(setup, number, ranked.devices, ranked.counts)
    steps = noise_steps(told, point, budget.one.noise)
    return {
        device: with_share(point, mine, steps, stream(setup.experiment.seed, "privacy_noise", number, device))
        for device, mine in ranked.changes.items()
    }


def _noised_total(setup: Setup, number: int, ranked: Ranked, least: int = 0) -> Array:
    """Returns the sum of clipped changes with the server's noise, float64 [the most that any of them keeps, and at least `least`]."""
    sizes = [len(mine) for mine in ranked.changes.values()]
    total = np.zeros(max([least, *sizes]))
    for mine in ranked.changes.values():
        total[: len(mine)] += mine
    noise = (setup.experiment.privacy.clip or 0.0) * (setup.budget.one.noise if setup.budget else 0.0)
    return total + noise * stream(setup.experiment.seed, "privacy_noise", number).standard_normal(len(total))


def _contributions(setup: Setup, old: Array, ranked: Ranked, total: Array) -> list[Contribution]:
    """Returns the mean of the changes whose sum is `total`, in rank order, as what one device would send; nothing where nobody did."""
    if not ranked.changes:
        return []
    weights = np.array([weight_of(setup, device) for device in ranked.changes])
    counted = np.zeros(len(total))
    for mine, weight in zip(ranked.changes.values(), weights.tolist(), strict=True):
        counted[: len(mine)] += weight
    places = ranked.order[: len(total)]
    new, mask = old.astype(np.float64), np.zeros(old.size, dtype=bool)
    new[places] += total / counted
    mask[places] = True
    steps = np.array([step_size_of(setup, device) for device in ranked.changes])
    return [
        Contribution(mask, new[mask].astype(old.dtype), float(weights.sum()), float(steps @ weights / weights.sum()))
    ]


def expected_of(setup: Setup, state: State, plan: Plan) -> Expected:
    """Returns what the sum of a round is made with, whoever of the devices that are asked the draw took.

    An entry that n of them keep is divided by rate n, the number that keep it on average over the draws: the number that came would tell
    whether one more was there, and its own change could not be told from another divisor.
    """
    experiment, eligible = setup.experiment, plan.eligible
    ratios = state.slots["prune_ratio"].copy()
    ratios[eligible] = plan.allocation.prune_ratio[plan.allocation.admitted]
    masks = build_masks(experiment.pruner, state, ratios, experiment.seed, setup.blueprint.layout)
    keepers = keepers_by_rank([int(masks[device].sum()) for device in eligible.tolist()])
    steps = [step_size_of(setup, device) for device in eligible.tolist()]
    rate = experiment.participation.rate or 1.0
    return Expected(masks.order, rate * keepers, float(np.mean(steps)) if steps else experiment.training.lr)


def _expected_mean(old: Array, expected: Expected, total: Array) -> list[Contribution]:
    """Returns the mean change whose noised sum is `total`, in rank order, as what one device would send."""
    places = expected.order[: len(total)]
    new, mask = old.astype(np.float64), np.zeros(old.size, dtype=bool)
    new[places] += total / expected.keepers
    mask[places] = True
    return [
        Contribution(mask, new[mask].astype(old.dtype), float(expected.keepers.max(initial=1.0)), expected.step_size)
    ]
