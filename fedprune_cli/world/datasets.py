"""Real datasets as arrays. Training and test files are pooled: every device makes its own split."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from fedprune_cli.errors import DataError, require
from fedprune_cli.state import Array

DOWNLOAD_TIMEOUT_S = 10.0  # without an answer; a slow answer may take as long as it takes


@dataclass(frozen=True)
class Dataset:
    """images: uint8 [N, C, H, W]; labels: int64 [N]; the network sees (images / scale - mean) / std, by channel."""

    name: str
    images: Array
    labels: Array
    num_classes: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str


class DatasetConfig(Protocol):
    """A dataset plug-in: a frozen dataclass whose fields are its configuration."""

    name: str

    def load(self) -> Dataset:
        """Returns the data; raises DataError saying what was tried and how to get it."""


def _dataset(name: str, images: Array, labels: Array, num_classes: int, scale: float, limit: int | None) -> Dataset:
    images, labels = np.ascontiguousarray(images[:limit]), np.ascontiguousarray(labels[:limit], dtype=np.int64)
    pixels = [np.bincount(images[:, channel].ravel(), minlength=256) for channel in range(images.shape[1])]
    levels = np.arange(256) / scale
    mean = [float(levels @ count / count.sum()) for count in pixels]
    std = [float(np.sqrt((levels - m) ** 2 @ count / count.sum())) for count, m in zip(pixels, mean, strict=True)]
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return Dataset(name, images, labels, num_classes, scale, tuple(mean), tuple(s or 1.0 for s in std), digest)


@dataclass(frozen=True)
class Digits:
    """scikit-learn's embedded 1,797 handwritten digits, 8x8 pixels of 17 grey levels (UCI, test part of Optdigits)."""

    name: str
    limit: int | None

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, "limit", self.limit, ">= 1 or null")

    def load(self) -> Dataset:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return _dataset(self.name, digits.images.astype(np.uint8)[:, None], digits.target, 10, 16.0, self.limit)


@dataclass(frozen=True)
class Downloaded:
    """A dataset that torchvision reads from `root`, and downloads to it where the network allows."""

    name: str
    root: str | None
    limit: int | None
    torchvision_name: ClassVar[str]
    num_classes: ClassVar[int] = 10
    files: ClassVar[str]  # what a person has to put into `root`

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, "limit", self.limit, ">= 1 or null")

    @property
    def folder(self) -> Path:
        """Where the files are looked for and kept."""
        return Path(self.root or os.environ.get("FEDPRUNE_DATA") or Path.home() / ".cache" / "fedprune")

    def sources(self) -> list[tuple[str, Callable[[], None]]]:
        """Returns the ways to bring the files into the folder, in order, each with the name it has in an error."""
        return [("download", self._download)]

    def load(self) -> Dataset:
        tried = []
        if (found := self._read()) is None:
            tried.append(f"{self.folder}: no {self.torchvision_name} files")
            for name, bring in self.sources():
                try:
                    bring()
                except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                    tried.append(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
                    continue
                if (found := self._read()) is not None:
                    break
            else:
                raise DataError(
                    f"{self.name} cannot be had. Tried {'; '.join(tried)}. Put {self.files} into a folder and give it as data.root=DIR"
                )
        assert found is not None
        return _dataset(self.name, *found, self.num_classes, 255.0, self.limit)

    def _read(self) -> tuple[Array, Array] | None:
        """Returns images [N, C, H, W] and labels of both files, or None when they are not there; DataError when they are damaged."""
        dataset = self._torchvision()
        try:
            halves = [dataset(root=str(self.folder), train=train, download=False) for train in (True, False)]
        except RuntimeError as error:
            if "not found" in str(error):
                return None
            raise self._damaged(error) from None
        except Exception as error:
            raise self._damaged(error) from None
        images = np.concatenate([np.asarray(half.data) for half in halves])
        labels = np.concatenate([np.asarray(half.targets) for half in halves])
        if len(images) != len(labels):
            raise self._damaged(ValueError(f"{len(images)} images, {len(labels)} labels"))
        return (images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)), labels

    def _damaged(self, error: Exception) -> DataError:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        return DataError(
            f"{self.folder}: damaged or truncated {self.torchvision_name} files ({reason}); delete them, or give others as data.root=DIR"
        )

    def _torchvision(self) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.torchvision_name)

    def _download(self) -> None:
        """torchvision downloads into a folder beside, which takes the place of the real one when it is whole."""
        with (
            _staged(self.folder) as stage,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
            try:
                self._torchvision()(root=str(stage), train=True, download=True)
            except Exception as error:
                raise OSError(f"{type(error).__name__}: {error}") from None
            finally:
                socket.setdefaulttimeout(timeout)


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yields an empty folder; what it holds at the end moves into `folder`, so that nobody ever sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as stage:
        yield Path(stage)
        for entry in Path(stage).iterdir():
            target = folder / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            entry.replace(target)


@dataclass(frozen=True)
class Mnist(Downloaded):
    """Also reads the IDX files, plain or .gz, lying in `root` itself or anywhere below it."""

    torchvision_name: ClassVar[str] = "MNIST"
    files: ClassVar[str] = (
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (plain or .gz)"
    )

    def _read(self) -> tuple[Array, Array] | None:
        if not (self.folder / self.torchvision_name / "raw").is_dir():
            return self._read_idx() if self.root else None
        return super()._read()

    def _read_idx(self) -> tuple[Array, Array] | None:
        """Gives torchvision the loose files of `root` in the layout that it wants, in a passing folder."""
        names = [name.split()[0] for name in self.files.removesuffix(" (plain or .gz)").split(", ")]
        found = {
            name: path
            for name in names
            for path in sorted(self.folder.rglob(f"{name}*"))
            if path.name in (name, f"{name}.gz")
        }
        if len(found) < len(names):
            return None
        with tempfile.TemporaryDirectory() as stage:
            raw = Path(stage) / self.torchvision_name / "raw"
            raw.mkdir(parents=True)
            for name, path in found.items():
                try:
                    _copy_plain(path, raw / name)
                except (OSError, EOFError) as error:
                    raise DataError(f"{path}: damaged or truncated ({error})") from None
            try:
                return type(self)(self.name, stage, self.limit)._read()
            except DataError as error:
                raise DataError(str(error).replace(stage, str(self.folder))) from None


def _copy_plain(source: Path, target: Path) -> None:
    with gzip.open(source) if source.suffix == ".gz" else source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write)


@dataclass(frozen=True)
class FashionMnist(Mnist):
    """Fashion-MNIST; where apt works, from Debian's package dataset-fashion-mnist, which needs no rights to unpack."""

    torchvision_name: ClassVar[str] = "FashionMNIST"

    def sources(self) -> list[tuple[str, Callable[[], None]]]:
        return [("Debian package dataset-fashion-mnist", self._unpack_debian), *super().sources()]

    def _unpack_debian(self) -> None:
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise OSError("no apt-get here")
        with _staged(self.folder) as stage, tempfile.TemporaryDirectory() as work:
            for command in (
                ["apt-get", "download", "dataset-fashion-mnist"],
                ["sh", "-c", "dpkg -x dataset-fashion-mnist_*.deb ."],
            ):
                done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300, check=False)
                if done.returncode:
                    raise OSError((done.stderr.strip().splitlines() or ["failed"])[-1])
            raw = stage / self.torchvision_name / "raw"
            raw.mkdir(parents=True)
            for path in (Path(work) / "usr/share/datasets/fashion-mnist").glob("*-ubyte.gz"):
                _copy_plain(path, raw / path.stem)


@dataclass(frozen=True)
class Cifar10(Downloaded):
    """CIFAR-10."""

    torchvision_name: ClassVar[str] = "CIFAR10"
    files: ClassVar[str] = "the folder cifar-10-batches-py"


@dataclass(frozen=True)
class Cifar100(Downloaded):
    """CIFAR-100."""

    torchvision_name: ClassVar[str] = "CIFAR100"
    num_classes: ClassVar[int] = 100
    files: ClassVar[str] = "the folder cifar-100-python"


DATASETS: dict[str, type[DatasetConfig]] = {
    "digits": Digits,
    "fmnist": FashionMnist,
    "mnist": Mnist,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
}
