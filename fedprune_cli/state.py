"""What a run knows, as one value, and its bytes on disk. No pickle: safetensors with JSON metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedprune_cli.errors import CheckpointError

Array = np.ndarray


@dataclass(frozen=True)
class State:
    """Everything that the next round depends on, apart from the configuration.

    round: rounds finished so far, the cursor of every random stream.
    shared: float32 [U], the global part u.
    personal: float32 [K, V], row k is v_k and never leaves device k.
    slots: named arrays that outlive a round: the clock `simulated_s` [], the last `prune_ratio` [K], and what a plug-in adds.
    """

    round: int
    shared: Array
    personal: Array
    slots: Mapping[str, Array]


def encode(state: State, config_hash: str) -> bytes:
    """Returns the checkpoint as a plain safetensors file; equal states give equal bytes."""
    tensors = {"shared": state.shared, "personal": state.personal}
    tensors |= {f"slots/{name}": value for name, value in state.slots.items()}
    meta: dict[str, object] = {"round": state.round, "config_hash": config_hash}
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    # one metadata key: with several, safetensors writes them in a random order
    meta["sha256"] = digest.hexdigest()
    return bytes(
        save({name: np.asarray(value, order="C") for name, value in tensors.items()}, {"fedprune": json.dumps(meta)})
    )


def decode(data: bytes, where: str) -> tuple[State, str]:
    """Returns the state and the config hash that `encode` wrote; raises CheckpointError when any byte differs."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = json.loads(header["__metadata__"]["fedprune"])
        slots = {name.removeprefix("slots/"): value for name, value in tensors.items() if name.startswith("slots/")}
        state, config_hash = State(meta["round"], tensors["shared"], tensors["personal"], slots), meta["config_hash"]
        intact = encode(state, config_hash) == data
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: damaged checkpoint ({type(error).__name__})") from None
    if not intact:
        raise CheckpointError(f"{where}: damaged checkpoint (its content does not match its checksum)")
    return state, config_hash
