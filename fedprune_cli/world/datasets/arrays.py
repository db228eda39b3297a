"""Arrays of one's own, in NumPy's .npz: inputs and labels, and whose and what for the samples are. Nothing is unpickled.

The inputs' layout is told by their dimensions, or said by `data.layout`:

    rows            [N, F]          a table of numbers              -> [N, F, 1, 1]
    images          [N, H, W]       grey images                     -> [N, 1, H, W]
                    [N, C, H, W]    images                          as they are
    channels_last   [N, H, W, C]    images as cameras write them    -> [N, C, H, W]
    series          [N, L]          windows of one axis             -> [N, 1, 1, L]
                    [N, C, L]       windows of several              -> [N, C, 1, L]

Three dimensions alone are taken for images, two for rows.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedprune_cli.errors import ConfigError, DataError, FedpruneError, require
from fedprune_cli.store.files import Plain
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.dataset import Dataset, Source, image_dataset, number_dataset
from fedprune_cli.world.datasets.levels import classes, coded, first_mixed, held_out
from fedprune_cli.world.datasets.room import check_room
from fedprune_cli.world.datasets.sheets import MAX_SIZE, nearest

LAYOUTS: dict[str, tuple[int, ...]] = {"rows": (2,), "images": (3, 4), "channels_last": (4,), "series": (2, 3)}
BY_RANK = {2: "rows", 3: "images", 4: "images"}
COLOURS = (1, 3, 4)  # channels that images have
MOST_VALUES = 2**24  # of a sample
KEYS = {"inputs": "inputs", "labels": "labels", "device": "device", "group": "group", "test": "test"}
NEEDED = ("inputs", "labels")


@dataclass(frozen=True)
class Arrays:
    """A .npz file; the fields but `file` and `layout` name the arrays in it."""

    name: str
    file: str
    inputs: str
    labels: str
    device: str
    group: str
    test: str
    layout: str | None

    def __post_init__(self) -> None:
        known = self.layout is None or self.layout in LAYOUTS
        require(known, "layout", self.layout, f"one of {', '.join(LAYOUTS)}, or null")

    def load(self) -> Dataset:
        found = _read(self.file, {key: getattr(self, key) for key in KEYS})
        labels, size = found["labels"], len(found["labels"])
        for key, array in found.items():
            if len(array) != size:
                raise DataError(f"{self.file}: {getattr(self, key)} has {len(array)} samples, {self.labels} has {size}")
        inputs = _laid_out(f"{self.file}: {self.inputs}", found["inputs"], self.layout)
        names, codes = classes(f"{self.file}: {self.labels}", _texts(f"{self.file}: {self.labels}", labels))
        source = self._source(found, names, inputs.shape)
        if inputs.dtype == np.uint8:
            return image_dataset(self.name, inputs, codes, len(names), 255.0, source)
        return number_dataset(self.name, inputs, codes, len(names), source)

    def _source(self, found: dict[str, Array], names: tuple[str, ...], shape: tuple[int, ...]) -> Source:
        texts = {
            key: _texts(f"{self.file}: {getattr(self, key)}", found[key])
            for key in ("device", "group", "test")
            if key in found
        }
        owner_names, owner = coded(texts["device"]) if "device" in texts else ((), None)
        group = coded(texts["group"])[1] if "group" in texts else None
        held = held_out(f"{self.file}: {self.test}", texts["test"]) if "test" in texts else None
        if isinstance(held, tuple):
            raise DataError(
                f"{self.file}: {self.test}[{held[0]}]={held[1]} is not allowed: must be 0 or 1, false or true, train or test"
            )
        for values, what in ((owner, "of more than one device"), (held, "both for training and for testing")):
            if group is not None and values is not None and (mixed := first_mixed(group, values)) is not None:
                raise DataError(
                    f"{self.file}: {self.group}[{mixed}]: samples of this group are {what}: near-duplicates belong together"
                )
        encoding: dict[str, Plain] = {
            "kind": "arrays",
            "inputs": self.inputs,
            "labels": self.labels,
            "layout": self.layout,
            "shape": [*shape[1:]],
        }
        return Source(owner, owner_names, held, group, names, encoding)


def _read(file: str, names: dict[str, str]) -> dict[str, Array]:
    """Returns the arrays by key; raises ConfigError for one that is not there, DataError for what cannot be read as plain arrays."""
    path = Path(file)
    try:
        if not path.is_file():
            raise DataError(f"{file}: {'not a plain file' if path.exists() else 'No such file or directory'}")
        with zipfile.ZipFile(path) as packed:
            heads = {one.removesuffix(".npy"): _head(packed, one) for one in packed.namelist() if one.endswith(".npy")}
        wanted = {key: name for key, name in names.items() if name in heads or key in NEEDED or name != KEYS[key]}
        for key, name in wanted.items():
            if name not in heads:
                raise ConfigError(f"data.{key}={name}: {file} has no such array.{nearest(name, tuple(heads))}")
            shape, dtype = heads[name]
            if (
                dtype.hasobject
                or dtype.kind not in "biufUSm" + "M" * (key not in NEEDED)
                or (key == "inputs" and dtype.kind not in "biuf")
            ):
                raise DataError(
                    f"{file}: {name} holds {_kind(dtype)}: must be {'numbers' if key == 'inputs' else 'numbers or texts'}"
                )
            if key != "inputs" and len(shape) != 1:
                raise DataError(f"{file}: {name} has the shape {shape}: must be [samples]")
            if 0 in shape:
                raise DataError(f"{file}: {name} is empty: its shape is {shape}")
        shape, dtype = heads[names["inputs"]]
        check_room(
            f"{file}: {names['inputs']} of the shape {shape}",
            math.prod(shape) * (dtype.itemsize + 12),
            "give a part of it",
        )
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[name] for key, name in wanted.items()}
    except (FedpruneError, MemoryError):
        raise
    except Exception as error:  # whatever zipfile and NumPy make of a damaged file
        raise DataError(f"{file}: damaged, or not NumPy's .npz ({' '.join(str(error).split())[:200]})") from None


def _head(packed: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and the type of an array without reading it."""
    with packed.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        return shape, dtype


def _kind(dtype: np.dtype) -> str:
    return "Python objects, which are never unpickled" if dtype.hasobject else f"values of the type {dtype}"


def _laid_out(where: str, inputs: Array, layout: str | None) -> Array:
    """Returns inputs as [N, C, H, W], uint8 as they are and all others as float32; raises DataError."""
    rank = inputs.ndim
    layout = layout or BY_RANK.get(rank, "images")
    if rank not in LAYOUTS[layout]:
        allowed = "; ".join(f"{name}: {' or '.join(map(str, ranks))} dimensions" for name, ranks in LAYOUTS.items())
        raise DataError(f"{where} has the shape {inputs.shape}, which data.layout={layout} is not: {allowed}")
    if rank == 4 and layout == "images" and inputs.shape[3] in COLOURS and inputs.shape[1] > max(COLOURS):
        raise DataError(
            f"{where} has the shape {inputs.shape}: the channels seem to stand last, which data.layout=channels_last reads; [samples, "
            "channels, height, width] is expected"
        )
    if layout == "channels_last":
        inputs = inputs.transpose(0, 3, 1, 2)
    elif layout == "series":
        inputs = inputs.reshape(len(inputs), -1, 1, inputs.shape[-1])
    elif rank < 4:
        inputs = inputs.reshape(len(inputs), *((-1, 1, 1) if layout == "rows" else (1, *inputs.shape[1:])))
    if math.prod(inputs.shape[1:]) > MOST_VALUES:
        raise DataError(f"{where}: a sample has {math.prod(inputs.shape[1:])} values, at most {MOST_VALUES}")
    if inputs.dtype == np.uint8:
        return inputs
    with np.errstate(invalid="ignore"):
        bad = ~(np.abs(inputs) <= MAX_SIZE) if inputs.dtype.kind == "f" else np.zeros(1, dtype=bool)
    if bad.any():
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise DataError(
            f"{where}: sample {at[0]} holds {inputs[at]} at {[int(index) for index in at[1:]]} of [channel, row, column]: must be a finite "
            "number of at most 1e+30 in size"
        )
    return inputs.astype(np.float32)


def _texts(where: str, values: Array) -> list[str]:
    """Returns the values of one dimension as texts; raises DataError for one that is missing."""
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "backslashreplace")
    if values.dtype.kind == "f" and (bad := np.flatnonzero(~np.isfinite(values))).size:
        raise DataError(f"{where}[{bad[0]}] is {values[bad[0]]}: every sample must have one")
    texts = (
        [f"{value:.17g}" for value in values] if values.dtype.kind == "f" else [str(value).strip() for value in values]
    )
    if values.dtype.kind == "b":
        texts = [text.lower() for text in texts]
    if "" in texts:
        raise DataError(f"{where}[{texts.index('')}] is empty: every sample must have one")
    return texts
