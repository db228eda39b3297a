"""Files that a run reads. They are part of its identity by their content and not by their path, so that no result can be stale."""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from fedprune_cli.errors import CheckpointError, DataError, FedpruneError
from fedprune_cli.store.files import read_digest
from fedprune_cli.world.datasets import DatasetConfig

TABLES = ("data.file", "devices.file", "channel.file")  # keys of the configuration that name a file
DATA, ROOT = "data.file", "data.root"
MAX_KEPT = 16 * 2**20  # bytes of a file of which a run folder keeps a copy
MAX_FILES = 2000  # of a data folder, up to which a look at sizes and times tells whether to read it again


@dataclass(frozen=True)
class Input:
    """A file that a run reads: the key that names it, where it is, the SHA-256 of its content, and the content unless it is large."""

    key: str
    path: Path
    sha256: str
    content: bytes | None

    @property
    def kept_as(self) -> str | None:
        """The name of its copy in a run folder, None for one that is too large to be kept."""
        return None if self.content is None else copy_name(self.key, self.path)


def copy_name(key: str, path: Path) -> str:
    """Returns how a run folder calls its copy of the file that a key names: its ending says what it is."""
    return f"{key}{path.suffix.lower()}" if key == DATA else f"{key}.csv"


def read_input(key: str, path: str, error: type[FedpruneError] = DataError) -> Input:
    """Returns the input that a key of the configuration names; raises `error` when it cannot be read."""
    found = read_digest(Path(path), MAX_KEPT, error)
    return Input(key, Path(path), found.sha256, found.content)


def dataset_sha256(data: DatasetConfig) -> str | None:
    """Returns the SHA-256 of what a dataset reads from files that a user may edit, None for one that is part of a package.

    Raises DataError when it cannot be had. A folder whose files have the sizes and times of the last look is not read again.
    """
    folder = getattr(data, "folder", None)
    return None if folder is None else _sha256_of(_Look(data, _stamp(folder)))


@dataclass(frozen=True)
class _Look:
    """A dataset, and its folder's files as they were at one moment."""

    data: DatasetConfig
    stamp: object


@functools.lru_cache(maxsize=8)
def _sha256_of(look: _Look) -> str:
    return look.data.load().sha256


def _stamp(folder: Path) -> object:
    """Returns the sizes and times of a folder's files; of one with too many, or that changes meanwhile, what equals nothing."""
    walked = ((Path(place) / name for name in sorted(names)) for place, _, names in os.walk(folder))
    files = list(itertools.islice(itertools.chain.from_iterable(walked), MAX_FILES + 1))
    if len(files) > MAX_FILES:
        return object()
    seen = []
    for path in sorted(files):
        try:
            status = path.stat()
        except OSError:  # another process brings the files, and moves them while this one looks
            return object()
        seen.append((str(path), status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(seen)


def edited(what: object, now: str, then: str) -> CheckpointError:
    """Returns the error for something that a run was made with and that has another content by now."""
    return CheckpointError(
        f"{what}: edited since the run was made: SHA-256 {now} now, {then} then; put the old content back, or make a new run"
    )
