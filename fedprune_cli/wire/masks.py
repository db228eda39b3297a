"""The code of a mask: a bitmap, or Rice-coded gaps between kept entries, whichever is shorter."""

from __future__ import annotations

import numpy as np

from fedprune_cli.store.state import Array


def encode_mask(mask: Array) -> bytes:
    """Returns the cheaper code of a mask [U]: a bitmap, or Rice-coded gaps between kept entries; a byte says which.

    >>> few = np.arange(8000) % 1000 == 0  # eight of 8,000 entries: gaps take eleven bits each
    >>> len(encode_mask(few)), len(encode_mask(np.arange(8000) % 2 == 0))
    (12, 1001)
    """
    bitmap = b"\xff" + np.packbits(mask).tobytes()
    kept = np.flatnonzero(mask)
    gaps = np.diff(kept, prepend=-1) - 1
    parameter = int(np.log2(max(gaps.mean(), 1.0))) if len(gaps) else 0
    quotient = gaps >> parameter
    if int(quotient.sum()) + len(gaps) * (1 + parameter) >= 8 * len(bitmap):
        return bitmap
    ends = np.cumsum(quotient + 1 + parameter)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    starts = ends - quotient - 1 - parameter
    bits[np.repeat(starts, quotient) + _within(quotient)] = 1  # the quotient in unary, closed by a zero
    for bit in range(parameter):
        bits[ends - 1 - bit] = (gaps >> bit) & 1
    return bytes([parameter]) + np.packbits(bits).tobytes()


def decode_mask(code: bytes, size: int, kept: int) -> Array:
    """Returns the mask [size] with `kept` entries that `encode_mask` coded; raises IndexError for a code of another mask.

    >>> decode_mask(encode_mask(np.array([True, False, True])), size=3, kept=2).tolist()
    [True, False, True]
    """
    bits = np.unpackbits(np.frombuffer(code[1:], dtype=np.uint8))
    if code[0] == 0xFF:
        return bits[:size].astype(bool)
    parameter, mask = code[0], np.zeros(size, dtype=bool)
    zeros = np.flatnonzero(bits == 0)
    ends = np.minimum(np.searchsorted(zeros, np.arange(len(bits))), len(zeros) - 1)
    closes = zeros[ends]  # the zero that ends a quotient from here
    following = (closes + 1 + parameter).tolist()
    starts, cursor = np.empty(kept, dtype=np.int64), 0
    for at in range(kept):
        starts[at] = cursor
        cursor = following[cursor]
    gaps = closes[starts] - starts
    for bit in range(parameter):
        gaps = 2 * gaps + bits[closes[starts] + 1 + bit]
    mask[np.cumsum(gaps + 1) - 1] = True
    return mask


def _within(counts: Array) -> Array:
    """Returns 0..n-1 for each n of `counts`, concatenated."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
