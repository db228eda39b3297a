"""Sound files of one's own, small and drawn at random, for the tests of their readers."""

from __future__ import annotations

import csv
import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import composed
from omegaconf import DictConfig, OmegaConf

from fedprune_cli.config.build import build_experiment
from fedprune_cli.world.datasets.dataset import Dataset

CLASSES, MACHINES = ("ok", "worn", "broken"), ("m10", "m2", "m1", "m7")
REQUIRED = {
    "table": ("data.file=x.csv", "data.label=state"),
    "windows": ("data.file=x.csv", "data.label=act", "model=mlp"),
    "arrays": ("data.file=x.npz",),
    "folder": ("data.root=x", "model=mlp"),
}


@functools.cache
def _composed(kind: str, partition: str) -> DictConfig:
    return composed(f"data={kind}", f"partition={partition}", *REQUIRED[kind])


def config_of(kind: str, partition: str = "iid", **values: Any) -> DictConfig:
    """Returns the configuration of a tiny run on data of one's own; `values` are keys of the data."""
    config = _composed(kind, partition).copy()
    for key, value in values.items():
        OmegaConf.update(config, f"data.{key}", value)
    return config


def load(kind: str, **values: Any) -> Dataset:
    """Returns a dataset as the configuration asks for it."""
    return build_experiment(config_of(kind, **values)).data.load()


@dataclass
class Sheet:
    """A table as it is to be written."""

    header: list[str]
    rows: list[list[str]]

    def column(self, name: str) -> list[str]:
        """Returns a column's cells."""
        return [row[self.header.index(name)] for row in self.rows]

    def put(self, row: int, name: str, text: str) -> None:
        """Changes a cell."""
        self.rows[row][self.header.index(name)] = text

    def add(self, name: str, cells: list[str]) -> None:
        """Adds a column."""
        self.header.append(name)
        for row, cell in zip(self.rows, cells, strict=True):
            row.append(cell)

    def write(self, path: str = "x.csv", **options: Any) -> None:
        """Writes it as CSV."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n", **options).writerows([self.header, *self.rows])


def table(rng: random.Random, size: int = 80) -> Sheet:
    """Returns a table of a plant's machines: two numbers, two categories, a class, whose it is, a batch, and what for."""
    rows = []
    for at in range(size):
        kind = at % len(CLASSES)
        mode, batch = rng.choice(("idle", "run", "a,b", 'say "x"')), f"b{at // 3 % 4}-{at // 24}"
        numbers = (f"{rng.gauss(20 + 5 * kind, 3):.3f}", f"{rng.gauss(kind, 1):.4g}")
        part = "test" if at // 12 % 4 == 0 else "train"
        rows.append([MACHINES[at // 3 % 4], *numbers, mode, rng.choice("AB"), CLASSES[kind], batch, part])
    return Sheet(["machine", "temp", "vibration", "mode", "line", "state", "batch", "part"], rows)


def series(rng: random.Random, runs: int = 16) -> Sheet:
    """Returns recordings of two axes at 50 Hz: who, which recording, when, and what was done; runs of 30 to 90 rows."""
    rows = []
    for run in range(runs):
        who, act, start = f"p{run % 4}", ("walk", "rest")[run // 4 % 2], 100.0 * run
        for at in range(rng.randint(30, 90)):
            rows.append(
                [who, f"r{run}", f"{start + at / 50:.2f}", f"{rng.gauss(0, 1):.5f}", f"{rng.gauss(3, 1):.5f}", act]
            )
    return Sheet(["who", "rec", "t", "x", "y", "act"], rows)


def arrays(rng: np.random.Generator, size: int = 60) -> dict[str, np.ndarray]:
    """Returns the arrays of small grey images."""
    return {
        "inputs": rng.integers(0, 255, (size, 6, 5), dtype=np.uint8), "labels": np.arange(size) % 3, "device": np.arange(size) // 3 % 4,
        "test": np.arange(size) // 12 % 4 == 0,
    }  # fmt: skip


def folder(rng: np.random.Generator, root: Path, size: int = 60, *, devices: bool = False, split: bool = False) -> None:
    """Writes small images in class folders."""
    from PIL import Image

    for at in range(size):
        part = (
            root
            / (("test" if at // 12 % 4 == 0 else "train") if split else "")
            / (f"d{at // 3 % 4}" if devices else "")
            / CLASSES[at % 3]
        )
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (6, 5), dtype=np.uint8)).save(part / f"{at:03}.png")
