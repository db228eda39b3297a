"""Datasets: real arrays, and one line when they cannot be had."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fedprune_cli.errors import DataError
from fedprune_cli.world import datasets
from fedprune_cli.world.datasets import DATASETS, Digits, FashionMnist, Mnist


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, train: int = 30, test: int = 10, *, compress: bool = False) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(0))
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(256, size=(train + test, 28, 28))
    labels = rng.integers(10, size=train + test)
    for name, data in (
        ("train-images-idx3-ubyte", idx(images[:train])),
        ("train-labels-idx1-ubyte", idx(labels[:train])),
        ("t10k-images-idx3-ubyte", idx(images[train:])),
        ("t10k-labels-idx1-ubyte", idx(labels[train:])),
    ):
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(data) if compress else data)
    return images


def test_digits_are_the_real_ones() -> None:
    digits = Digits("digits", None).load()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.max() == 16
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    scaled = digits.images / digits.scale
    assert abs(scaled.mean() - digits.mean[0]) < 1e-9
    assert abs(scaled.std() - digits.std[0]) < 1e-9
    assert len(Digits("digits", 100).load().labels) == 100


@pytest.mark.parametrize("layout", ["FashionMNIST/raw", ".", "usr/share/datasets/fashion-mnist"])
@pytest.mark.parametrize("compress", [False, True])
def test_local_files_are_read_in_every_layout(tmp_path: Path, layout: str, compress: bool) -> None:
    if compress and layout == "FashionMNIST/raw":
        layout = "files"
    images = write_idx(tmp_path / layout, compress=compress)
    for config in (FashionMnist("fmnist", str(tmp_path), None),) + (
        (Mnist("mnist", str(tmp_path), None),) if "Fashion" not in layout else ()
    ):
        dataset = config.load()
        np.testing.assert_array_equal(dataset.images[:, 0], images)
        assert dataset.labels.shape == (40,)


def test_truncated_files_are_named(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw)
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    for data in (whole[:1000], whole[:3], b"", b"junk" * 100):
        (raw / "train-images-idx3-ubyte").write_bytes(data)
        with pytest.raises(DataError, match="damaged or truncated FashionMNIST files") as caught:
            FashionMnist("fmnist", str(tmp_path), None).load()
        assert "\n" not in str(caught.value)
    write_idx(tmp_path / "gz", compress=True)
    path = tmp_path / "gz" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: damaged or truncated"):
        FashionMnist("fmnist", str(tmp_path / "gz"), None).load()


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_what_cannot_be_had_says_what_was_tried(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr(datasets.Downloaded, "_download", refuse)
    monkeypatch.setattr(datasets.FashionMnist, "_unpack_debian", refuse)
    with pytest.raises(DataError) as caught:
        DATASETS[name](name=name, root=str(tmp_path), limit=None).load()
    text = str(caught.value)
    assert "\n" not in text
    for part in (f"{name} cannot be had", str(tmp_path), "download: no network", "data.root=DIR"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_a_killed_download_leaves_no_half_file(tmp_path: Path) -> None:
    def killed() -> None:
        with datasets._staged(tmp_path) as stage:
            (stage / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert list(tmp_path.iterdir()) == []
