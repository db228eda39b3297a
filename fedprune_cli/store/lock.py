"""Who writes a run: a lock on its folder, which the system takes back when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fedprune_cli.errors import CheckpointError

LOCK_TRIES = 5


@contextlib.contextmanager
def locked(run_dir: Path, *, wait: bool = False, what: str = "this run") -> Iterator[None]:
    """Holds the folder for this process; raises CheckpointError when it is not there, or another one has it and `wait` is not wanted.

    what: what the other one writes, in words.
    """
    try:
        descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"{run_dir}: {error.strerror}; a run folder is expected") from None
    try:
        try:
            _lock(descriptor, wait=wait)
        except BlockingIOError:
            raise CheckpointError(f"{run_dir}: another process is writing {what}") from None
        except OSError as error:
            raise CheckpointError(f"{run_dir}: cannot be locked ({error.strerror})") from None
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> None:
    """Takes the lock; who only looks whether a run is held has it for a moment, and so one refusal is not yet believed."""
    if not wait:
        for _ in range(LOCK_TRIES - 1):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.02)
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def is_held(run_dir: Path) -> bool:
    """Whether a process is writing the run now."""
    try:
        descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{run_dir}: {error.strerror}; a run folder is expected") from None
    return False
