"""Files written whole or not at all, and the system's refusal in one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fedprune_cli.errors import OutputError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write into an OutputError of one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or path}: {error.strerror}") from None
    except ValueError as error:  # a NUL or half a character in the name
        raise OutputError(f"cannot write {str(path)!r}: no file can have this name ({error})") from None


def write_whole(path: Path, data: bytes) -> None:
    """Writes the file whole or leaves the old one."""
    temporary = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_durable(path: Path, data: bytes) -> None:
    """As `write_whole`, and so that no power cut brings the old file back or takes the folder: what is said next rests on it."""
    write_whole(path, data)
    for place in (path.parent, path.parent.parent):
        with writing(place):
            folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def private_folder(path: Path) -> None:
    """Makes a folder that its owner alone can look into, also of one that was there before."""
    with writing(path):
        path.mkdir(exist_ok=True)
        path.chmod(0o700)
