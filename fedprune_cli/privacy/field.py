"""Shamir's secret sharing in the prime field of 2^127 - 1: any `threshold` shares give a secret, fewer say nothing about it.

A secret is a seed, and one of 127 bits is as hard to guess as the X25519 key that is derived of it: a longer one would be more to send.

Shares of many secrets that the same devices hold need the same Lagrange coefficients, so these are computed once (Shamir, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence

PRIME = 2**127 - 1
ELEMENT = 16  # bytes of an element of the field


def element(random: bytes) -> int:
    """Returns an element drawn from 32 random bytes, so many that what modulo favours is below 2^-128."""
    return int.from_bytes(random, "little") % PRIME


def share(polynomial: Sequence[int], place: int) -> int:
    """Returns the share at `place` (from 1) of the secret polynomial[0]; as many shares as coefficients give it back.

    >>> coefficients = lagrange([1, 3])
    >>> recover(coefficients, [share([42, 7], 1), share([42, 7], 3)])
    42
    """
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * place + coefficient) % PRIME
    return value


def lagrange(places: Sequence[int]) -> list[int]:
    """Returns what each share at these distinct places counts in the secret: prod_{j != i} x_j / (x_j - x_i)."""
    coefficients = []
    for at in places:
        above = below = 1
        for other in places:
            if other != at:
                above, below = above * other % PRIME, below * (other - at) % PRIME
        coefficients.append(above * pow(below, -1, PRIME) % PRIME)
    return coefficients


def recover(coefficients: Sequence[int], shares: Sequence[int]) -> int:
    """Returns the secret of shares at the places of which `coefficients` were computed."""
    return sum(coefficient * value for coefficient, value in zip(coefficients, shares, strict=True)) % PRIME
