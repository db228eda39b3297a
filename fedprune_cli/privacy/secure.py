"""Secure sums of nested masks: the server learns the sum of what devices send, and of no device what it sent.

The protocol is that of Bonawitz et al. (CCS 2017): every pair of devices agrees on a mask that one adds and the other subtracts, each
device adds a mask of its own, and all hold shares of each other's keys, so that a sum survives devices that drop out. Masks are nested:
in rank order a device keeps the first n_k entries, so that a pair masks the first min(n_k, n_l) of them and nothing expands.

A device is a value that goes through `meet`, `share_keys`, `mask_values`, `hold` and `unmask`; the server only calls `unmasked_sum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedprune_cli.errors import DeviceError
from fedprune_cli.privacy.ciphers import KEY, TAG, agreed, derived, mask_stream, opened, public_key, sealed
from fedprune_cli.privacy.field import ELEMENT, element, lagrange, recover, share
from fedprune_cli.privacy.keepers import fewest_keepers
from fedprune_cli.store.state import Array

COUNT = 4  # bytes in which a device announces how many entries it keeps
LEAST = 3  # keepers: of the sum of two, each knows the other's value
Draw = Callable[[int], bytes]  # as many random bytes


class RefusedSumError(DeviceError):
    """A device or the server goes no further with a sum: somebody's values could be told from it, or it cannot be unmasked."""


@dataclass(frozen=True)
class Terms:
    """What the devices of a sum are told before it.

    devices: their ids, ascending; counts: how many entries each keeps, in rank order the first ones; threshold: how many must answer
    in the end; least: the fewest devices of which an entry may be the sum; context: names the run and the round, as no other sum's;
    curious: how many may tell the server what they know, for whose noise the others make up.
    """

    devices: tuple[int, ...]
    counts: tuple[int, ...]
    threshold: int
    least: int
    context: bytes
    curious: int = 0

    def place(self, device: int) -> int:
        """Returns the place of a device's shares, from 1."""
        return 1 + self.devices.index(device)

    def count(self, device: int) -> int:
        """Returns how many entries a device keeps."""
        return self.counts[self.devices.index(device)]

    def check(self, survivors: Sequence[int], device: int | None = None) -> None:
        """Raises RefusedSumError unless these devices may be summed, and `device` is one of them; None: the server asks."""
        ids, known = [*self.devices], {*self.devices}
        if len(ids) != len(self.counts) or ids != sorted(known):
            raise RefusedSumError("the announced devices and counts do not fit")
        named = {*survivors}
        if not named <= known or len(named) != len(survivors) or device not in {None, *named}:
            raise RefusedSumError("the announced devices are not those of this sum")
        if self.least < LEAST or 2 * self.threshold <= len(ids) + self.curious:
            known_to = f", of whom {self.curious} are curious," if self.curious else ""
            raise RefusedSumError(
                f"a sum of at least {self.least} by {self.threshold} of {len(ids)} devices{known_to} hides nobody"
            )
        if len(survivors) < self.threshold:
            raise RefusedSumError(f"{len(survivors)} of {len(ids)} devices are left, the threshold is {self.threshold}")
        if (fewest := fewest_keepers([self.count(one) for one in survivors])) < self.least:
            raise RefusedSumError(f"an entry would be the sum of {fewest} devices, the fewest allowed are {self.least}")


@dataclass(frozen=True)
class Secrets:
    """What a device draws for one sum and tells nobody.

    sealing: its private key for messages to the others; masking, own: the polynomials whose constants are the seeds of its pairwise
    masks and of its own mask.
    """

    sealing: bytes
    masking: tuple[int, ...]
    own: tuple[int, ...]

    def masking_key(self, context: bytes) -> bytes:
        """Returns the private key of the pairwise masks."""
        return masking_key(self.masking[0], context + public_key(self.sealing))

    def public_keys(self, context: bytes) -> bytes:
        """Returns the public keys, of messages and of masks, one after the other."""
        return public_key(self.sealing) + public_key(self.masking_key(context))


@dataclass(frozen=True)
class Member:
    """A device of a sum that has everybody's public keys, and so shares a secret for messages and one for masks with each of them."""

    device: int
    terms: Terms
    secrets: Secrets
    sealing: Mapping[int, bytes]
    masking: Mapping[int, bytes]


@dataclass(frozen=True)
class Holder:
    """A device that holds everybody's shares, of the masking and of the own seed; answered: the survivors that it gave some for."""

    device: int
    terms: Terms
    shares: Mapping[int, tuple[int, int]]
    answered: frozenset[int] | None = None


def exchanged_bytes(num_devices: int) -> tuple[int, int]:
    """Returns what a sum of so many devices costs beside the values: bytes that each device sends, and bytes that all receive.

    Up: a count, two public keys, sealed shares for the others, and a share of every device's in the end. Down: counts, keys and who
    survived, broadcast, and the shares, each to its holder.

    >>> exchanged_bytes(20)
    (1300, 19603)
    """
    one = 2 * ELEMENT + TAG
    up = COUNT + 2 * KEY + one * (num_devices - 1) + ELEMENT * num_devices
    down = (COUNT + 2 * KEY) * num_devices + one * (num_devices - 1) * num_devices + math.ceil(num_devices / 8)
    return up, down


def draw_secrets(threshold: int, draw: Draw) -> Secrets:
    """Returns a device's secrets; draw: the system's random bytes on a real node, a named stream in a simulation."""
    sealing = draw(KEY)
    masking, own = (tuple(element(draw(2 * ELEMENT)) for _ in range(threshold)) for _ in range(2))
    return Secrets(sealing, masking, own)


def masking_key(seed: int, use: bytes) -> bytes:
    """Returns the private key of pairwise masks that a seed stands for; use: the sum's context and the device's public key of messages.

    With that key a guessed seed is a guess at one device's, and not at those of all.
    """
    return derived(_element_bytes(seed), b"masking key" + use)


def _pair(context: bytes, use: bytes, first: int, second: int) -> bytes:
    return use + first.to_bytes(8, "little") + second.to_bytes(8, "little") + context


def meet(device: int, terms: Terms, secrets: Secrets, keys: Mapping[int, bytes]) -> Member:
    """Returns the device with the keys of all others; raises RefusedSumError for terms that would give it away, and for false keys."""
    terms.check(terms.devices, device)
    if (
        {*keys} != {*terms.devices}
        or len({*keys.values()}) != len(keys)
        or any(len(key) != 2 * KEY for key in keys.values())
    ):
        raise RefusedSumError(f"device {device}: the public keys are not one pair for each device")
    if keys[device] != secrets.public_keys(terms.context) or len(secrets.own) != terms.threshold:
        raise RefusedSumError(f"device {device}: the announced keys or threshold are not its own")
    others = {other: key for other, key in keys.items() if other != device}
    try:
        sealing = agreed(secrets.sealing, {other: key[:KEY] for other, key in others.items()})
        masking = agreed(secrets.masking_key(terms.context), {other: key[KEY:] for other, key in others.items()})
    except ValueError:  # a point of small order
        raise RefusedSumError(f"device {device}: a public key is false") from None
    return Member(device, terms, secrets, sealing, masking)


def share_keys(member: Member) -> dict[int, bytes]:
    """Returns for every other device its shares of this one's two seeds, sealed for it."""
    messages = {}
    for other, secret in member.sealing.items():
        message = b"".join(_element_bytes(value) for value in _shares_for(member, other))
        use = _pair(member.terms.context, b"shares", member.device, other)
        messages[other] = sealed(derived(secret, use), message)
    return messages


def _shares_for(member: Member, other: int) -> tuple[int, int]:
    place = member.terms.place(other)
    return share(member.secrets.masking, place), share(member.secrets.own, place)


def _element_bytes(value: int) -> bytes:
    return value.to_bytes(ELEMENT, "little")


def hold(member: Member, messages: Mapping[int, bytes]) -> Holder:
    """Returns the device with the shares that the others sealed for it; raises RefusedSumError when one is missing or forged."""
    shares = {member.device: _shares_for(member, member.device)}
    for other, secret in member.sealing.items():
        use = _pair(member.terms.context, b"shares", other, member.device)
        message = opened(derived(secret, use), messages.get(other, b""))
        if message is None or len(message) != 2 * ELEMENT:
            raise RefusedSumError(f"device {member.device}: the shares of device {other} are missing or forged")
        shares[other] = int.from_bytes(message[:ELEMENT], "little"), int.from_bytes(message[ELEMENT:], "little")
    return Holder(member.device, member.terms, shares)


def mask_values(member: Member, values: Array) -> Array:
    """Returns what the device sends: its whole numbers [n_k] modulo 2^32 under all its masks, uint32 [n_k]."""
    device, terms = member.device, member.terms
    if values.shape != (terms.count(device),):  # of more than one row, all would be under the same masks
        raise RefusedSumError(f"device {device}: announced {terms.count(device)} entries and has {len(values)}")
    masked = values.astype(np.int64).astype(np.uint32)
    masked += _own_mask(member.secrets.own[0], terms, device)
    for other, secret in member.masking.items():
        _add_pair(masked, secret, terms, device, other)
    return masked


def _own_mask(seed: int, terms: Terms, device: int) -> Array:
    key = derived(_element_bytes(seed), _pair(terms.context, b"own mask", device, device))
    return mask_stream(key, terms.count(device))


def _add_pair(total: Array, secret: bytes, terms: Terms, device: int, other: int) -> None:
    """Adds in place the mask that `device` shares with `other`: the lower id adds it, the higher one subtracts it."""
    size = min(terms.count(device), terms.count(other))
    mask = mask_stream(derived(secret, _pair(terms.context, b"pair mask", *sorted((device, other)))), size)
    if device < other:
        total[:size] += mask
    else:
        total[:size] -= mask


def unmask(holder: Holder, survivors: Sequence[int]) -> tuple[Holder, bytes]:
    """Returns what the device tells the server in the end: its share of each survivor's own seed, and of each other's masking seed.

    Never both of one device, which would lay its values open: a second request with other survivors is refused, as is one that leaves
    too few devices, or an entry to too few.
    """
    terms, named = holder.terms, frozenset(survivors)
    terms.check(survivors, holder.device)
    if holder.answered not in (None, named):
        raise RefusedSumError(f"device {holder.device}: has answered for other survivors already")
    told = [holder.shares[device][device in named] for device in terms.devices]
    return replace(holder, answered=named), b"".join(map(_element_bytes, told))


def unmasked_sum(
    terms: Terms, keys: Mapping[int, bytes], masked: Mapping[int, Array], answers: Mapping[int, bytes]
) -> Array:
    """Returns the sum of the survivors' values, int64 [the most that any of them keeps]; exact where it is in [-2^31, 2^31).

    keys: of all devices; masked: what the survivors sent; answers: what the devices told, of which `threshold` are used. Raises
    RefusedSumError where there are fewer.
    """
    terms.check(sorted(masked))
    if len(answers) < terms.threshold:
        raise RefusedSumError(
            f"{len(answers)} of {len(terms.devices)} devices answered, the threshold is {terms.threshold}"
        )
    holders = sorted(answers)[: terms.threshold]
    coefficients = lagrange([terms.place(holder) for holder in holders])
    total = np.zeros(max((len(values) for values in masked.values()), default=0), dtype=np.uint32)
    for values in masked.values():
        total[: len(values)] += values
    for at, device in enumerate(terms.devices):
        told = [answers[holder][at * ELEMENT : (at + 1) * ELEMENT] for holder in holders]
        seed = recover(coefficients, [int.from_bytes(value, "little") for value in told])
        if device in masked:
            total[: terms.count(device)] -= _own_mask(seed, terms, device)
            continue
        gone = masking_key(seed, terms.context + keys[device][:KEY])
        for other, secret in agreed(gone, {other: keys[other][KEY:] for other in masked}).items():
            # what `other` added, the one that is gone would have taken away
            _add_pair(total, secret, terms, device, other)
    return total.astype(np.int32).astype(np.int64)


def secure_sum(terms: Terms, values: Mapping[int, Array], draw_of: Callable[[int], Draw]) -> Array:
    """Returns the sum of the whole numbers [n_k] of the devices in `values`; the others of `terms` drop out after they shared their keys.

    All devices and the server in one place, as a simulation has them; draw_of: where each device's randomness comes from.
    """
    secrets = {device: draw_secrets(terms.threshold, draw_of(device)) for device in terms.devices}
    keys = {device: secrets[device].public_keys(terms.context) for device in terms.devices}
    members = {device: meet(device, terms, secrets[device], keys) for device in terms.devices}
    messages = {device: share_keys(member) for device, member in members.items()}
    masked = {device: mask_values(members[device], mine) for device, mine in values.items()}
    survivors, answers = sorted(masked), {}
    for device in survivors:
        to_me = {sender: sent[device] for sender, sent in messages.items() if sender != device}
        answers[device] = unmask(hold(members[device], to_me), survivors)[1]
    return unmasked_sum(terms, keys, masked, answers)
