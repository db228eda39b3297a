"""Data of one's own are read as independent readers read them, and every partition keeps its laws on them."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import random
from pathlib import Path

import numpy as np
import own
import pytest
from conftest import configured

from fedprune_cli.config.build import build_experiment
from fedprune_cli.errors import DataError, DeviceError
from fedprune_cli.world.datasets import room, sheets
from fedprune_cli.world.datasets.dataset import Dataset
from fedprune_cli.world.datasets.ownfile import encode, encoded_labels, read_like
from fedprune_cli.world.partition import PARTITIONS, PartitionConfig, build_partition

KEYS = {"label": "state", "device": "machine"}


def again(encoding: object) -> dict[str, object]:
    """Returns an encoding as it comes back from a JSON file."""
    return json.loads(json.dumps(encoding))  # type: ignore[no-any-return]


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["refuse", "mean", "indicator"])
@pytest.mark.parametrize("seed", range(4))
def test_a_table_is_encoded_as_scikit_learn_encodes_it(missing: str, seed: int) -> None:
    from sklearn.preprocessing import LabelEncoder, OneHotEncoder, StandardScaler

    rng = random.Random(seed)
    made = own.table(rng)
    gone: dict[str, np.ndarray] = {name: np.zeros(80, dtype=bool) for name in ("temp", "vibration", "mode", "line")}
    for name in ("temp", "mode") if missing != "refuse" else ():
        for row in rng.sample(range(80), 9):
            made.put(row, name, rng.choice(("", " ", "NA", "?")))
            gone[name][row] = True
    made.write(quoting=rng.choice((0, 1)))
    dataset = own.load("table", **KEYS, drop=["batch", "part"], missing=missing)
    parts = []
    for name in ("temp", "vibration", "mode", "line"):
        known, cells = ~gone[name], np.array(made.column(name))[:, None]
        if name in ("temp", "vibration"):
            scaler = StandardScaler().fit(cells[known].astype(float))
            part = np.zeros((80, 1))
            part[known] = scaler.transform(cells[known].astype(float))
        else:
            encoder = OneHotEncoder(sparse_output=False).fit(cells[known])
            part = np.zeros((80, len(encoder.categories_[0])))
            part[known] = encoder.transform(cells[known])
        parts += [part, gone[name][:, None]] if missing == "indicator" and gone[name].any() else [part]
    expected = np.concatenate(parts, axis=1)
    assert dataset.inputs.shape == (80, expected.shape[1], 1, 1)
    np.testing.assert_allclose(dataset.inputs[:, :, 0, 0], expected, atol=1e-6)
    assert (dataset.mean, dataset.std) == ((0.0,) * expected.shape[1], (1.0,) * expected.shape[1])
    labels = LabelEncoder().fit(made.column("state"))
    np.testing.assert_array_equal(dataset.labels, labels.transform(made.column("state")))
    assert dataset.source.label_names == tuple(labels.classes_)
    assert dataset.source.owner is not None
    assert [dataset.source.owner_names[at] for at in dataset.source.owner] == made.column("machine")
    # other rows, in other columns' order, are encoded the same way from what a file keeps
    order = random.Random(seed).sample(range(len(made.header)), len(made.header))
    own.Sheet([made.header[at] for at in order], [[row[at] for at in order] for row in made.rows[::-1]]).write(
        "later.csv"
    )
    encoding = again(dataset.source.encoding)
    later = read_like("later.csv", encoding)  # type: ignore[arg-type]
    assert encode(later, encoding).tobytes() == dataset.inputs[::-1].tobytes()  # type: ignore[arg-type]
    found = encoded_labels(later, encoding, dataset.source.label_names)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, dataset.labels[::-1])


def test_what_an_encoding_does_not_know_is_refused_by_row_and_column() -> None:
    made = own.table(random.Random(0))
    made.write()
    encoding = own.load("table", **KEYS, drop=["batch", "part"]).source.encoding
    for name, text, words in (
        ("line", "C", "line 5: line='C' is none of the levels"),
        ("temp", "hot", "line 5: temp='hot' is not a number"),
        ("temp", "", "line 5: temp is missing, and no row that the model was trained on lacked it"),
    ):
        changed = own.Sheet(made.header, [[*row] for row in made.rows])
        changed.put(3, name, text)
        changed.write("later.csv")
        with pytest.raises(DataError, match=words):
            encode(read_like("later.csv", encoding), encoding)
    own.Sheet(["temp"], [["1"], ["2"]]).write("later.csv")
    with pytest.raises(DataError, match="column vibration is missing"):
        encode(read_like("later.csv", encoding), encoding)
    changed.put(3, "temp", "1")
    changed.put(2, "state", "wrn")
    changed.write("later.csv")
    with pytest.raises(DataError, match=r"line 4: state='wrn' is none of the classes\. Did you mean 'worn'"):
        encoded_labels(read_like("later.csv", encoding), encoding, own.CLASSES)


def test_means_are_those_of_the_rows_that_train() -> None:
    made = own.table(random.Random(1))
    made.write()
    dataset = own.load("table", **KEYS, split="part", drop=["batch"])
    temp, train = np.array(made.column("temp"), dtype=float), np.array(made.column("part")) == "train"
    column = dataset.source.encoding["columns"][0]  # type: ignore[index, call-overload]
    assert abs(column["mean"] - temp[train].mean()) < 1e-12  # type: ignore[index, call-overload, arg-type, operator]
    assert (dataset.source.held_out == ~train).all()  # type: ignore[union-attr]


def test_labels_and_devices_are_in_the_order_of_their_numbers() -> None:
    made = own.Sheet(
        ["a", "who", "class"],
        [[str(at), str(at % 11), f"{at % 12}.0" if at % 2 else str(at % 12)] for at in range(132)],
    )
    made.write()
    dataset = own.load("table", label="class", device="who")
    assert dataset.source.label_names == tuple(str(at) for at in range(12))
    assert dataset.source.owner_names == tuple(str(at) for at in range(11))
    assert dataset.labels.tolist() == [at % 12 for at in range(132)]


def test_a_column_of_numbers_is_a_category_when_that_is_said_and_a_huge_or_equal_one_does_no_harm() -> None:
    made = own.table(random.Random(2))
    made.add("code", [str(at % 3) for at in range(80)])
    made.add("since", [str(1.7e9 + at) for at in range(80)])
    made.add("same", ["0.1"] * 80)
    made.write()
    common = {**KEYS, "drop": ["batch", "part", "temp", "vibration", "mode", "line"]}
    dataset = own.load("table", **common, categories=["code"])
    np.testing.assert_array_equal(dataset.inputs[:, :3, 0, 0], np.eye(3)[np.arange(80) % 3])
    since = dataset.inputs[:, 3, 0, 0]
    np.testing.assert_allclose(since, (np.arange(80) - 39.5) / np.arange(80).std(), atol=1e-5)
    assert not dataset.inputs[:, 4].any()
    assert own.load("table", **common).inputs.shape[1] == 3


# --- time series ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_windows_are_whole_runs_pieces_and_groups_share_no_row(seed: int) -> None:
    rng = random.Random(seed)
    made = own.series(rng)
    length, stride = rng.randint(5, 25), rng.randint(2, 30)
    block = rng.choice((None, 1, 3))
    gaps = set(rng.sample(range(1, len(made.rows) - 1), 6))
    made.rows = [row for at, row in enumerate(made.rows) if at not in gaps]
    shuffled = own.Sheet(made.header, sorted(made.rows, key=lambda row: float(row[2]) % 100))  # recordings interleaved
    shuffled.write()
    dataset = own.load(
        "windows", label="act", device="who", series="rec", time="t", length=length, stride=stride, block=block
    )
    rows = {(row[3], row[4]): row for row in shuffled.rows}
    used: dict[int, set[tuple[str, str]]] = {}
    group = dataset.source.group
    assert (group is None) == (stride >= length)
    for at, window in enumerate(dataset.inputs[:, :, 0]):
        assert window.shape == (2, length)
        cells = [(f"{x:.5f}", f"{y:.5f}") for x, y in window.T]
        found = [rows[cell] for cell in cells]
        assert len({(row[0], row[1], row[5]) for row in found}) == 1
        times = np.array([float(row[2]) for row in found])
        np.testing.assert_allclose(np.diff(times), 0.02, atol=1e-6)
        assert dataset.source.label_names[dataset.labels[at]] == found[0][5]
        assert dataset.source.owner is not None
        assert dataset.source.owner_names[dataset.source.owner[at]] == found[0][0]
        used.setdefault(at if group is None else int(group[at]), set()).update(cells)
    together = [cell for cells in used.values() for cell in cells]
    assert len(together) == len(set(together))  # no row is in two groups
    # as many as there can be: run by run, block by block
    expected = 0
    for rec in {row[1] for row in shuffled.rows}:
        times = [round(50 * float(row[2])) for row in shuffled.rows if row[1] == rec]
        edges = [0, *(at + 1 for at in range(len(times) - 1) if times[at + 1] != times[at] + 1), len(times)]
        for size in np.diff(edges):
            whole = max((size - length) // stride + 1, 0)
            each = block or min(max(whole // 5, 1), 10)
            rows_of_block = each * stride if stride >= length else length + (min(each, whole) - 1) * stride
            at = 0
            while whole and at + length <= size:
                expected += (min(rows_of_block, size - at) - length) // stride + 1
                at += rows_of_block
    assert len(dataset.labels) == expected


def test_later_series_are_cut_without_loss_and_a_missing_row_is_a_gap_when_that_is_said() -> None:
    made = own.series(random.Random(3))
    made.write()
    common = {"label": "act", "device": "who", "time": "t", "length": 10, "stride": 5, "drop": ["rec"]}
    dataset = own.load("windows", **common)
    encoding = again(dataset.source.encoding)
    later = read_like("x.csv", encoding)  # type: ignore[arg-type]
    inputs = encode(later, encoding)  # type: ignore[arg-type]
    assert len(inputs) > len(dataset.labels)
    assert {window.tobytes() for window in dataset.inputs} <= {window.tobytes() for window in inputs}
    labels = encoded_labels(later, encoding, dataset.source.label_names)  # type: ignore[arg-type]
    assert labels is not None
    assert len(labels) == len(inputs)
    made.put(40, "x", "")
    made.write()
    with pytest.raises(DataError, match=r"line 42: x is missing; data\.missing=gap"):
        own.load("windows", **common)
    assert 0 < len(own.load("windows", **common, missing="gap").labels) <= len(dataset.labels)


# --- both kinds of file ---------------------------------------------------------------------------------------------


def test_parquet_is_read_as_csv_is() -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    made = own.table(random.Random(4))
    made.put(3, "temp", "")
    made.write()
    columns = {name: pa.array(made.column(name)) for name in made.header}
    columns["temp"] = pa.array([float(cell) if cell else None for cell in made.column("temp")])
    columns["vibration"] = pa.array([float(cell) for cell in made.column("vibration")], pa.float64())
    columns["mode"] = columns["mode"].dictionary_encode()
    parquet.write_table(pa.table(columns), "x.parquet")
    common = {**KEYS, "missing": "indicator", "drop": ["batch"], "split": "part"}
    one, other = own.load("table", **common), own.load("table", **common, file="x.parquet")
    assert one.sha256 == other.sha256
    assert one.source.encoding == other.source.encoding
    made = own.series(random.Random(4))
    made.write()
    columns = {
        name: pa.array([float(cell) for cell in made.column(name)] if name in "txy" else made.column(name))
        for name in made.header
    }
    begin = datetime.datetime(2024, 1, 1)
    moments = [begin + datetime.timedelta(seconds=float(cell)) for cell in made.column("t")]
    columns["t"] = pa.array(moments, pa.timestamp("us"))
    parquet.write_table(pa.table(columns), "x.parquet")
    common = {"label": "act", "device": "who", "series": "rec", "time": "t", "length": 10, "stride": 5, "rate_hz": 50}
    one, other = own.load("windows", **common), own.load("windows", **common, file="x.parquet")
    assert one.sha256 == other.sha256
    for row, moment in enumerate(moments):
        made.put(row, "t", moment.isoformat())
    made.write()
    assert own.load("windows", **common).sha256 == one.sha256


# --- arrays and folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout", "read"),
    [
        ((60, 7), None, (60, 7, 1, 1)),
        ((60, 6, 5), None, (60, 1, 6, 5)),
        ((60, 3, 6, 5), None, (60, 3, 6, 5)),
        ((60, 6, 5, 3), "channels_last", (60, 3, 6, 5)),
        ((60, 2, 9), "series", (60, 2, 1, 9)),
        ((60, 9), "series", (60, 1, 1, 9)),
    ],
)
@pytest.mark.parametrize("kind", [np.uint8, np.float64, np.int16])
def test_arrays_are_read_by_their_layout(
    shape: tuple[int, ...], layout: str | None, read: tuple[int, ...], kind: type
) -> None:
    made = own.arrays(np.random.default_rng(0))
    made["inputs"] = np.random.default_rng(1).integers(0, 200, shape).astype(kind)
    np.savez("x.npz", **made)
    dataset = own.load("arrays", layout=layout)
    assert dataset.inputs.shape == read
    assert dataset.inputs.dtype == (np.uint8 if kind is np.uint8 else np.float32)
    flat = made["inputs"].transpose(0, 3, 1, 2) if layout == "channels_last" else made["inputs"]
    np.testing.assert_array_equal(dataset.inputs.ravel(), flat.ravel())
    assert dataset.source.owner_names == ("0", "1", "2", "3")
    np.testing.assert_array_equal(dataset.source.held_out, made["test"])


@pytest.mark.parametrize("devices", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_images_are_read_as_torchvision_reads_them(devices: bool, split: bool) -> None:
    from PIL import Image
    from torchvision.datasets import ImageFolder

    own.folder(np.random.default_rng(0), Path("x"), devices=devices, split=split)
    Path("x/.hidden").write_text("passed over")
    dataset = own.load("folder", devices=devices)
    assert dataset.inputs.shape == (60, 1, 6, 5)
    assert dataset.source.label_names == tuple(sorted(own.CLASSES))
    assert (dataset.source.held_out is not None) == split
    if not devices and not split:
        Path("x/.hidden").unlink()
        theirs = ImageFolder("x")
        np.testing.assert_array_equal(dataset.inputs[:, 0], [np.asarray(image.convert("L")) for image, _ in theirs])
        assert dataset.labels.tolist() == theirs.targets
        resized = own.load("folder", size=3, channels=3)
        expected = [np.asarray(image.resize((3, 3), Image.Resampling.BILINEAR)) for image, _ in theirs]
        np.testing.assert_array_equal(resized.inputs.transpose(0, 2, 3, 1), expected)
    if devices:
        assert np.bincount(dataset.source.owner).tolist() == [15] * 4  # type: ignore[arg-type]


# --- partitions -----------------------------------------------------------------------------------------------------


def made_dataset(kind: str) -> tuple[Dataset, bool]:
    """Returns a dataset of four devices, and whether it says which samples are for testing."""
    if kind == "table":
        made = own.table(random.Random(0), 240)
        made.add(
            "lot", [f"{batch} {state}" for batch, state in zip(made.column("batch"), made.column("state"), strict=True)]
        )
        made.write()
        return own.load("table", **KEYS, group="lot", drop=["part", "batch"]), False
    if kind == "windows":
        own.series(random.Random(0), 24).write()
        return own.load("windows", label="act", device="who", series="rec", time="t", length=8, stride=4), False
    if kind == "arrays":
        np.savez("x.npz", **own.arrays(np.random.default_rng(0), 240))
        return own.load("arrays"), True
    own.folder(np.random.default_rng(0), Path("x"), 240, devices=True, split=True)
    return own.load("folder", devices=True), True


@functools.cache
def partition_of(name: str) -> PartitionConfig:
    overrides = ["partition.classes_per_device=2"] if name == "shards" else []
    return build_experiment(configured(f"partition={name}", *overrides)).partition


@pytest.mark.parametrize("kind", own.REQUIRED)
def test_every_partition_works_on_data_of_ones_own(kind: str) -> None:
    dataset, split = made_dataset(kind)
    for name in PARTITIONS:
        config = partition_of(name)
        partition = build_partition(config, dataset, 4, 0.25, 0)
        source = dataset.source
        for device in range(4):
            train, test = partition.train[device], partition.test[device]
            assert len(train)
            assert len(test)
            if name == "natural":
                assert source.owner is not None
                assert set(source.owner[np.concatenate([train, test])]) == {device}
            if split:
                assert source.held_out is not None
                assert source.held_out[test].all()
                assert not source.held_out[train].any()
            if source.group is not None:
                assert not {*source.group[train]} & {*source.group[test]}


# --- memory ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_into_memory_is_refused_with_both_figures_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own.table(random.Random(0)).write()
    np.savez("x.npz", **own.arrays(np.random.default_rng(0)))
    own.folder(np.random.default_rng(0), Path("x"))
    assert (room.available_bytes() or 0) > 2**20
    monkeypatch.setattr(room, "available_bytes", lambda: 1000)
    for reader in (
        "fedprune_cli.world.datasets.sheets.csv_records",
        "numpy.load",
        "fedprune_cli.world.datasets.images.read_image",
    ):
        monkeypatch.setattr(reader, lambda *_, **__: pytest.fail("was read"))
    for kind, keys in (("table", KEYS), ("arrays", {}), ("folder", {})):
        with pytest.raises(
            DeviceError, match=r"reading it takes about [\d.e-]+ GiB of memory, 9.31e-07 GiB are available"
        ):
            own.load(kind, **keys)


def test_the_memory_of_a_control_group_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:    500 kB\n")
    assert room.available_bytes() == 512_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 30\n")
    assert room.available_bytes() == 512_000
    (tmp_path / "memory.max").write_text("1000\n")
    assert room.available_bytes() == 930


def test_a_csv_file_takes_no_more_memory_than_is_said() -> None:
    """Cells of five digits are the worst: each a string of its own."""
    import tracemalloc

    text = "a,b\n" + "".join(f"{at},{at + 1}\n" for at in range(10_000, 60_000))
    Path("x.csv").write_text(text)
    tracemalloc.start()
    sheet = sheets.read_sheet("x.csv")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sheet.size == 50_000
    assert 5 * len(text) < peak < sheets.CSV_FACTOR * len(text)


def test_a_dataset_of_ones_own_is_known_by_its_content() -> None:
    made = own.table(random.Random(0))
    made.write()
    first = own.load("table", **KEYS)
    made.write("other.csv", quoting=1)
    assert own.load("table", **KEYS, file="other.csv").sha256 == first.sha256
    made.put(0, "temp", "1")
    made.write()
    assert own.load("table", **KEYS).sha256 != first.sha256
    assert dataclasses.replace(first.source).label_names == ("broken", "ok", "worn")
