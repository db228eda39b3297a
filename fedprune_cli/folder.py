"""A run's folder: created whole or not at all, appended in order, never half a file.

config.yaml, manifest.json   what was asked, and what it was asked of
rounds.jsonl                 modelled figures, one object a round; written before the state of its round
timings.jsonl                measured wall time, kept apart
state.safetensors            the last finished round; replaced by rename
summary.json, report/        after the last round
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedprune_cli.errors import CheckpointError, OutputError
from fedprune_cli.state import State, decode, encode

STATE, CONFIG, MANIFEST, SUMMARY = "state.safetensors", "config.yaml", "manifest.json", "summary.json"
LOGS = ("rounds.jsonl", "timings.jsonl")


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
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the folder for this process; raises CheckpointError when another one has it or it is not there."""
    try:
        descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"{run_dir}: {error.strerror}; a run folder is expected") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CheckpointError(f"{run_dir}: another process is writing this run") from None
    finally:
        os.close(descriptor)


def commit(run_dir: Path, state: State, config_hash: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Appends a finished round's `entries` (log name -> object), then replaces the state."""
    for log, entry in entries.items():
        with writing(run_dir / log), (run_dir / log).open("ab") as file:
            file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    _replace(run_dir / STATE, encode(state, config_hash))


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
        raise CheckpointError(f"{run_dir / STATE}: {error.strerror}") from None
    state, written_hash = decode(data, str(run_dir / STATE))
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
