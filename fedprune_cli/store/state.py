"""What a run knows, as one value, and its bytes on disk. No pickle: safetensors with JSON metadata."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedprune_cli.errors import CheckpointError

Array = np.ndarray


@dataclass(frozen=True)
class Ragged(Sequence[Array]):
    """Arrays of different lengths laid end to end: item i is flat[starts[i] : starts[i + 1]]."""

    flat: Array
    starts: Array

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, at: int) -> Array:  # type: ignore[override]  # no slices
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self.flat[self.starts[at] : self.starts[at + 1]]

    @property
    def sizes(self) -> Array:
        """The lengths [items]."""
        return np.diff(self.starts)


def ragged(pieces: Sequence[Array]) -> Ragged:
    """Returns the arrays laid end to end.

    >>> pieces = ragged([np.array([4, 7]), np.array([], dtype=int), np.array([9])])
    >>> pieces[0].tolist(), pieces.sizes.tolist()
    ([4, 7], [2, 0, 1])
    """
    flat = np.concatenate(pieces) if len(pieces) else np.zeros(0, dtype=np.int64)
    return Ragged(flat, np.cumsum([0, *map(len, pieces)]))


@dataclass(frozen=True)
class Personal:
    """The personalized parts v_k of all devices: each device's initial row until it trains, then its last one.

    Only what trained takes memory or disk: a run may have a hundred thousand devices of which a hundred train a round.
    initial: float32 [V]; place: int64 [N], a device's row among the stored ones, -1 before its first; stored: float32 [rows, V], in
    memory or mapped from the run's file `name`; sha256: of the stored rows, chained row by row; new: rows that came since.
    """

    initial: Array
    place: Array
    stored: Array
    name: str
    sha256: str = ""
    new: Mapping[int, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, device: int) -> Array:
        """Returns v_k, float32 [V]."""
        if device in self.new:
            return self.new[device]
        place = self.place[device]
        return self.initial if place < 0 else np.array(self.stored[place])

    def __iter__(self) -> Iterator[Array]:
        return (self[device] for device in range(len(self)))

    def replaced(self, rows: Mapping[int, Array]) -> Personal:
        """Returns the parts after the devices in `rows` trained."""
        return Personal(self.initial, self.place, self.stored, self.name, self.sha256, {**self.new, **rows})


def untrained(initial: Array, num_devices: int) -> Personal:
    """Returns the parts before the first round."""
    size = len(initial)
    return Personal(initial, np.full(num_devices, -1), np.zeros((0, size), dtype=np.float32), "personal-0.f32")


def chained_rows(sha256: str, rows: Sequence[Array] | Array) -> str:
    """Returns the hash of stored rows after more of them: each row's hash covers the one before."""
    for row in rows:
        sha256 = hashlib.sha256(sha256.encode() + np.ascontiguousarray(row).tobytes()).hexdigest()
    return sha256


@dataclass(frozen=True)
class State:
    """Everything that the next round depends on, apart from the configuration.

    round: rounds finished so far, the cursor of every random stream.
    shared: float32 [U], the global part u.
    personal: v_k of every device, which never leaves it.
    slots: named arrays that outlive a round: the clock `simulated_s` [], the last `prune_ratio` [K], and what a plug-in adds.
    masks: what says which part of u each device kept in the last round, and was tested with, as `Masks.arrays` gives it: nothing
    where everybody keeps everything. No later round depends on it, and it lies in a file of its own; but no later state tells it either.
    """

    round: int
    shared: Array
    personal: Personal
    slots: Mapping[str, Array]
    masks: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint: the state, the configuration that it belongs to, and the chained SHA-256 of the records of its rounds."""

    state: State
    config_hash: str
    records: str


def encode(saved: Saved) -> bytes:
    """Returns the checkpoint as a plain safetensors file; equal states give equal bytes.

    Stored personal rows lie in a file of their own, of which it holds the name, the number of rows and the hash.
    """
    state, personal = saved.state, saved.state.personal
    tensors = {"shared": state.shared, "personal/initial": personal.initial, "personal/place": personal.place}
    tensors |= {f"slots/{name}": value for name, value in state.slots.items()}
    stored = [personal.name, len(personal.stored), personal.sha256]
    meta: dict[str, object] = {
        "round": state.round, "config_hash": saved.config_hash, "personal": stored, "records": saved.records,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    # one metadata key: with several, safetensors writes them in a random order
    meta["sha256"] = digest.hexdigest()
    return bytes(
        save({name: np.asarray(value, order="C") for name, value in tensors.items()}, {"fedprune": json.dumps(meta)})
    )


def decode(data: bytes, where: str) -> Saved:
    """Returns what `encode` wrote, its stored personal rows all zero; raises CheckpointError when any byte differs."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = json.loads(header["__metadata__"]["fedprune"])
        if "records" not in meta:
            raise CheckpointError(f"{where}: damaged checkpoint, or one of an older version of fedprune")
        slots = {name.removeprefix("slots/"): value for name, value in tensors.items() if name.startswith("slots/")}
        name, rows, sha256 = meta["personal"]
        shared, initial, place = (tensors[key] for key in ("shared", "personal/initial", "personal/place"))
        empty = Personal(initial, place, np.broadcast_to(np.float32(0), (rows, len(initial))), name, sha256)
        saved = Saved(State(meta["round"], shared, empty, slots), meta["config_hash"], meta["records"])
        intact = encode(saved) == data
        # what follows can be false only in a file that was made to deceive
        allowed = re.fullmatch(r"personal-\d{1,9}\.f32", name) and type(meta["round"]) is int and meta["round"] >= 0
        sound = place.dtype == np.int64 and shared.dtype == initial.dtype == np.float32
        sound = sound and place.min(initial=-1) >= -1 and place.max(initial=-1) < rows
        sound = sound and shared.ndim == initial.ndim == place.ndim == 1
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged checkpoint ({type(error).__name__})") from None
    if not intact:
        raise CheckpointError(f"{where}: damaged checkpoint (its content does not match its checksum)")
    if not (allowed and sound):
        raise CheckpointError(f"{where}: damaged checkpoint (its values cannot be)")
    return saved


def encode_masks(saved: Saved) -> bytes:
    """Returns the masks of a checkpoint's last round as a plain safetensors file that says which round of which run they are of."""
    arrays = {name: np.ascontiguousarray(value) for name, value in sorted(saved.state.masks.items())}
    meta = {"round": saved.state.round, "config_hash": saved.config_hash, "records": saved.records}
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name, value in arrays.items():
        digest.update(f"{name}{value.dtype}{value.shape}".encode() + value.tobytes())
    return bytes(save(arrays, {"fedprune": json.dumps({**meta, "sha256": digest.hexdigest()})}))


def decode_masks(data: bytes, where: str, saved: Saved) -> Mapping[str, Array]:
    """Returns what `encode_masks` wrote for a checkpoint; raises CheckpointError when any byte differs, or it is of another one."""
    try:
        arrays = load(data)
        intact = encode_masks(replace(saved, state=replace(saved.state, masks=arrays))) == data
        sound = all(value.dtype.kind == "u" and value.ndim == 1 for value in arrays.values())
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged ({type(error).__name__})") from None
    if not (intact and sound):
        raise CheckpointError(f"{where}: damaged, or not of the run's last round")
    return arrays


def same_form(state: State, initial: State) -> bool:
    """Whether a state's arrays have the types and shapes of those that its run began with, as far as both have them.

    What began with no row may have any number of them.
    """

    def arrays(of: State) -> dict[str, Array]:
        return {"": of.shared, "personal": of.personal.initial, "place": of.personal.place, **of.slots}

    def fits(array: Array, first: Array) -> bool:
        grows = first.ndim > 0 and len(first) == 0 and array.ndim == first.ndim
        return array.dtype == first.dtype and (
            array.shape == first.shape or (grows and array.shape[1:] == first.shape[1:])
        )

    mine, its = arrays(state), arrays(initial)
    return all(fits(mine[name], its[name]) for name in mine.keys() & its.keys())
