"""Public keys of a secure sum, signed by enrolled certificates: a server that makes up a device's keys is found out by the others."""

from __future__ import annotations

from collections.abc import Mapping

from fedprune_cli.errors import CheckpointError, DeviceError
from fedprune_cli.nodes.certificates import Identity, device_name, in_der, peer_of, signed, signer, unwanted
from fedprune_cli.nodes.sum_messages import SignedKeys
from fedprune_cli.privacy.secure import RefusedSumError, Terms

PURPOSE = b"fedprune: public keys of a secure sum\0"  # what is signed for one use is of no use for another


class FalseKeysError(DeviceError):
    """Somebody else's keys were announced as a device's, or those of a sum that others know nothing of."""


def sign_keys(identity: Identity, terms: Terms, keys: bytes) -> SignedKeys:
    """Returns the keys as the device announces them that an identity is of; raises RefusedSumError where the sum has no such device.

    Signed is what they are for: the run, the round and the fixed point, the device, all devices with how many entries each keeps, how
    many must answer, how many may be curious, and the keys.
    """
    peer = peer_of(identity.own)
    device = peer.device
    if device is None or device not in terms.devices:
        raise RefusedSumError(f"{peer.name} is none of the devices of this sum")
    return SignedKeys(keys, in_der(identity.own), signed(identity, _message(terms, device, keys)))


def checked_keys(
    ca: bytes, terms: Terms, announced: Mapping[int, SignedKeys], refused: frozenset[int]
) -> dict[int, bytes]:
    """Returns everybody's public keys, as a device may go on with them.

    ca: the authority's certificate (PEM), which the device has from its enrolment and not from the server; refused: the serial numbers
    that are revoked, as far as the device knows. Raises FalseKeysError for the first device whose keys are not its own.
    """
    if {*announced} != {*terms.devices}:
        raise FalseKeysError("the announced keys are not one pair for each device")
    keys = {}
    for device, one in sorted(announced.items()):
        if why := _wrong(ca, terms, device, one, refused):
            raise FalseKeysError(f"the keys of {device_name(device)} are not its own: {why}")
        keys[device] = one.keys
    return keys


def _wrong(ca: bytes, terms: Terms, device: int, one: SignedKeys, refused: frozenset[int]) -> str:
    try:
        peer = signer(ca, one.certificate, _message(terms, device, one.keys), one.signature)
    except CheckpointError:
        return "they come without a certificate"
    if peer is None:
        return "no certificate of this pilot signed them for this sum"
    if peer.device != device:
        return f"they are signed by {peer.name}"
    return unwanted(peer, refused)


def _message(terms: Terms, device: int, keys: bytes) -> bytes:
    """Returns what is signed: all that the device was told, for two that were told of different devices have no sum in common."""
    told = device, terms.threshold, terms.least, terms.curious, len(terms.devices), *terms.devices, *terms.counts
    numbers = b"".join(number.to_bytes(8, "little") for number in told)
    return PURPOSE + numbers + len(keys).to_bytes(8, "little") + keys + terms.context
