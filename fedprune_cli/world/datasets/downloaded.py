"""Datasets that torchvision knows. Training and test files are pooled: every device makes its own split."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import math
import os
import shutil
import socket
import subprocess
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedprune_cli.errors import DataError, require
from fedprune_cli.store.files import read_bytes
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.dataset import Dataset, image_dataset

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

MAX_BYTES = 2**30  # of a file, unpacked
SUM_SUFFIX = ".sha256"  # of a file beside each that was brought here, with its SHA-256: a disk may change a pixel
DOWNLOAD_TIMEOUT_S = 10.0  # without an answer; a slow answer may take as long as it takes


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian that holds a dataset: its name, and the folder within it."""

    name: str
    folder: str


@dataclass(frozen=True)
class _Downloaded(ABC):
    """A dataset that torchvision reads from `root`, and downloads to it where the network allows.

    torchvision_name: of its class there; files: what a person has to put into `root`; package: where it comes from first, if any.
    """

    name: str
    root: str | None
    limit: int | None
    torchvision_name: ClassVar[str]
    num_classes: ClassVar[int] = 10
    files: ClassVar[str]
    package: ClassVar[DebianPackage | None] = None

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, "limit", self.limit, ">= 1 or null")

    @property
    def folder(self) -> Path:
        """Where the files are looked for and kept."""
        return Path(self.root or os.environ.get("FEDPRUNE_DATA") or Path.home() / ".cache" / "fedprune")

    def load(self) -> Dataset:
        images, labels = self._read() or self._bring()
        if len(images) != len(labels):
            raise DataError(f"{self.folder}: damaged {self.name} files: {len(images)} images, {len(labels)} labels")
        if (bad := np.flatnonzero((labels < 0) | (labels >= self.num_classes))).size:
            raise DataError(
                f"{self.folder}: damaged {self.name} files: sample {bad[0]} has label {labels[bad[0]]}, "
                f"must be in 0..{self.num_classes - 1}"
            )
        return image_dataset(self.name, images[: self.limit], labels[: self.limit], self.num_classes, 255.0)

    @abstractmethod
    def _read(self) -> tuple[Array, Array] | None:
        """Returns images uint8 [N, C, H, W] and labels [N] of both files, or None when they are not there; DataError when damaged."""

    def _bring(self) -> tuple[Array, Array]:
        """Returns what `_read` does once the files are here; raises DataError saying which ways to bring them were tried."""
        tried = [f"{self.folder}: no {self.torchvision_name} files"]
        for name, bring in self._sources():
            try:
                bring()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                tried.append(f"{name}: {reason(error)}")
                continue
            if (found := self._read()) is not None:
                return found
        raise DataError(
            f"{self.name} cannot be had. Tried {'; '.join(tried)}. Put {self.files} into a folder and give it as data.root=DIR"
        )

    def _sources(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yields the ways to bring the files into the folder, in order, each with the name it has in an error."""
        if self.package:
            yield f"Debian package {self.package.name}", functools.partial(self._unpack, self.package)
        yield "download", self._download

    def _unpack(self, package: DebianPackage) -> None:
        """Takes the files out of the package, which needs no rights to unpack."""
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise OSError("no apt-get here")
        with _staged(self.folder) as stage, tempfile.TemporaryDirectory() as work:
            for command in (
                ["apt-get", "download", package.name],
                ["sh", "-c", f"dpkg -x {package.name}_*.deb ."],
            ):
                done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300, check=False)
                if done.returncode:
                    raise OSError((done.stderr.strip().splitlines() or ["failed"])[-1])
            raw = stage / self.torchvision_name / "raw"
            raw.mkdir(parents=True)
            for path in (Path(work) / package.folder).glob("*-ubyte.gz"):
                with gzip.open(path) as packed, (raw / path.stem).open("wb") as plain:
                    shutil.copyfileobj(packed, plain)

    def _download(self) -> None:
        """torchvision downloads into a folder beside; its files move to the real one when all are whole."""
        with (
            _staged(self.folder) as stage,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
            try:
                from torchvision import datasets

                getattr(datasets, self.torchvision_name)(root=str(stage), train=True, download=True)
            except Exception as error:
                raise OSError(reason(error)) from None
            finally:
                socket.setdefaulttimeout(timeout)


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
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


@dataclass(frozen=True)
class _IdxFiles(_Downloaded):
    """IDX files, plain or .gz, in `root`/NAME/raw (torchvision's layout), `root`/raw, a given `root` itself, or as a package has them."""

    parts: ClassVar[tuple[str, ...]] = (
        "train-images-idx3",
        "t10k-images-idx3",
        "train-labels-idx1",
        "t10k-labels-idx1",
    )
    files: ClassVar[str] = ", ".join(f"{part}-ubyte" for part in parts) + " (plain or .gz)"

    def _places(self) -> Iterator[Path]:
        """Yields the folders that are looked into, in order. Loose files count only in a folder that the user named."""
        yield self.folder / self.torchvision_name / "raw"
        if self.root:
            yield self.folder / "raw"
            yield self.folder
        if self.package:
            yield self.folder / self.package.folder

    def _read(self) -> tuple[Array, Array] | None:
        for place in self._places():
            paths = [_plain_or_gz(place / f"{part}-ubyte") for part in self.parts]
            if all(path.is_file() for path in paths):
                train, test, train_labels, test_labels = (
                    _read_idx(path, rank) for path, rank in zip(paths, (3, 3, 1, 1), strict=True)
                )
                if train.shape[1:] != test.shape[1:]:
                    raise DataError(f"{paths[1]}: images of {test.shape[1:]} pixels, {paths[0]} has {train.shape[1:]}")
                images = np.concatenate([train, test])[:, None]
                return images, np.concatenate([train_labels, test_labels]).astype(np.int64)
        return None


def _plain_or_gz(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _read_idx(path: Path, rank: int) -> Array:
    """Returns the bytes of an IDX file as an array of `rank` dimensions; raises DataError."""
    data = read_bytes(path, MAX_BYTES, DataError)
    beside = path.with_name(path.name + SUM_SUFFIX)
    if beside.is_file() and beside.read_text(errors="replace").strip() != hashlib.sha256(data).hexdigest():
        raise DataError(
            f"{path}: damaged: not what {beside.name} was written for; remove both to have them brought again"
        )
    try:
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(data)) as packed:
                data = packed.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or truncated ({reason(error)})") from None
    head = 4 + 4 * rank
    if data[:4] != bytes((0, 0, 8, rank)) or len(data) < head:
        raise DataError(
            f"{path}: damaged or truncated: {len(data)} bytes that begin with {data[:4].hex() or 'nothing'}, "
            f"must be at least {head} that begin with 000008{rank:02x}"
        )
    shape = [int(size) for size in np.frombuffer(data, ">u4", rank, offset=4)]
    if len(data) != head + math.prod(shape) or 0 in shape:
        raise DataError(
            f"{path}: damaged or truncated: {len(data)} bytes, must be {head + math.prod(shape)} for the shape {shape}"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


@dataclass(frozen=True)
class Mnist(_IdxFiles):
    """MNIST, handwritten digits in IDX files."""

    torchvision_name: ClassVar[str] = "MNIST"


@dataclass(frozen=True)
class FashionMnist(_IdxFiles):
    """Fashion-MNIST, pictures of clothes in IDX files; where apt works, from Debian's package."""

    torchvision_name: ClassVar[str] = "FashionMNIST"
    package: ClassVar[DebianPackage | None] = DebianPackage("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class _CifarBatches(_Downloaded):
    """CIFAR in torchvision's layout. Its files are pickles, so they are opened only when their published digests match."""

    def _read(self) -> tuple[Array, Array] | None:
        from torchvision import datasets

        dataset: type[CIFAR10] = getattr(datasets, self.torchvision_name)
        listed = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
        paths = [self.folder / dataset.base_folder / name for name, _ in listed]
        if not all(path.is_file() for path in paths):
            return None
        for path, (_, expected) in zip(paths, listed, strict=True):
            data = read_bytes(path, MAX_BYTES, DataError)
            if (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != expected:
                raise DataError(f"{path}: damaged or truncated: MD5 {found} of {len(data)} bytes, must be {expected}")
        halves = [dataset(root=str(self.folder), train=train, download=False) for train in (True, False)]
        images = np.concatenate([half.data for half in halves]).transpose(0, 3, 1, 2)
        return images, np.concatenate([half.targets for half in halves])


@dataclass(frozen=True)
class Cifar10(_CifarBatches):
    """CIFAR-10."""

    torchvision_name: ClassVar[str] = "CIFAR10"
    files: ClassVar[str] = "the folder cifar-10-batches-py"


@dataclass(frozen=True)
class Cifar100(_CifarBatches):
    """CIFAR-100 with its fine labels."""

    torchvision_name: ClassVar[str] = "CIFAR100"
    num_classes: ClassVar[int] = 100
    files: ClassVar[str] = "the folder cifar-100-python"
