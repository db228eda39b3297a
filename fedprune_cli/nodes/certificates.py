"""Who may take part: a certificate authority of one's own, certificates of the server and of each node, and the list of revoked ones.

The one home of `cryptography`. A pilot's folder holds

    ca.pem, ca.key            the authority; its key signs, and stays here
    server/                   ca.pem, own.pem, own.key of the server
    device-K/                 the same of device K: what is brought to the node
    device-K/node.key, .pub   where Flower carries: what device K proves itself by to a SuperLink
    revoked.txt               serial numbers, one a line, that the server refuses
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprune_cli.errors import CheckpointError, ConfigError, FedpruneError
from fedprune_cli.store.files import read_bytes
from fedprune_cli.store.write import write_whole, writing

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:
    raise ConfigError("nodes need the packages grpcio and cryptography: pip install 'fedprune[nodes]'") from None

CA, OWN, KEY, REVOKED, SERVER = "ca.pem", "own.pem", "own.key", "revoked.txt", "server"
CA_KEY = "ca.key"
NODE_KEY, NODE_PUBLIC = "node.key", "node.pub"
NAME = re.compile(r"device-(\d{1,6})")
CA_DAYS = 3650
MAX_BYTES = 100_000
NEGLIGIBLE = datetime.timedelta(minutes=5)  # by which clocks may differ


@dataclass(frozen=True)
class Identity:
    """What proves who one is: the authority's certificate, one's own, and its key, all PEM."""

    ca: bytes
    own: bytes
    key: bytes


def read_identity(folder: Path) -> Identity:
    """Returns the identity in a folder; raises CheckpointError, and for a certificate that has expired."""
    ca, own, key = (read_bytes(folder / name, MAX_BYTES, CheckpointError) for name in (CA, OWN, KEY))
    until = _parse(own, folder / OWN).not_valid_after_utc
    if until < _now():
        raise CheckpointError(f"{folder / OWN}: expired on {until:%Y-%m-%d}; `fedprune enroll` makes a new one")
    return Identity(ca, own, key)


def device_name(device: int) -> str:
    """Returns what a device is called in its certificate, as `NAME` reads it."""
    return f"device-{device}"


def device_in(folder: Path) -> int:
    """Returns the number of the device whose certificate lies in a folder; raises CheckpointError."""
    device = peer_in(folder).device
    if device is None:
        raise CheckpointError(f"{folder / OWN}: not the certificate of a device")
    return device


@dataclass(frozen=True)
class Peer:
    """Whose certificate it is: the name, the device's number if it is one's, its serial number, and until when it is valid (UTC)."""

    name: str
    device: int | None
    serial: int
    until: datetime.datetime

    @property
    def expired(self) -> bool:
        """Whether it is valid no longer: a connection may outlive it."""
        return self.until < _now()


def peer_of(pem: bytes) -> Peer:
    """Returns whose certificate it is; raises CheckpointError for none."""
    return _peer(_parse(pem, "certificate"))


def _peer(certificate: x509.Certificate) -> Peer:
    name = _name(certificate)
    found = NAME.fullmatch(name)
    return Peer(name, int(found[1]) if found else None, certificate.serial_number, certificate.not_valid_after_utc)


def unwanted(peer: Peer, refused: frozenset[int]) -> str:
    """Returns why a certificate is not taken, empty when it is; refused: the serial numbers that are revoked."""
    if peer.serial in refused:
        return f"the certificate of {peer.name} is revoked"
    return f"the certificate of {peer.name} has expired" if peer.expired else ""


def signed(identity: Identity, message: bytes) -> bytes:
    """Returns the signature of a message by the key of an identity, ECDSA on P-256 with SHA-256."""
    return _key_of(identity.key, "identity").sign(message, ec.ECDSA(hashes.SHA256()))


def in_der(pem: bytes) -> bytes:
    """Returns a certificate in the form that is shorter; raises CheckpointError for none."""
    return _parse(pem, "certificate").public_bytes(serialization.Encoding.DER)


def signer(ca: bytes, own: bytes, message: bytes, signature: bytes) -> Peer | None:
    """Returns who signed a message, whose certificate is `own` (DER); None where its key did not, or `ca` (PEM) did not issue it.

    Whether the certificate is revoked or has expired says `unwanted`. Raises CheckpointError for what is no certificate.
    """
    authority = _parse(ca, CA)
    try:
        certificate = x509.load_der_x509_certificate(own)
        key = certificate.public_key()
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm):
        raise CheckpointError("not a certificate in DER") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return None
    try:
        certificate.verify_directly_issued_by(authority)
        key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, TypeError):
        return None
    return _peer(certificate)


def revoked(pilot: Path) -> frozenset[int]:
    """Returns the serial numbers that are refused; raises CheckpointError for a line that is none, as half a list protects nobody."""
    path = pilot / REVOKED
    if not path.exists():
        return frozenset()
    lines = read_bytes(path, 10**7, CheckpointError).decode(errors="replace").splitlines()
    words = [line.split("#")[0].strip() for line in lines]
    try:
        return frozenset(int(word, 16) for word in words if word)
    except ValueError:
        raise CheckpointError(
            f"{path}: a line is not the serial number of a certificate, in hexadecimal digits"
        ) from None


def begin(pilot: Path, hosts: Sequence[str], days: int) -> None:
    """Makes the authority and the server's certificate for these names and addresses; raises CheckpointError when they are there."""
    if (pilot / CA).exists():
        raise CheckpointError(f"{pilot}: has an authority already")
    if not hosts:
        raise ConfigError(
            "--host: missing, the name or address at which nodes reach the server, such as --host 10.0.0.1"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedprune pilot")])
    only_signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _builder(key, name, CA_DAYS)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(only_signs, critical=True)
        .sign(key, hashes.SHA256())
    )
    with writing(pilot):
        pilot.mkdir(parents=True, exist_ok=True)
    _write_private(pilot / CA_KEY, _private(key))
    write_whole(pilot / CA, _public(certificate))
    _issue(pilot, SERVER, [_subject(host) for host in hosts], days)


def is_enrolled(pilot: Path, device: int) -> bool:
    """Whether a device has a certificate that is not revoked."""
    folder = pilot / device_name(device)
    return (folder / OWN).exists() and peer_in(folder).serial not in revoked(pilot)


def peer_in(folder: Path) -> Peer:
    """Returns whose certificate is in a folder; raises CheckpointError."""
    return peer_of(read_bytes(folder / OWN, MAX_BYTES, CheckpointError))


def enroll(pilot: Path, device: int, days: int) -> Path:
    """Makes the folder of a device with its certificate; returns it. Raises CheckpointError when there is one that is not revoked."""
    folder = pilot / device_name(device)
    if is_enrolled(pilot, device):
        raise CheckpointError(f"{folder}: is enrolled; --revoke {device} first, to give it a new certificate")
    for name in (NODE_KEY, NODE_PUBLIC):  # as old as the certificate, and so as stolen
        with writing(folder):
            (folder / name).unlink(missing_ok=True)
    return _issue(pilot, device_name(device), [x509.DNSName(device_name(device))], days)


def revoke(pilot: Path, device: int) -> None:
    """Puts the certificate of a device on the list of those that the server refuses; raises CheckpointError when it has none."""
    peer = peer_in(pilot / device_name(device))
    if peer.serial in revoked(pilot):
        raise CheckpointError(f"{pilot / REVOKED}: has device-{device} already")
    path = pilot / REVOKED
    before = read_bytes(path, 10**7, CheckpointError) if path.exists() else b""
    write_whole(path, before + f"{peer.serial:x} # {peer.name}, {_now():%Y-%m-%d %H:%M} UTC\n".encode())


def _issue(pilot: Path, name: str, subjects: Sequence[x509.GeneralName], days: int) -> Path:
    ca = read_bytes(pilot / CA, MAX_BYTES, CheckpointError)
    authority = _parse(ca, pilot / CA)
    signing = _load_key(pilot / CA_KEY)
    key = ec.generate_private_key(ec.SECP256R1())
    use = ExtendedKeyUsageOID.SERVER_AUTH if name == SERVER else ExtendedKeyUsageOID.CLIENT_AUTH
    certificate = (
        _builder(key, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), days)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .sign(signing, hashes.SHA256())
    )
    folder = pilot / name
    with writing(folder):
        folder.mkdir(exist_ok=True)
    _write_private(folder / KEY, _private(key))
    write_whole(folder / CA, ca)
    write_whole(folder / OWN, _public(certificate))
    return folder


def write_node_key(folder: Path) -> None:
    """Writes the key that a device proves itself by to Flower's SuperLink, and its public half, both as OpenSSH has them."""
    key, form = ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    _write_private(folder / NODE_KEY, private)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_whole(folder / NODE_PUBLIC, public + b"\n")


def _builder(key: ec.EllipticCurvePrivateKey, name: x509.Name, days: int) -> x509.CertificateBuilder:
    begins = _now() - NEGLIGIBLE
    until = begins + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(until)
    )


def _subject(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", host):
            raise ConfigError(f"--host {host}: neither a host's name nor an address") from None
        return x509.DNSName(host)


def _parse(pem: bytes, where: object, error: type[FedpruneError] = CheckpointError) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise error(f"{where}: not a certificate in PEM") from None


def _name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    return _key_of(read_bytes(path, MAX_BYTES, CheckpointError), path)


def _key_of(pem: bytes, where: object) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise CheckpointError(f"{where}: not a private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CheckpointError(f"{where}: not a key of an elliptic curve")
    return key


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _public(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_private(path: Path, data: bytes) -> None:
    """Writes a key that nobody but its owner may read, at no moment."""
    with writing(path):
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
