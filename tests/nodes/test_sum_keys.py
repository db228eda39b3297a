"""Keys of a secure sum on real nodes: what a device accepts as another's, and what a server that makes some up is refused for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("grpc")

from fedprune_cli.nodes import certificates, sum_keys
from fedprune_cli.nodes.certificates import Identity, in_der, peer_of, read_identity
from fedprune_cli.nodes.sum_keys import FalseKeysError, checked_keys, sign_keys
from fedprune_cli.nodes.sum_messages import KEYS, STEPS, SignedKeys, SumAnswer
from fedprune_cli.privacy.ciphers import TAG
from fedprune_cli.privacy.field import ELEMENT
from fedprune_cli.privacy.secure import RefusedSumError, Secrets, Terms, draw_secrets, exchanged_bytes, meet
from fedprune_cli.rng import stream

TERMS = Terms((0, 1, 2), (7, 7, 7), 2, 3, b"run, round 1")


@pytest.fixture(scope="module")
def pilots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Identity]]:
    """Returns the identities of two pilots, with the server's as device -1."""
    found = {}
    for name in ("own", "other"):
        folder: Path = tmp_path_factory.mktemp(name)
        certificates.begin(folder, ["localhost"], 30)
        found[name] = {device: read_identity(certificates.enroll(folder, device, 30)) for device in range(4)}
        found[name][-1] = read_identity(folder / certificates.SERVER)
    return found


def secrets_of(device: int) -> Secrets:
    return draw_secrets(TERMS.threshold, stream(0, "secure_sum", device).bytes)


def announced(of: dict[int, Identity], terms: Terms = TERMS) -> dict[int, SignedKeys]:
    return {
        device: sign_keys(of[device], terms, secrets_of(device).public_keys(terms.context)) for device in terms.devices
    }


def test_keys_that_everybody_signed_are_taken_and_a_sum_begins(pilots: dict[str, dict[int, Identity]]) -> None:
    keys = checked_keys(pilots["own"][1].ca, TERMS, announced(pilots["own"]), frozenset())
    assert keys == {device: secrets_of(device).public_keys(TERMS.context) for device in TERMS.devices}
    assert meet(1, TERMS, secrets_of(1), keys).device == 1


def test_what_a_device_of_twenty_sends_beside_its_change_takes_less_than_three_kilobytes(
    pilots: dict[str, dict[int, Identity]],
) -> None:
    """1,300 bytes are metered; what signs them, and three messages' headers, are the rest, and the guide says how much that is."""
    signed = announced(pilots["own"])[0]
    parcels: list[dict[str, bytes]] = [
        {name: getattr(signed, name) for name in KEYS},
        {str(device): bytes(2 * ELEMENT + TAG) for device in range(1, 20)},
        {"answer": bytes(20 * ELEMENT)},
    ]
    sizes = [
        len(SumAnswer("0" * 64, step, parcel, 0.123456).encode()) for step, parcel in zip(STEPS, parcels, strict=True)
    ]
    assert exchanged_bytes(20)[0] == 1300 < sum(sizes) < 2800


def test_a_server_that_stands_between_the_devices_is_found_out(pilots: dict[str, dict[int, Identity]]) -> None:
    """It can sign by its own certificate, take another device's, make one up, or show what was signed for something else."""
    own, other = pilots["own"], pilots["other"]
    right = announced(own)
    forged = secrets_of(9).public_keys(TERMS.context)
    by_server = certificates.signed(own[-1], b"")
    cases = {
        "no certificate of this pilot signed them": [
            replace(right[0], keys=forged),
            replace(right[0], keys=right[1].keys),
            replace(right[0], signature=by_server),
            replace(right[0], signature=b""),
            replace(right[0], certificate=in_der(own[-1].own)),
            replace(right[0], certificate=in_der(other[0].own)),
            sign_keys(other[0], TERMS, forged),  # an authority of the server's own
            sign_keys(own[0], replace(TERMS, context=b"run, round 2"), right[0].keys),
            sign_keys(own[0], replace(TERMS, counts=(6, 7, 7)), right[0].keys),
            sign_keys(own[0], replace(TERMS, threshold=3), right[0].keys),
            sign_keys(own[0], replace(TERMS, curious=1), right[0].keys),
            sign_keys(own[0], replace(TERMS, devices=(0, 1, 3)), right[0].keys),  # was told of others
            sign_keys(own[0], replace(TERMS, devices=(0, 1, 2, 3), counts=(7, 7, 7, 7)), right[0].keys),
            sign_keys(own[0], replace(TERMS, counts=(7, 7, 6)), right[0].keys),
            right[1],
        ],
        "without a certificate": [replace(right[0], certificate=b"")],
    }
    for who in (-1, 2):  # whose certificate is in order, but another's
        by = certificates.signed(own[who], sum_keys._message(TERMS, 0, forged))
        cases[f"they are signed by {peer_of(own[who].own).name}"] = [SignedKeys(forged, in_der(own[who].own), by)]
    for why, wrong in cases.items():
        for one in wrong:
            with pytest.raises(FalseKeysError, match=f"the keys of device-0 are not its own: .*{why}"):
                checked_keys(own[1].ca, TERMS, right | {0: one}, frozenset())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("2a8648ce3d0201", "2a8648ce3d0209"),  # a key of an unknown kind
        ("2a8648ce3d030107", "2a8648ce3d030177"),  # an unknown curve
        ("a003020102", "a003020107"),  # version 8
        ("2a8648ce3d040302", "2a8648ce3d040399"),  # signed by an unknown algorithm
        ("3082", "3002"),
    ],
)
def test_a_made_up_certificate_is_one_line(pilots: dict[str, dict[int, Identity]], right: str, wrong: str) -> None:
    announced_ = announced(pilots["own"])
    own = announced_[0].certificate
    false = replace(announced_[0], certificate=own.replace(bytes.fromhex(right), bytes.fromhex(wrong)))
    assert false.certificate != own
    with pytest.raises(FalseKeysError, match="device-0 are not its own: they come without a certificate"):
        checked_keys(pilots["own"][1].ca, TERMS, announced_ | {0: false}, frozenset())


def test_a_device_cannot_sign_for_another(pilots: dict[str, dict[int, Identity]]) -> None:
    own = pilots["own"]
    right, terms = announced(own), TERMS
    posing = Identity(own[2].ca, own[2].own, own[2].key)
    message = replace(terms, devices=(2, 3, 4))  # in which the first place is its own
    with pytest.raises(RefusedSumError, match="device-3 is none of the devices"):
        sign_keys(own[3], terms, right[0].keys)
    with pytest.raises(FalseKeysError, match="device-0 are not its own"):
        checked_keys(own[1].ca, terms, right | {0: sign_keys(posing, message, right[0].keys)}, frozenset())


def test_revoked_and_missing_devices_are_refused(pilots: dict[str, dict[int, Identity]]) -> None:
    own = pilots["own"]
    right = announced(own)
    with pytest.raises(FalseKeysError, match="the certificate of device-2 is revoked"):
        checked_keys(own[1].ca, TERMS, right, frozenset({peer_of(own[2].own).serial}))
    with pytest.raises(FalseKeysError, match="not one pair for each device"):
        checked_keys(own[1].ca, TERMS, {0: right[0], 1: right[1]}, frozenset())
