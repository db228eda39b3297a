"""Datasets: real arrays, and one line when they cannot be had."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from fedprune_cli.errors import ConfigError, DataError
from fedprune_cli.world.datasets import DATASETS, arrivals, downloaded, embedded
from fedprune_cli.world.datasets.downloaded import Cifar10, Emnist, FashionMnist, Mnist, Svhn
from fedprune_cli.world.datasets.embedded import Digits, Patches


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


def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("while trying\nno network\n")

    monkeypatch.setattr(downloaded._Downloaded, "_download", refuse)
    monkeypatch.setattr(downloaded._Downloaded, "_unpack", refuse)


def test_digits_are_the_real_ones() -> None:
    digits = Digits("digits", None).load()
    assert digits.inputs.shape == (1797, 1, 8, 8)
    assert digits.inputs.max() == 16
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    scaled = digits.inputs / digits.scale
    assert abs(scaled.mean() - digits.mean[0]) < 1e-9
    assert abs(scaled.std() - digits.std[0]) < 1e-9
    assert len(Digits("digits", 100).load().labels) == 100


@pytest.mark.parametrize("cls", [Mnist, FashionMnist])
@pytest.mark.parametrize("layout", ["{}/raw", "raw", ".", "usr/share/datasets/fashion-mnist"])
@pytest.mark.parametrize("compress", [False, True])
def test_local_files_are_read_in_every_layout(
    tmp_path: Path, cls: type[Mnist | FashionMnist], layout: str, compress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_idx(tmp_path / layout.format(cls.torchvision_name), compress=compress)
    if "fashion" in layout and cls is Mnist:
        without_network(monkeypatch)
        with pytest.raises(DataError, match="cannot be had"):
            cls("x", str(tmp_path), None).load()
        return
    dataset = cls("x", str(tmp_path), None).load()
    np.testing.assert_array_equal(dataset.inputs[:, 0], images)
    assert dataset.labels.shape == (40,)
    assert dataset.labels.dtype == np.int64


@pytest.mark.parametrize(("cls", "other"), [(Mnist, "FashionMNIST"), (FashionMnist, "MNIST")])
@pytest.mark.parametrize("named", [False, True])
def test_no_dataset_is_taken_for_another(
    tmp_path: Path, cls: type[Mnist | FashionMnist], other: str, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MNIST and Fashion-MNIST files have the same names and shapes: only the folder tells them apart."""
    write_idx(tmp_path / other / "raw")
    without_network(monkeypatch)
    monkeypatch.setenv("FEDPRUNE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="cannot be had"):
        cls("x", str(tmp_path) if named else None, None).load()


def test_our_reader_agrees_with_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    write_idx(tmp_path / "FashionMNIST" / "raw")
    dataset = FashionMnist("fmnist", str(tmp_path), None).load()
    halves = [FashionMNIST(str(tmp_path), train=train) for train in (True, False)]
    np.testing.assert_array_equal(dataset.inputs[:, 0], np.concatenate([half.data for half in halves]))
    np.testing.assert_array_equal(dataset.labels, np.concatenate([half.targets for half in halves]))


def test_damaged_files_are_named_with_what_they_should_be(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw)
    path = raw / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for data, message in (
        (whole[:1000], rf"1000 bytes, must be {len(whole)} for the shape \[30, 28, 28\]"),
        (whole + b"x", rf"{len(whole) + 1} bytes, must be {len(whole)}"),
        (whole[:3], "3 bytes that begin with 000008, must be at least 16"),
        (b"", "0 bytes that begin with nothing"),
        (b"junk" * 100, "begin with 6a756e6b, must be at least 16 that begin with 00000803"),
        (idx(np.zeros(30)), "begin with 00000801"),
        (idx(np.zeros((30, 27, 27))), r"images of \(28, 28\) pixels"),
        (idx(np.zeros((0, 28, 28))), "damaged"),
        (idx(np.zeros((29, 28, 28))), "39 images, 40 labels"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message) as caught:
            FashionMnist("fmnist", str(tmp_path), None).load()
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(np.full(10, 200)))
    with pytest.raises(DataError, match=r"sample 30 has label 200, must be in 0\.\.9"):
        FashionMnist("fmnist", str(tmp_path), None).load()


def test_damaged_gz_files_are_named(tmp_path: Path) -> None:
    write_idx(tmp_path, compress=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for data in (whole[:50], whole[:10] + b"\xff" * 500 + whole[510:], b"junk", whole[:-4] + b"junk"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: damaged or truncated"):
            FashionMnist("fmnist", str(tmp_path), None).load()


def test_cifar_is_read_only_when_its_digests_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.Generator(np.random.PCG64(0))
    pixels = rng.integers(256, size=(60, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(10, size=60).tolist()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        part = slice(10 * i, 10 * i + 10)
        (folder / name).write_bytes(pickle.dumps({"data": pixels[part].reshape(10, -1), "labels": labels[part]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    config = Cifar10("cifar10", str(tmp_path), None)
    with pytest.raises(DataError, match=r"data_batch_1: damaged or truncated: MD5 \w+ of \d+ bytes, must be c99c"):
        config.load()

    digests = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in [*names, "batches.meta"]}
    monkeypatch.setattr(CIFAR10, "train_list", [(name, digests[name]) for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", digests["test_batch"])])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": digests["batches.meta"]})
    dataset = config.load()
    np.testing.assert_array_equal(dataset.inputs, pixels)
    assert dataset.labels.tolist() == labels
    assert len(dataset.mean) == len(dataset.std) == 3
    (folder / "test_batch").unlink()
    without_network(monkeypatch)
    with pytest.raises(DataError, match="no CIFAR10 files"):
        config.load()


@pytest.mark.parametrize(("split", "classes"), [("balanced", 47), ("byclass", 62)])
@pytest.mark.parametrize("compress", [False, True])
def test_emnist_is_what_torchvision_reads_and_upright(
    tmp_path: Path, split: str, classes: int, compress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import EMNIST

    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.Generator(np.random.PCG64(0))
    for half, count in (("train", 20), ("test", 5)):
        for what, array in (
            ("images-idx3", rng.integers(256, size=(count, 28, 28))),
            ("labels-idx1", rng.integers(classes, size=count)),
        ):
            path = raw / f"emnist-{split}-{half}-{what}-ubyte"
            path.write_bytes(idx(array))
    halves = [EMNIST(str(tmp_path), split=split, train=train) for train in (True, False)]
    if compress:
        for path in raw.iterdir():
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    dataset = Emnist("emnist", str(tmp_path), None, split).load()
    np.testing.assert_array_equal(
        dataset.inputs[:, 0].transpose(0, 2, 1), np.concatenate([half.data for half in halves])
    )
    np.testing.assert_array_equal(dataset.labels, np.concatenate([half.targets for half in halves]))
    assert dataset.num_classes == classes
    without_network(monkeypatch)
    with pytest.raises(DataError, match="no EMNIST files"):
        Emnist("emnist", str(tmp_path), None, "byclass" if split == "balanced" else "balanced").load()


def test_svhn_is_what_torchvision_reads_and_only_when_its_digests_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    rng = np.random.Generator(np.random.PCG64(0))
    listed = dict(SVHN.split_list)
    for half, count in (("train", 30), ("test", 10)):
        path = tmp_path / f"{half}_32x32.mat"
        pixels, labels = rng.integers(256, size=(32, 32, 3, count)), rng.integers(1, 11, size=(count, 1))
        savemat(path, {"X": pixels.astype(np.uint8), "y": labels.astype(np.uint8)})
        listed[half] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    config = Svhn("svhn", str(tmp_path), None)
    with pytest.raises(
        DataError, match=r"train_32x32\.mat: damaged or truncated: MD5 \w+ of \d+ bytes, must be e26dedcc"
    ):
        config.load()
    monkeypatch.setattr(SVHN, "split_list", listed)
    halves = [SVHN(str(tmp_path), split=half) for half in ("train", "test")]
    dataset = config.load()
    np.testing.assert_array_equal(dataset.inputs, np.concatenate([half.data for half in halves]))
    np.testing.assert_array_equal(dataset.labels, np.concatenate([half.labels for half in halves]))
    assert set(dataset.labels) == set(range(10))


@pytest.mark.parametrize("name", [name for name, cls in DATASETS.items() if issubclass(cls, downloaded._Downloaded)])
def test_what_cannot_be_had_says_what_was_tried(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_network(monkeypatch)
    with pytest.raises(DataError) as caught:
        DATASETS[name](
            name=name, root=str(tmp_path), limit=None, **{"split": "balanced"} if name == "emnist" else {}
        ).load()
    text = str(caught.value)
    assert "\n" not in text
    for part in (f"{name} cannot be had", str(tmp_path), "download: no network", "data.root=DIR"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_a_killed_download_leaves_no_half_file(tmp_path: Path) -> None:
    def killed() -> None:
        with arrivals.staged(tmp_path) as stage:
            (stage / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert list(tmp_path.iterdir()) == []


def test_a_download_replaces_no_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "mine").write_text("kept")
    with arrivals.staged(tmp_path) as stage:
        (stage / "MNIST" / "raw").mkdir(parents=True)
        (stage / "MNIST" / "raw" / "new").write_text("x")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "MNIST/raw/mine",
        "MNIST/raw/new",
        "MNIST/raw/new.sha256",
    ]


@pytest.mark.slow
def test_fashion_mnist_comes_from_the_debian_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real 70,000 images, where apt can reach its archive."""
    config = FashionMnist("fmnist", str(tmp_path), None)
    try:
        assert config.package
        config._unpack(config.package)
    except OSError as error:
        pytest.skip(str(error))
    without_network(monkeypatch)
    dataset = config.load()
    assert dataset.inputs.shape == (70_000, 1, 28, 28)
    assert (np.bincount(dataset.labels) == 7000).all()
    assert dataset.sha256.startswith("75979490032625d6")


@pytest.mark.parametrize(("tile", "count"), [(8, 13_280), (16, 3264), (32, 808)])
def test_patches_are_the_photographs_cut_up(tile: int, count: int) -> None:
    """Every pixel of a photograph is in at most one image: as many of each value as there are in the photographs, cropped."""
    patches = Patches("patches", tile, None).load()
    assert patches.inputs.shape == (count, 3, 32, 32)
    assert patches.inputs.dtype == np.uint8
    assert patches.num_classes == 12
    per_class = np.bincount(patches.labels)
    assert len(per_class) == 12
    assert per_class.max() <= 1.25 * per_class.min()
    step = 32 // tile
    tiles = patches.inputs[:, :, ::step, ::step]
    np.testing.assert_array_equal(tiles.repeat(step, axis=2).repeat(step, axis=3), patches.inputs)
    cropped = [photograph[: height // tile * tile, : width // tile * tile] for photograph in embedded._photographs("x")
               for height, width in [photograph.shape[:2]]]  # fmt: skip
    for channel in range(3):
        whole = sum(np.bincount(photograph[..., channel].ravel(), minlength=256) for photograph in cropped)
        np.testing.assert_array_equal(np.bincount(tiles[:, channel].ravel(), minlength=256), whole)


def test_patches_share_no_image_and_are_the_same_each_time() -> None:
    first, second = Patches("patches", 16, None).load(), Patches("patches", 16, None).load()
    assert first.sha256 == second.sha256
    assert len(np.unique(first.inputs.reshape(len(first.labels), -1), axis=0)) == len(first.labels)
    some = Patches("patches", 16, 240).load()
    np.testing.assert_array_equal(some.inputs, first.inputs[:240])
    assert np.bincount(some.labels, minlength=12).min() >= 10, "the first samples are of all classes"


def test_patches_without_a_photograph_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import cbook

    def missing(name: str, *, asfileobj: bool) -> None:
        raise FileNotFoundError(2, "No such file or directory", name)

    monkeypatch.setattr(cbook, "get_sample_data", missing)
    with pytest.raises(DataError, match=r"grace_hopper.*pip install scikit-learn matplotlib pillow") as caught:
        Patches("patches", 16, None).load()
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="8, 16 or 32"):
        Patches("patches", 20, None)


def test_a_changed_pixel_in_a_file_that_was_brought_here_is_found(tmp_path: Path) -> None:
    """The file's form is right and its checksum is not: a file of the user's own, which has none, is taken as it is."""
    header = bytes((0, 0, 8, 1)) + (3).to_bytes(4, "big")
    with arrivals.staged(tmp_path) as stage:
        (stage / "labels").write_bytes(header + bytes((1, 2, 3)))
    assert downloaded._read_idx(tmp_path / "labels", 1).tolist() == [1, 2, 3]
    (tmp_path / "labels").write_bytes(header + bytes((1, 2, 2)))
    with pytest.raises(DataError, match=r"labels: damaged: not what labels\.sha256 was written for"):
        downloaded._read_idx(tmp_path / "labels", 1)
    (tmp_path / "mine").write_bytes(header + bytes((1, 2, 2)))
    assert downloaded._read_idx(tmp_path / "mine", 1).tolist() == [1, 2, 2]
