"""A run's folder: created whole or not at all, appended in order, never half a file.

config.yaml, manifest.json   what was asked, and what it was asked of
rounds.jsonl                 modelled figures, one object a round; written before the state of its round
timings.jsonl                measured wall time, kept apart
state.safetensors            the last finished round; replaced by rename
personal-<round>.f32         the devices' personalized parts, appended to; begun anew when most of its rows are old
summary.json, report/        after the last round
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedprune_cli.errors import CheckpointError, OutputError
from fedprune_cli.state import Array, Personal, State, chain, decode, encode

STATE, CONFIG, MANIFEST, SUMMARY = "state.safetensors", "config.yaml", "manifest.json", "summary.json"
LOGS = ("rounds.jsonl", "timings.jsonl")
DEAD_ROWS = 4  # rows a live one, from which a file of personal rows is begun anew


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write into an OutputError of one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or path}: {error.strerror}") from None


def create(run_dir: Path, config_yaml: str, manifest: Mapping[str, Any], state: State) -> None:
    """Makes the folder with its first checkpoint; raises CheckpointError when it exists."""
    if run_dir.exists():
        raise CheckpointError(
            f"{run_dir} exists: continue it with `fedprune resume {run_dir}`, or choose another with out=DIR"
        )
    new = run_dir.with_name(f".{run_dir.name}.{os.getpid()}.new")
    with writing(run_dir):
        try:
            new.mkdir(parents=True)
            (new / CONFIG).write_text(config_yaml)
            (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            for log in LOGS:
                (new / log).touch()
            _replace(new / STATE, encode(state, manifest["config_hash"]))
            new.rename(run_dir)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise


@contextlib.contextmanager
def locked(run_dir: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the folder for this process; raises CheckpointError when it is not there, or another one has it and `wait` is not wanted."""
    try:
        descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"{run_dir}: {error.strerror}; a run folder is expected") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise CheckpointError(f"{run_dir}: another process is writing this run") from None
    finally:
        os.close(descriptor)


def commit(run_dir: Path, state: State, config_hash: str, entries: Mapping[str, Mapping[str, Any]]) -> State:
    """Appends a finished round's `entries` (log name -> object) and personal rows, then replaces the state; returns it as stored."""
    for log, entry in entries.items():
        with writing(run_dir / log), (run_dir / log).open("ab") as file:
            file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    before = state.personal.name
    state = replace(state, personal=_store(run_dir, state.personal, state.round))
    _replace(run_dir / STATE, encode(state, config_hash))
    if state.personal.name != before:
        (run_dir / before).unlink(missing_ok=True)
    return state


def _store(run_dir: Path, personal: Personal, number: int) -> Personal:
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
            sha256 = chain(sha256, [row])
        file.flush()
        os.fsync(file.fileno())
    place[devices] = start + np.arange(len(devices))
    stored = _map(run_dir / name, (start + len(devices), len(personal.initial)))
    return Personal(personal.initial, place, stored, name, sha256)


def _map(path: Path, shape: tuple[int, int]) -> Array:
    return np.memmap(path, dtype=np.float32, mode="r", shape=shape) if all(shape) else np.zeros(shape, np.float32)


def _read_personal(run_dir: Path, name: str, shape: tuple[int, int], sha256: str) -> Array:
    """Returns the stored rows; cuts off what a killed process wrote after them and removes the files that it left behind."""
    path, size = run_dir / name, 4 * shape[0] * shape[1]
    if not re.fullmatch(r"personal-\d+\.f32", name):
        raise CheckpointError(f"{run_dir / STATE}: damaged checkpoint (no personal file {name!r})")
    for other in run_dir.glob("personal-*.f32"):
        if other != path or not size:
            other.unlink()
    if not size:
        return np.zeros(shape, np.float32)
    try:
        if path.stat().st_size > size:
            os.truncate(path, size)
        intact = path.stat().st_size == size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    stored = _map(path, shape) if intact else np.zeros((0, 0), np.float32)
    if not intact or chain("", stored) != sha256:
        raise CheckpointError(f"{path}: damaged (its content does not match its checksum)")
    return stored


def finish(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Writes summary.json."""
    _replace(run_dir / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())


def load(run_dir: Path, config_hash: str) -> State:
    """Returns the last finished round's state and cuts from the logs what a killed process wrote after it.

    Raises CheckpointError when the folder is damaged or belongs to another configuration.
    """
    try:
        data = (run_dir / STATE).read_bytes()
    except OSError as error:
        why = "it is finished and its checkpoint was pruned" if (run_dir / SUMMARY).exists() else error.strerror
        raise CheckpointError(f"{run_dir / STATE}: {why}") from None
    state, written_hash = decode(data, str(run_dir / STATE), functools.partial(_read_personal, run_dir))
    if written_hash != config_hash:
        raise CheckpointError(f"{run_dir / STATE}: belongs to configuration {written_hash}, not to {config_hash}")
    for log in LOGS:
        _cut(run_dir / log, state.round)
    return state


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises CheckpointError naming it when it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: damaged (not a JSON object)")
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSON-lines file; raises CheckpointError naming the damaged line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise CheckpointError(f"{path}: line {number} is damaged ({error})") from None
    return entries


def _replace(path: Path, data: bytes) -> None:
    """Writes the file whole or leaves the old one."""
    temporary = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _cut(log: Path, rounds: int) -> None:
    """Keeps the entries of the finished rounds, which must all be there."""
    try:
        lines = log.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise CheckpointError(f"{log}: {error.strerror}") from None
    for number, line in enumerate(lines[:rounds], start=1):
        try:
            intact = line.endswith(b"\n") and json.loads(line)["round"] == number
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise CheckpointError(f"{log}: line {number} is damaged")
    if len(lines) < rounds:
        raise CheckpointError(f"{log}: has {len(lines)} rounds, the checkpoint {rounds}")
    if len(lines) > rounds:
        _replace(log, b"".join(lines[:rounds]))
