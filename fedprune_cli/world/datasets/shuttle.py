"""What sensors of a space shuttle read, inside Debian's package r-cran-mlbench, in R's own format."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from fedprune_cli.errors import DataError
from fedprune_cli.store.files import read_bytes
from fedprune_cli.world.datasets.arrivals import DebianPackage, reason, unpack
from fedprune_cli.world.datasets.dataset import Dataset, Source, check_limit, number_dataset
from fedprune_cli.world.datasets.packages import MAX_BYTES, data_folder

MLBENCH = DebianPackage("r-cran-mlbench", "usr/lib/R/site-library/mlbench/data", "Shuttle.rda")
SHA256 = "5b1db218b76a47c83f575f1ff38d7a7d36e569b0e27d8bf4aa92eae6c0bcb826"


@dataclass(frozen=True)
class Shuttle:
    """UCI's Statlog Shuttle: 58,000 readings of nine sensors; the class is the state of the radiators, in 79 of 100 the same.

    No reading is in it twice. The package is installed, unpacked in the folder, or downloaded to it by apt-get, which needs no rights.
    """

    name: str
    root: str | None
    limit: int | None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def load(self) -> Dataset:
        rdata = _reader(self.name)
        content = self._content()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file does not say its encoding, and is ASCII
            frame = rdata.conversion.convert(rdata.parser.parse_data(content))["Shuttle"]
        state = frame["Class"]
        inputs = frame.drop(columns="Class").to_numpy(np.float32)[: self.limit]
        names = tuple(str(name) for name in state.cat.categories)
        labels = state.cat.codes.to_numpy(np.int64)[: self.limit]
        return number_dataset(self.name, inputs[:, :, None, None], labels, len(names), Source(label_names=names))

    def _places(self) -> Iterator[Path]:
        """Yields where the file may be, in order: in the folder, as the package has it there, and where Debian installs it."""
        folder = data_folder(self.root)
        yield folder / MLBENCH.pattern
        yield folder / MLBENCH.name / MLBENCH.pattern
        yield folder / MLBENCH.folder / MLBENCH.pattern
        yield Path("/") / MLBENCH.folder / MLBENCH.pattern

    def _content(self) -> bytes:
        """Returns the file's content, brought here if need be; raises DataError."""
        path = next((path for path in self._places() if path.is_file()), None)
        if path is None:
            folder = data_folder(self.root)
            path = folder / MLBENCH.name / MLBENCH.pattern
            try:
                unpack(MLBENCH, folder, MLBENCH.name)
            except (OSError, subprocess.SubprocessError) as error:
                raise DataError(
                    f"{self.name} cannot be had. Tried {folder}: no {MLBENCH.pattern}; Debian package {MLBENCH.name}: {reason(error)}. "
                    f"Put {MLBENCH.pattern} of R's package mlbench into a folder and give it as data.root=DIR"
                ) from None
        content = read_bytes(path, MAX_BYTES, DataError)
        if (digest := hashlib.sha256(content).hexdigest()) != SHA256:
            raise DataError(f"{path}: damaged, or another version: SHA-256 {digest}, must be {SHA256}")
        return content


def _reader(name: str) -> ModuleType:
    """Returns the package that reads R's files; raises DataError where it is missing."""
    try:
        return importlib.import_module("rdata")
    except ImportError:
        raise DataError(
            f"{name} cannot be had: rdata, which reads R's files, is not installed: pip install 'fedprune[data]'"
        ) from None
