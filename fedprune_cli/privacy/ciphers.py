"""The home of `cryptography`: key agreement (X25519), derived keys (HKDF), sealed messages (AES-GCM) and mask streams (AES-CTR).

Every key is derived for one use: of one round, of one pair of devices in one direction. So no nonce and no mask comes twice.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array

KEY = 32  # bytes of a key, private, public or symmetric
TAG = 16  # bytes by which a sealed message is longer
_NONCE = bytes(12)


def require_ciphers() -> None:
    """Raises ConfigError where the package that has the ciphers is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError(
            "privacy.secure=true needs an extra (cryptography): pip install 'fedprune[privacy]'"
        ) from None


def public_key(private: bytes) -> bytes:
    """Returns the public key of an X25519 key pair."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: Mapping[int, bytes]) -> dict[int, bytes]:
    """Returns the secrets that the holder of a private key shares with those of other key pairs; ValueError for a false key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    mine = X25519PrivateKey.from_private_bytes(private)  # as costly as an agreement
    return {other: mine.exchange(X25519PublicKey.from_public_bytes(key)) for other, key in public.items()}


def derived(secret: bytes, use: bytes) -> bytes:
    """Returns the key for one use of a secret."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY, None, use).derive(secret)


def sealed(key: bytes, message: bytes) -> bytes:
    """Returns the message encrypted and authenticated with a key that seals nothing else."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key).encrypt(_NONCE, message, None)


def opened(key: bytes, message: bytes) -> bytes | None:
    """Returns what was sealed, None for what was not sealed with this key."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(_NONCE, message, None)
    except InvalidTag:
        return None


def mask_stream(key: bytes, size: int) -> Array:
    """Returns the first `size` words of a key's mask, uint32: a shorter mask is the beginning of a longer one."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    stream = Cipher(AES(key), CTR(bytes(16))).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, dtype="<u4")
