"""Payloads of few bits: stochastic rounding of an update, block by block, and the bytes that really travel.

A block's largest magnitude s is sent as float32; its entries become whole numbers out of -L..L, L = 2^(bits-1) - 1, of the step s / L,
rounded up or down at random so that their expectation is exact (QSGD with the maximum norm; Alistarh et al., NeurIPS 2017).
"""

from __future__ import annotations

import math

import numpy as np

from fedprune_cli.store.state import Array

BITS_PER_PARAM = 32  # of a value that is not quantized
QUANTIZED_BITS = (2, 4, 8, 16)
BLOCK = 1024  # entries that share a scale


def bits_per_value(bits: int) -> float:
    """Returns what a value costs on the uplink, with its share of its block's scale.

    >>> bits_per_value(8), bits_per_value(32)
    (8.03125, 32.0)
    """
    return float(bits) if bits == BITS_PER_PARAM else bits + BITS_PER_PARAM / BLOCK


def levels(bits: int) -> int:
    """Returns L, the number of steps between zero and a block's largest magnitude.

    >>> [levels(bits) for bits in QUANTIZED_BITS]
    [1, 7, 127, 32767]
    """
    return int(2 ** (bits - 1)) - 1


def quantize(values: Array, bits: int, rng: np.random.Generator) -> bytes:
    """Returns the code of float32 `values` [n]: the scales, then the numbers in `bits` bits each.

    >>> from fedprune_cli.rng import stream
    >>> code = quantize(np.array([3, -3, 0], np.float32), 2, stream(0, "rounding", 0, 0))
    >>> len(code), dequantize(code, 3, 2).tolist()  # a scale of four bytes, and three numbers in a byte
    (5, [3.0, -3.0, 0.0])
    """
    padded = np.zeros((math.ceil(len(values) / BLOCK), BLOCK), dtype=np.float32)
    padded.ravel()[: len(values)] = values
    scale = np.abs(padded).max(1, initial=0.0)
    padded *= (levels(bits) / np.where(scale > 0, scale, 1))[:, None]
    padded += rng.random(padded.shape, dtype=np.float32)
    numbers = np.clip(np.floor(padded) + levels(bits), 0, 2 * levels(bits)).ravel()[: len(values)]
    if bits == 16:
        return bytes(scale.tobytes() + numbers.astype("<u2").tobytes())
    return bytes(scale.tobytes() + _pack(numbers.astype(np.uint8), bits).tobytes())


def dequantize(code: bytes, size: int, bits: int) -> Array:
    """Returns the values, float32 [size], that a code stands for."""
    blocks = math.ceil(size / BLOCK)
    scale = np.frombuffer(code, dtype=np.float32, count=blocks)
    packed = np.frombuffer(code, dtype="<u2" if bits == 16 else np.uint8, offset=4 * blocks)
    numbers = packed if bits == 16 else _unpack(packed, size, bits)
    steps = np.repeat(scale / np.float32(levels(bits)), BLOCK)[:size]
    return (numbers.astype(np.float32) - np.float32(levels(bits))) * steps


def _pack(numbers: Array, bits: int) -> Array:
    """Returns the numbers, uint8 below 2^bits, as many a byte as fit."""
    per_byte = 8 // bits
    padded = np.zeros((math.ceil(len(numbers) / per_byte), per_byte), dtype=np.uint8)
    padded.ravel()[: len(numbers)] = numbers
    return np.bitwise_or.reduce(padded << (bits * np.arange(per_byte, dtype=np.uint8)), axis=1, dtype=np.uint8)


def _unpack(packed: Array, size: int, bits: int) -> Array:
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    return ((packed[:, None] >> shifts) & (2**bits - 1)).ravel()[:size]
