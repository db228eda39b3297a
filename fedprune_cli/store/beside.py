"""What of a state lies in files of its own beside the checkpoint: the rows of the personalized parts, and the masks of the last round."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedprune_cli.errors import CheckpointError
from fedprune_cli.store.files import MAX_BYTES, read_bytes
from fedprune_cli.store.state import Array, Personal, Saved, chained_rows, decode_masks, encode_masks
from fedprune_cli.store.write import write_whole, writing

PERSONAL, MASKS = "personal-*.f32", "masks-*.safetensors"
DEAD_ROWS = 4  # rows a live one, from which a file of personal rows is begun anew


def masks_of(number: int) -> str:
    """Returns the name of the file with the masks of a round."""
    return MASKS.replace("*", str(number))


def store_masks(run_dir: Path, saved: Saved) -> None:
    """Writes the masks of a round that any device was pruned in. Until the state is replaced nothing refers to them."""
    if saved.state.masks:
        write_whole(run_dir / masks_of(saved.state.round), encode_masks(saved))


def read_masks(run_dir: Path, saved: Saved) -> Mapping[str, Array]:
    """Returns the masks of the last finished round, nothing where there is no file."""
    path = run_dir / masks_of(saved.state.round)
    return decode_masks(read_bytes(path, MAX_BYTES, CheckpointError), str(path), saved) if path.exists() else {}


def store_personal(run_dir: Path, personal: Personal, number: int) -> Personal:
    """Returns the parts with their new rows on disk: appended, or written anew with the live ones when those are few.

    Until the state is replaced nothing refers to what is written here.
    """
    if not personal.new or not len(personal.initial):
        return replace(personal, new={})
    devices = sorted(personal.new)
    trained = personal.place >= 0
    trained[devices] = True
    anew = len(personal.stored) + len(devices) > DEAD_ROWS * int(trained.sum())
    if anew:
        devices = np.flatnonzero(trained).tolist()
    name, start = (f"personal-{number}.f32", 0) if anew else (personal.name, len(personal.stored))
    sha256, place, size = "" if anew else personal.sha256, personal.place.copy(), personal.initial.nbytes
    with writing(run_dir / name), (run_dir / name).open("wb" if anew or not start else "r+b") as file:
        file.seek(start * size)
        for device in devices:
            row = personal[device]
            file.write(row.tobytes())
            sha256 = chained_rows(sha256, [row])
        file.flush()
        os.fsync(file.fileno())
    place[devices] = start + np.arange(len(devices))
    stored = _map(run_dir / name, (start + len(devices), len(personal.initial)))
    return Personal(personal.initial, place, stored, name, sha256)


def _map(path: Path, shape: tuple[int, int]) -> Array:
    return np.memmap(path, dtype=np.float32, mode="r", shape=shape) if all(shape) else np.zeros(shape, np.float32)


def read_personal(run_dir: Path, personal: Personal) -> Personal:
    """Returns the parts with their stored rows, mapped from the file; what a killed process wrote after them is passed over."""
    path, shape = run_dir / personal.name, (len(personal.stored), len(personal.initial))
    size = 4 * shape[0] * shape[1]
    if not size:
        return replace(personal, stored=np.zeros(shape, np.float32))
    try:
        intact = path.stat().st_size >= size
        stored = _map(path, shape) if intact else personal.stored
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', error)}") from None
    if not intact or chained_rows("", stored) != personal.sha256:
        raise CheckpointError(f"{path}: damaged (its content does not match its checksum)")
    return replace(personal, stored=stored)
