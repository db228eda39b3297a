"""A run's folder: created whole or not at all, appended in order, never half a file, and checked whenever it is read back.

config.yaml, manifest.json   what was asked, and what it was asked of
rounds.jsonl                 modelled figures, one object a round; written before the state of its round
timings.jsonl                measured wall time, kept apart; nothing depends on it
state.safetensors            the last finished round, and the chained hash of the records so far; replaced by rename
personal-<round>.f32         the devices' personalized parts, appended to; begun anew when most of its rows are old
masks-<round>.safetensors    which part of the shared part each device kept in the last finished round, where any keeps less than all
SHA256SUMS                   of config.yaml and manifest.json, and after the last round of every file, for `sha256sum -c` too
summary.json, report/        after the last round
inputs/                      copies of the tables that the run reads, by the key that names each
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedprune_cli.errors import CheckpointError
from fedprune_cli.store.beside import MASKS, PERSONAL, masks_of, read_masks, read_personal, store_masks, store_personal
from fedprune_cli.store.files import MAX_BYTES, fits, parse_json, read_bytes, read_json
from fedprune_cli.store.record import RoundRecord, parse_record
from fedprune_cli.store.state import Saved, State, decode, encode
from fedprune_cli.store.write import write_whole as write_whole
from fedprune_cli.store.write import writing as writing

STATE, CONFIG, MANIFEST, SUMMARY, SUMS = (
    "state.safetensors",
    "config.yaml",
    "manifest.json",
    "summary.json",
    "SHA256SUMS",
)
RECORDS, TIMINGS = "rounds.jsonl", "timings.jsonl"
INPUTS = "inputs"
PLAIN_NAME = r"[A-Za-z0-9]+(-[0-9]+)?(\.[a-z0-9]+)?"


@dataclass(frozen=True)
class Beginning:
    """What a run's folder begins with: config.yaml, the manifest, the first state, and copies of inputs by their names.

    origin: the folder of the run that this one goes on from at `state`, whose records, timings and personal rows it begins with.
    """

    config_yaml: str
    manifest: Mapping[str, object]
    state: State
    inputs: Mapping[str, bytes] = field(default_factory=dict)
    origin: Path | None = None


def create(run_dir: Path, begin: Beginning) -> None:
    """Makes the folder with its first checkpoint; raises CheckpointError when it exists."""
    exists = f"{run_dir} exists: continue it with `fedprune resume {run_dir}`, or choose another with out=DIR"
    with writing(run_dir):
        if run_dir.exists():
            raise CheckpointError(exists)
        new = run_dir.with_name(f".{run_dir.name}.{os.getpid()}.new")
        try:
            _clear(run_dir)
            new.mkdir(parents=True)
            (new / CONFIG).write_text(begin.config_yaml)
            (new / MANIFEST).write_text(json.dumps(begin.manifest, indent=1) + "\n")
            records = _begin_logs(new, begin)
            for name, content in begin.inputs.items():
                (new / INPUTS).mkdir(exist_ok=True)
                (new / INPUTS / name).write_bytes(content)
            write_whole(new / SUMS, _sums({name: _sha256(new / name) for name in (CONFIG, MANIFEST)}))
            first = Saved(begin.state, str(begin.manifest["config_hash"]), records)
            store_masks(new, first)
            write_whole(new / STATE, encode(first))
            new.rename(run_dir)
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (
                errno.ENOTEMPTY,
                errno.EEXIST,
            ):  # another process was first
                raise CheckpointError(exists) from None
            raise


def _begin_logs(new: Path, begin: Beginning) -> str:
    """Writes the logs and personal rows that a run begins with; returns the chained hash of its records."""
    origin, state = begin.origin, begin.state
    logs = {log: _lines(origin / log, read_state(origin)) if origin else [] for log in (RECORDS, TIMINGS)}
    for log, lines in logs.items():
        (new / log).write_bytes(b"".join(lines))
    if origin and state.personal.stored.size:
        (new / state.personal.name).write_bytes(state.personal.stored.tobytes())
    return functools.reduce(chained_record, logs[RECORDS], "")


def _clear(run_dir: Path) -> None:
    """Removes what processes that were killed while they made this folder left beside it."""
    for left in run_dir.parent.glob(f".{glob.escape(run_dir.name)}.*.new"):
        if (pid := made_by(left.name)) and not alive(pid):
            shutil.rmtree(left, ignore_errors=True)


def made_by(name: str) -> int | None:
    """Returns the process that makes, or made, a half-made folder of this name; None for any other name."""
    found = re.fullmatch(r"\..+\.(\d+)\.new", name)
    return int(found[1]) if found else None


def alive(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def commit(run_dir: Path, saved: Saved, state: State, entries: Mapping[str, Mapping[str, Any]]) -> Saved:
    """Appends a finished round's `entries` (log name -> object) and personal rows, then replaces the checkpoint; returns the new one."""
    lines = {log: json.dumps(entry, allow_nan=False).encode() + b"\n" for log, entry in entries.items()}
    for log, line in lines.items():
        with writing(run_dir / log), (run_dir / log).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    state = replace(state, personal=store_personal(run_dir, state.personal, state.round))
    new = Saved(state, saved.config_hash, chained_record(saved.records, lines[RECORDS]))
    store_masks(run_dir, new)
    write_whole(run_dir / STATE, encode(new))
    with writing(run_dir):
        if state.personal.name != saved.state.personal.name:
            (run_dir / saved.state.personal.name).unlink(missing_ok=True)
        (run_dir / masks_of(saved.state.round)).unlink(missing_ok=True)
    return new


def chained_record(sha256: str, line: bytes) -> str:
    """Returns the hash of a log after one more line: it covers the hash of the lines before."""
    return hashlib.sha256(sha256.encode() + line).hexdigest()


def finish(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Writes SHA256SUMS of all files and summary.json, whose presence says that the run is finished."""
    data = (json.dumps(summary, indent=1) + "\n").encode()
    present = sorted(path.name for kind in (PERSONAL, MASKS) for path in run_dir.glob(kind))
    names = [CONFIG, MANIFEST, RECORDS, TIMINGS, STATE, *present]
    with writing(run_dir):
        sums = {name: _sha256(run_dir / name) for name in names}
    write_whole(run_dir / SUMS, _sums({**sums, SUMMARY: hashlib.sha256(data).hexdigest()}))
    write_whole(run_dir / SUMMARY, data)


def load(run_dir: Path, config_hash: str) -> Saved:
    """Returns the last finished round's checkpoint, everything checked, and then removes what a killed process wrote after it.

    Raises CheckpointError when the folder is damaged or belongs to another configuration.
    """
    check(run_dir)
    if is_pruned(run_dir):
        raise CheckpointError(f"{run_dir}: it is finished and its checkpoint was pruned")
    saved = read_state(run_dir)
    if saved.config_hash != config_hash:
        raise CheckpointError(f"{run_dir / STATE}: belongs to configuration {saved.config_hash}, not to {config_hash}")
    personal, masks = read_personal(run_dir, saved.state.personal), read_masks(run_dir, saved)
    state = replace(saved.state, personal=personal, masks=masks)
    kept = {log: _lines(run_dir / log, saved) for log in (RECORDS, TIMINGS)}
    for log, lines in kept.items():
        size = sum(map(len, lines))
        if (run_dir / log).stat().st_size > size:
            with writing(run_dir / log):
                os.truncate(run_dir / log, size)
    size = state.personal.stored.nbytes
    for path in [path for path in run_dir.glob(MASKS) if path.name != masks_of(state.round)]:
        with writing(path):
            path.unlink()
    for path in run_dir.glob(PERSONAL):
        with writing(path):
            if path.name != state.personal.name or not size:
                path.unlink()
            elif path.stat().st_size > size:
                os.truncate(path, size)
    return replace(saved, state=state)


def read_state(run_dir: Path) -> Saved:
    """Returns the last finished round's checkpoint without its stored personal rows; raises CheckpointError when it is damaged."""
    return decode(read_bytes(run_dir / STATE, MAX_BYTES, CheckpointError), str(run_dir / STATE))


def drop_checkpoint(run_dir: Path) -> None:
    """Removes a finished run's checkpoint, which only more rounds would need; what stays is checked against SHA256SUMS as before."""
    check(run_dir)
    text = (run_dir / SUMS).read_text()
    kept = [line for line in text.splitlines() if not _is_checkpoint(line.partition("  ")[2])]
    write_whole(run_dir / SUMS, "".join(f"{line}\n" for line in kept).encode())
    with writing(run_dir):
        for path in run_dir.iterdir():
            if _is_checkpoint(path.name):
                path.unlink()


def _is_checkpoint(name: str) -> bool:
    return name == STATE or re.fullmatch(r"personal-\d+\.f32|masks-\d+\.safetensors", name) is not None


def checkpoint_files(run_dir: Path) -> list[Path]:
    """Returns the files that a run's checkpoint is made of."""
    return sorted(path for path in run_dir.iterdir() if _is_checkpoint(path.name))


def is_pruned(run_dir: Path) -> bool:
    """Whether a run is finished and its checkpoint was removed."""
    return (run_dir / SUMMARY).exists() and not (run_dir / STATE).exists()


def read_whole_state(run_dir: Path) -> State:
    """Returns the last finished round's state with its personal rows and masks, checked; changes nothing. Raises CheckpointError."""
    saved = read_state(run_dir)
    personal, masks = read_personal(run_dir, saved.state.personal), read_masks(run_dir, saved)
    return replace(saved.state, personal=personal, masks=masks)


def read_records(run_dir: Path) -> list[RoundRecord]:
    """Returns the records of the finished rounds; raises CheckpointError when they are not those that the checkpoint goes with."""
    if is_pruned(run_dir):
        check(run_dir, RECORDS)
        lines = read_bytes(run_dir / RECORDS, MAX_BYTES, CheckpointError).splitlines()
    else:
        lines = _lines(run_dir / RECORDS, read_state(run_dir))
    records = []
    for number, line in enumerate(lines, start=1):
        record = parse_record(json.loads(line))
        if record is None:
            raise CheckpointError(f"{run_dir / RECORDS}: line {number} is damaged (not the record of a round)")
        records.append(record)
    return records


def check(run_dir: Path, *names: str) -> None:
    """Checks files against SHA256SUMS: those named, or all of a finished run, or config.yaml and manifest.json before it is finished.

    Raises CheckpointError naming the first that is damaged, and for a link: what is written to it would go elsewhere.
    """
    try:
        for place in (run_dir, run_dir / "report", run_dir / INPUTS):
            for entry in os.scandir(place) if place.is_dir() or place == run_dir else ():
                if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                    raise CheckpointError(
                        f"{entry.path}: a link or a device, and not a plain file: nothing is read or written there"
                    )
    except OSError as error:
        raise CheckpointError(f"{run_dir}: {error.strerror}; a run folder is expected") from None
    text = read_bytes(run_dir / SUMS, 10_000, CheckpointError).decode(errors="replace")
    sums = {name: sha256 for sha256, _, name in (line.partition("  ") for line in text.splitlines())}
    whole = [RECORDS, TIMINGS, *([] if is_pruned(run_dir) else [STATE]), SUMMARY]
    least = [CONFIG, MANIFEST, *(whole if (run_dir / SUMMARY).exists() else [])]
    if _sums(sums) != text.encode() or not {*least} <= sums.keys():
        raise CheckpointError(f"{run_dir / SUMS}: damaged")
    for name in names or (sums if SUMMARY in least else least):
        if re.fullmatch(PLAIN_NAME, name) is None:
            raise CheckpointError(f"{run_dir / SUMS}: damaged (no file of a run is called {name!r})")
        try:
            found = _sha256(run_dir / name)
        except OSError as error:
            raise CheckpointError(f"{run_dir / name}: {error.strerror}") from None
        if found != sums.get(name):
            raise CheckpointError(f"{run_dir / name}: damaged (its content does not match its checksum in {SUMS})")


def _sums(sums: Mapping[str, str]) -> bytes:
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()).encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_finished(run_dir: Path) -> bool:
    """Whether the run has had its last round: its summary is there, is what SHA256SUMS says, and is of all planned rounds.

    Raises CheckpointError when there is a summary that the run has not written.
    """
    summary = read_summary(run_dir)
    if summary is None:
        return False
    check(run_dir, MANIFEST)
    planned = read_json(run_dir / MANIFEST, CheckpointError).get("config", {}).get("rounds")
    if summary["rounds"] != planned:
        raise CheckpointError(f"{run_dir / SUMMARY}: damaged (of {summary['rounds']} rounds, {planned} are planned)")
    return True


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """Returns summary.json, None while the run is unfinished; raises CheckpointError when it is damaged."""
    if not (run_dir / SUMMARY).exists():
        return None
    check(run_dir, SUMMARY)
    summary = read_json(run_dir / SUMMARY, CheckpointError)
    if not fits(
        summary, {"state_sha256": str, "rounds": int, "final_accuracy": float, "time_to_target_s": (float, None)}
    ):
        raise CheckpointError(f"{run_dir / SUMMARY}: damaged (not the summary of a run)")
    return summary


def _lines(log: Path, saved: Saved) -> list[bytes]:
    """Returns the lines of the finished rounds, which must all be there; records must be those that the checkpoint goes with."""
    rounds, records = saved.state.round, ""
    lines = [line + b"\n" for line in read_bytes(log, MAX_BYTES, CheckpointError).split(b"\n")[:-1]]
    for number, line in enumerate(lines[:rounds], start=1):
        try:
            intact = parse_json(line)["round"] == number
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise CheckpointError(f"{log}: line {number} is damaged")
        records = chained_record(records, line)
    if len(lines) < rounds:
        raise CheckpointError(f"{log}: has {len(lines)} rounds, the checkpoint {rounds}")
    if log.name == RECORDS and records != saved.records:
        raise CheckpointError(f"{log}: damaged (its content does not match its checksum)")
    return lines[:rounds]
