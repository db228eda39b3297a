"""A secure sum over nodes, the server's side: it passes on keys and shares, and has of the devices' changes nothing but their sum."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedprune_cli.nodes.sum_messages import KEYS, Parcels, Question, SignedKeys, context_of, keys_as_parcels
from fedprune_cli.privacy.secure import Terms, unmasked_sum
from fedprune_cli.round.summed import SumOrder
from fedprune_cli.store.state import Array

Ask = Callable[
    [Mapping[int, Question]], Mapping[int, Parcels]
]  # from each device's question to the answers of those that gave one


@dataclass(frozen=True)
class Agreed:
    """A sum whose devices have each other's keys and shares. sealed: of each sender for each other, which the server cannot read."""

    order: SumOrder
    attempt: str
    terms: Terms
    keys: Mapping[int, bytes]
    sealed: Mapping[int, Parcels]


def agree(ask: Ask, order: SumOrder) -> Agreed:
    """Returns the sum that the devices agreed on; raises RefusedSumError where too few are left for one.

    A device that is lost before all have shared is out of it: the others begin again, with new keys and without it.
    """
    devices = order.terms.devices
    while True:
        order.terms.check(devices)
        attempt, counts = secrets.token_hex(8), tuple(map(order.terms.count, devices))
        context = context_of(order.terms.context, attempt, order.point, order.noise)
        terms = replace(order.terms, devices=devices, counts=counts, context=context)
        asked = Question("keys", 0, order.number, attempt, terms, order.point, noise=order.noise)
        announced = {
            device: SignedKeys(*(parcels[name] for name in KEYS))
            for device, parcels in _ask_all(ask, asked, {device: {} for device in devices}).items()
        }
        left = {*announced}
        if len(announced) == len(devices):
            sealed = _ask_all(ask, replace(asked, step="shares"), dict.fromkeys(devices, keys_as_parcels(announced)))
            if len(sealed) == len(devices):
                keys = {device: one.keys for device, one in announced.items()}
                return Agreed(order, attempt, terms, keys, sealed)
            left = {*sealed}
        devices = tuple(sorted(left))


def total(ask: Ask, agreed: Agreed, masked: Mapping[int, Array]) -> Array:
    """Returns the sum of what the survivors handed in, int64, with their help; raises RefusedSumError where too few are left, or help."""
    survivors, order = tuple(sorted(masked)), agreed.order
    order.terms.check(survivors)  # before they are asked: nodes would refuse it too
    question = Question(
        "unmask", 0, order.number, agreed.attempt, agreed.terms, order.point, survivors, noise=order.noise
    )
    for_each = {
        device: {str(sender): of[str(device)] for sender, of in agreed.sealed.items() if sender != device}
        for device in survivors
    }
    answers = _ask_all(ask, question, for_each)
    told = {device: parcels["answer"] for device, parcels in answers.items()}
    return unmasked_sum(agreed.terms, agreed.keys, masked, told)


def _ask_all(ask: Ask, question: Question, parcels: Mapping[int, Parcels]) -> Mapping[int, Parcels]:
    """Returns what those devices answered to whom something is sent with the question, if only nothing."""
    return ask({device: replace(question, device=device, parcels=mine) for device, mine in parcels.items()})
