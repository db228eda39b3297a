"""A dataset as a value: a pool of samples, with what its source says of each, and how the network sees it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedprune_cli.errors import require
from fedprune_cli.store.files import Plain
from fedprune_cli.store.state import Array


@dataclass(frozen=True)
class Source:
    """What a dataset's source says of its samples, as far as it says anything.

    owner: the natural device of each sample, int64 [N], an index into owner_names; held_out: whether a sample is for testing, bool [N];
    group: samples of one group are near-duplicates (overlapping windows of one recording), int64 [N]: a group is never divided between
    devices, nor between training and test. label_names: of the classes. encoding: how a row of the source becomes an input, as plain
    values, so that a model which was taken home can read other rows.
    """

    owner: Array | None = None
    owner_names: tuple[str, ...] = ()
    held_out: Array | None = None
    group: Array | None = None
    label_names: tuple[str, ...] = ()
    encoding: Mapping[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """inputs: uint8 or float32 [N, C, H, W]; labels: int64 [N]; the network sees (inputs / scale - mean) / std, by channel.

    A row of a table is [columns, 1, 1], a window of a time series [axes, 1, length], a text [1, 1, length] in tokens.
    """

    name: str
    inputs: Array
    labels: Array
    num_classes: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str
    source: Source = Source()


class DatasetConfig(Protocol):
    """A dataset plug-in: a frozen dataclass whose fields are its configuration.

    One that reads files which a user may edit has a property `folder`: the folder or the file.
    """

    @property
    def name(self) -> str: ...

    def load(self) -> Dataset:
        """Returns the data; raises DataError saying what was tried and how to get it."""


def check_limit(limit: int | None) -> None:
    """Raises ConfigError unless `limit`, of how many of the first samples are used, is None or a number of them."""
    require(limit is None or limit >= 1, "limit", limit, ">= 1 or null")


def image_dataset(
    name: str, images: Array, labels: Array, num_classes: int, scale: float, source: Source | None = None
) -> Dataset:
    """Returns a dataset of uint8 images [N, C, H, W], its mean and standard deviation taken from all of them, by channel."""
    images, labels = np.ascontiguousarray(images), np.ascontiguousarray(labels, dtype=np.int64)
    pixels = [np.bincount(images[:, channel].ravel(), minlength=256) for channel in range(images.shape[1])]
    levels = np.arange(256) / scale
    mean = [float(levels @ count / count.sum()) for count in pixels]
    std = [float(np.sqrt((levels - m) ** 2 @ count / count.sum())) for count, m in zip(pixels, mean, strict=True)]
    seen = (scale, tuple(mean), tuple(s or 1.0 for s in std))
    return _dataset(name, images, labels, num_classes, seen, source or Source())


def number_dataset(name: str, inputs: Array, labels: Array, num_classes: int, source: Source | None = None) -> Dataset:
    """Returns a dataset of float32 inputs [N, C, H, W], its mean and standard deviation taken from all of them, by channel."""
    inputs, labels = np.ascontiguousarray(inputs, dtype=np.float32), np.ascontiguousarray(labels, dtype=np.int64)
    mean, std = [], []
    for channel in range(inputs.shape[1]):
        values = inputs[:, channel].astype(np.float64)
        same = values.min() == values.max()  # then the deviation may be the mean's last digit
        mean.append(float(values.mean()))
        std.append(1.0 if same else float(values.std()) or 1.0)
    return _dataset(name, inputs, labels, num_classes, (1.0, tuple(mean), tuple(std)), source or Source())


def token_dataset(name: str, tokens: Array, labels: Array, num_classes: int, source: Source | None = None) -> Dataset:
    """Returns a dataset of tokens, uint8 [N, 1, 1, length], which the network sees as they are."""
    tokens, labels = np.ascontiguousarray(tokens, dtype=np.uint8), np.ascontiguousarray(labels, dtype=np.int64)
    return _dataset(name, tokens, labels, num_classes, (1.0, (0.0,), (1.0,)), source or Source())


def _dataset(
    name: str, inputs: Array, labels: Array, num_classes: int, seen: tuple[float, tuple[float, ...], tuple[float, ...]],
    source: Source,
) -> Dataset:  # fmt: skip
    digest = hashlib.sha256(inputs.tobytes() + labels.tobytes())
    for key in ("owner", "held_out", "group"):
        if (values := getattr(source, key)) is not None:
            digest.update(key.encode() + values.tobytes())
    if words := [*source.owner_names, *source.label_names]:
        digest.update(json.dumps(words).encode())
    return Dataset(name, inputs, labels, num_classes, *seen, digest.hexdigest(), source)
