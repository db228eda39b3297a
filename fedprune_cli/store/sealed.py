"""Sealed bytes: a plain header and arrays as one safetensors value with its checksum. What was changed, cut or padded is not read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedprune_cli.store.files import Plain, parse_json
from fedprune_cli.store.state import Array

KEY = "fedprune"


@dataclass(frozen=True)
class Sealed:
    """A header of plain values, and arrays by name."""

    header: Mapping[str, Plain]
    arrays: Mapping[str, Array] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Returns the bytes, equal for equal values; raises ValueError for numbers that JSON does not have."""
        arrays = {name: np.ascontiguousarray(value) for name, value in sorted(self.arrays.items())}
        header = json.dumps(self.header, sort_keys=True, allow_nan=False, separators=(",", ":"))
        digest = hashlib.sha256(header.encode())
        for name, value in arrays.items():
            digest.update(f"{name}{value.dtype}{value.shape}".encode())
            digest.update(value.tobytes())
        return bytes(save(arrays, {KEY: f"{digest.hexdigest()}{header}"}))


def unseal(data: bytes) -> Sealed:
    """Returns what was sealed; raises ValueError, saying what is wrong, when any byte is another one."""
    try:
        arrays = load(data)
        metadata = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        header = parse_json(metadata[KEY][64:].encode())
        sealed = Sealed(header, arrays)
        intact = isinstance(header, dict) and sealed.encode() == data
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"damaged ({type(error).__name__})") from None
    if not intact:
        raise ValueError("damaged (its content does not match its checksum)")
    return sealed
