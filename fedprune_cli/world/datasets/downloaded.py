"""Datasets that torchvision knows. Training and test files are pooled: every device makes its own split."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import math
import socket
import subprocess
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedprune_cli.errors import DataError, require
from fedprune_cli.store.files import read_bytes
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.arrivals import SUM_SUFFIX, DebianPackage, reason, staged, unpack
from fedprune_cli.world.datasets.dataset import Dataset, check_limit, image_dataset
from fedprune_cli.world.datasets.packages import data_folder

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

MAX_BYTES = 2**30  # of a file, unpacked
DOWNLOAD_TIMEOUT_S = 10.0  # without an answer; a slow answer may take as long as it takes


@dataclass(frozen=True)
class _Downloaded(ABC):
    """A dataset that torchvision reads from `root`, and downloads to it where the network allows.

    torchvision_name: of its class there; calls: its arguments, once for each download; files: what a person has to put into `root`;
    package: where it comes from first, if any.
    """

    name: str
    root: str | None
    limit: int | None
    torchvision_name: ClassVar[str]
    calls: ClassVar[tuple[Mapping[str, object], ...]] = ({"train": True},)
    files: ClassVar[str]
    package: ClassVar[DebianPackage | None] = None

    def __post_init__(self) -> None:
        check_limit(self.limit)
        require(self._num_classes >= 2, "name", self.name, "of two classes or more")

    @property
    def folder(self) -> Path:
        """Where the files are looked for and kept."""
        return data_folder(self.root)

    def load(self) -> Dataset:
        images, labels = self._read() or self._bring()
        if len(images) != len(labels):
            raise DataError(f"{self.folder}: damaged {self.name} files: {len(images)} images, {len(labels)} labels")
        classes = self._num_classes
        if (bad := np.flatnonzero((labels < 0) | (labels >= classes))).size:
            raise DataError(
                f"{self.folder}: damaged {self.name} files: sample {bad[0]} has label {labels[bad[0]]}, "
                f"must be in 0..{classes - 1}"
            )
        return image_dataset(self.name, images[: self.limit], labels[: self.limit], classes, 255.0)

    @property
    @abstractmethod
    def _num_classes(self) -> int:
        """How many classes there are; raises ConfigError for a configuration that names none of the dataset's kinds."""

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
        unpack(package, self.folder, f"{self.torchvision_name}/raw")

    def _download(self) -> None:
        """torchvision downloads into a folder beside; its files move to the real one when all are whole."""
        with (
            staged(self.folder) as stage,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
            try:
                from torchvision import datasets

                for arguments in self.calls:
                    getattr(datasets, self.torchvision_name)(root=str(stage), download=True, **arguments)
            except Exception as error:
                raise OSError(reason(error)) from None
            finally:
                socket.setdefaulttimeout(timeout)


MNIST_PARTS = ("train-images-idx3", "t10k-images-idx3", "train-labels-idx1", "t10k-labels-idx1")


@dataclass(frozen=True)
class _IdxFiles(_Downloaded):
    """IDX files, plain or .gz, in `root`/NAME/raw (torchvision's layout), `root`/raw, a given `root` itself, or as a package has them."""

    files: ClassVar[str] = ", ".join(f"{part}-ubyte" for part in MNIST_PARTS) + " (plain or .gz)"

    @property
    def _num_classes(self) -> int:
        return 10

    def _places(self) -> Iterator[Path]:
        """Yields the folders that are looked into, in order. Loose files count only in a folder that the user named."""
        yield self.folder / self.torchvision_name / "raw"
        if self.root:
            yield self.folder / "raw"
            yield self.folder
        if self.package:
            yield self.folder / self.package.folder

    def _read(self) -> tuple[Array, Array] | None:
        return _read_idx_files(self._places(), MNIST_PARTS)


def _read_idx_files(places: Iterable[Path], parts: Sequence[str]) -> tuple[Array, Array] | None:
    """Returns images and labels of the first of the places that has all four parts, None where none has; raises DataError."""
    for place in places:
        paths = [_plain_or_gz(place / f"{part}-ubyte") for part in parts]
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
    package: ClassVar[DebianPackage | None] = DebianPackage(
        "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist", "*-ubyte.gz"
    )


@dataclass(frozen=True)
class _CifarBatches(_Downloaded):
    """CIFAR in torchvision's layout. Its files are pickles, so they are opened only when their published digests match."""

    num_classes: ClassVar[int] = 10

    @property
    def _num_classes(self) -> int:
        return self.num_classes

    def _read(self) -> tuple[Array, Array] | None:
        from torchvision import datasets

        dataset: type[CIFAR10] = getattr(datasets, self.torchvision_name)
        listed = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
        paths = [self.folder / dataset.base_folder / name for name, _ in listed]
        if not all(path.is_file() for path in paths):
            return None
        for path, (_, expected) in zip(paths, listed, strict=True):
            _read_known(path, expected)
        halves = [dataset(root=str(self.folder), train=train, download=False) for train in (True, False)]
        images = np.concatenate([half.data for half in halves]).transpose(0, 3, 1, 2)
        return images, np.concatenate([half.targets for half in halves])


def _read_known(path: Path, md5: str) -> bytes:
    """Returns a file's content when it has the published MD5; raises DataError."""
    data = read_bytes(path, MAX_BYTES, DataError)
    if (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != md5:
        raise DataError(f"{path}: damaged or truncated: MD5 {found} of {len(data)} bytes, must be {md5}")
    return data


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


@dataclass(frozen=True)
class Emnist(_Downloaded):
    """EMNIST, handwritten digits and letters in IDX files: `balanced` has 131,600 in 47 classes, `byclass` 814,255 in 62.

    balanced takes letters whose capital looks like the small one for one class. The files do not say who wrote a character. They hold
    their images on their sides; here they stand upright.
    """

    split: str
    torchvision_name: ClassVar[str] = "EMNIST"
    calls: ClassVar[tuple[Mapping[str, object], ...]] = ({"split": "balanced"},)  # one archive has all
    files: ClassVar[str] = "emnist-balanced-train-images-idx3-ubyte and the three like it, or byclass (plain or .gz)"

    @property
    def _num_classes(self) -> int:
        require(self.split in EMNIST_CLASSES, "split", self.split, "balanced or byclass")
        return EMNIST_CLASSES[self.split]

    def _read(self) -> tuple[Array, Array] | None:
        halves = ("train", "test")
        parts = [f"emnist-{self.split}-{half}-{what}" for what in ("images-idx3", "labels-idx1") for half in halves]
        found = _read_idx_files((self.folder / "EMNIST" / "raw", self.folder), parts)
        return found and (found[0].transpose(0, 1, 3, 2), found[1])


EMNIST_CLASSES = {"balanced": 47, "byclass": 62}


@dataclass(frozen=True)
class Svhn(_Downloaded):
    """Street View House Numbers: 99,289 digits of 32x32 coloured pixels, in MATLAB files whose published digests must match."""

    torchvision_name: ClassVar[str] = "SVHN"
    calls: ClassVar[tuple[Mapping[str, object], ...]] = ({"split": "train"}, {"split": "test"})
    files: ClassVar[str] = "train_32x32.mat and test_32x32.mat"

    @property
    def _num_classes(self) -> int:
        return 10

    def _read(self) -> tuple[Array, Array] | None:
        from scipy.io import loadmat
        from torchvision.datasets import SVHN

        listed = [SVHN.split_list[half] for half in ("train", "test")]
        paths = [self.folder / name for _, name, _ in listed]
        if not all(path.is_file() for path in paths):
            return None
        halves = [loadmat(io.BytesIO(_read_known(path, md5))) for path, (_, _, md5) in zip(paths, listed, strict=True)]
        images = np.concatenate([half["X"].transpose(3, 2, 0, 1) for half in halves])
        return images, np.concatenate([half["y"].reshape(-1) for half in halves]).astype(np.int64) % 10
