"""How files come into the data folder: whole or not at all, each with its checksum beside it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUM_SUFFIX = ".sha256"  # of a file beside each that was brought here, with its SHA-256: a disk may change a pixel


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian that holds a dataset: its name, the folder within it, and the files there that are wanted."""

    name: str
    folder: str
    pattern: str


def unpack(package: DebianPackage, folder: Path, target: str) -> None:
    """Brings the package's files into `target` within the folder, unpacked where they are .gz, which needs no rights; raises OSError."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise OSError("no apt-get here")
    with staged(folder) as stage, tempfile.TemporaryDirectory() as work:
        for command in (
            ["apt-get", "download", package.name],
            ["sh", "-c", f"dpkg -x {package.name}_*.deb ."],
        ):
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                raise OSError((done.stderr.strip().splitlines() or ["failed"])[-1])
        place = stage / target
        place.mkdir(parents=True)
        for path in (Path(work) / package.folder).glob(package.pattern):
            if path.suffix == ".gz":
                with gzip.open(path) as packed, (place / path.stem).open("wb") as plain:
                    shutil.copyfileobj(packed, plain)
            else:
                shutil.copyfile(path, place / path.name)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields an empty folder; its files move into `folder` at the end: nobody sees half a file, and no other file is touched."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as stage:
        yield Path(stage)
        for path in [path for path in Path(stage).rglob("*") if path.is_file()]:
            target = folder / path.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            target.with_name(target.name + SUM_SUFFIX).write_text(f"{digest}\n")
            path.replace(target)


def reason(error: Exception) -> str:
    """Returns the last line of an error's text: torchvision's first one has no reason in it."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
