"""Malformed tables, time series, arrays and folders of one's own: one line each with its exit code, no traceback, and nothing written."""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
from conftest import fedprune

from fedprune_cli.errors import ConfigError, DataError, DeviceError, FedpruneError, one_line
from fedprune_cli.runs import life

CONFIG, DATA, MACHINE = ConfigError.exit_code, DataError.exit_code, DeviceError.exit_code


@dataclass
class Bad:
    """What must come of a malformed file: words of the one line, and the exit code; `keys` of the data that ask for it."""

    words: str
    keys: dict[str, Any] = field(default_factory=dict)
    code: int = DATA
    partition: str = "iid"


Kind = Callable[[random.Random], Bad]
MALFORMED: dict[str, tuple[str, Kind]] = {}
TABLE = {"label": "state", "device": "machine", "split": "part", "drop": ["batch"]}
SERIES = {"label": "act", "device": "who", "series": "rec", "time": "t", "length": 10, "stride": 5}


def malformed(kind: str) -> Callable[[Kind], Kind]:
    """Adds a way to spoil data of a kind."""

    def add(way: Kind) -> Kind:
        MALFORMED[f"{kind}: {way.__name__}"] = (kind, way)
        return way

    return add


def spoilt(rng: random.Random, name: str, texts: tuple[str, ...], words: str, **keys: Any) -> Bad:
    """Writes a table with one bad cell, which is named with its line."""
    made, row = own.table(rng), rng.randrange(80)
    made.put(row, name, text := rng.choice(texts))
    made.write()
    return Bad(f"x.csv, line {row + 2}: {words.format(text=text.strip())}", TABLE | keys)


def raw(data: bytes, words: str) -> Bad:
    Path("x.csv").write_bytes(data)
    return Bad(words, TABLE)


def text_of(made: own.Sheet) -> str:
    made.write()
    return Path("x.csv").read_text()


# --- tables ---------------------------------------------------------------------------------------------------------


@malformed("table")
def ragged_row(rng: random.Random) -> Bad:
    made, row = own.table(rng), rng.randrange(80)
    made.rows[row] = (
        made.rows[row][: (count := rng.randint(2, 7))]
        if rng.random() < 0.5
        else [*made.rows[row], *["z"] * (count := 2)]
    )
    count = count if count > 2 or len(made.rows[row]) < 8 else 10
    return raw(text_of(made).encode(), f"x.csv, line {row + 2}: {len(made.rows[row])} values for 8 columns")


@malformed("table")
def ragged_below_quoted_lines(rng: random.Random) -> Bad:
    made, row = own.table(rng), rng.randrange(1, 80)
    breaks = rng.randint(1, 4)
    made.put(row - 1, "mode", "a" + "\n" * breaks + "b")
    made.rows[row].append("more")
    return raw(text_of(made).encode(), f"x.csv, line {row + 2 + breaks}: 9 values for 8 columns")


@malformed("table")
def column_twice(rng: random.Random) -> Bad:
    made = own.table(rng)
    made.header[2] = name = rng.choice(("temp", "state", "machine"))
    return raw(text_of(made).encode(), f"x.csv, line 1: column {name} stands there twice")


@malformed("table")
def quote_never_closed(rng: random.Random) -> Bad:
    made, row = own.table(rng), rng.randrange(80)
    for at in range(80):
        made.put(at, "mode", "run")  # no other quotes
    made.put(row, "line", "OPEN")
    return raw(
        text_of(made).replace("OPEN", '"open').encode(), f"line {row + 2}: a quoted value of this row is never closed"
    )


@malformed("table")
def not_utf8(rng: random.Random) -> Bad:
    made, row = own.table(rng), rng.randrange(80)
    made.put(row, "line", "BYTE")
    return raw(text_of(made).encode().replace(b"BYTE", b"caf\xe9"), f"line {row + 2}: not a CSV text file in UTF-8")


@malformed("table")
def utf16(rng: random.Random) -> Bad:
    return raw(text_of(own.table(rng)).encode("utf-16"), "x.csv, line 1: not a CSV text file in UTF-8")


@malformed("table")
def rubbish(rng: random.Random) -> Bad:
    return raw(b"\x89\xff" + rng.randbytes(rng.randint(1, 5000)), "not a CSV text file in UTF-8")


@malformed("table")
def empty(rng: random.Random) -> Bad:
    return raw(rng.choice((b"", b"\n\n", b"\xef\xbb\xbf", b"  \n")), "x.csv: is empty")


@malformed("table")
def header_only(rng: random.Random) -> Bad:
    made = own.table(rng)
    return raw(text_of(own.Sheet(made.header, [])).encode(), "x.csv: has no rows")


@malformed("table")
def semicolons(rng: random.Random) -> Bad:
    sign = rng.choice(";\t|")
    return raw(
        text_of(own.table(rng)).replace(",", sign).encode(), f"columns must be separated by ',', not by {sign!r}"
    )


@malformed("table")
def no_number(rng: random.Random) -> Bad:
    texts = ("x", "1,5", "1_0", "１", "--1", "0x1", "1 0", "TRUE", "1e", "=1", "-", "1.0.0", "12°")
    return spoilt(rng, rng.choice(("temp", "vibration")), texts, "")


@malformed("table")
def not_finite(rng: random.Random) -> Bad:
    return spoilt(
        rng,
        "temp",
        ("inf", "-inf", "1e31", "1e999", "Infinity"),
        "temp='{text}' is not a number of at most 1e+30 in size",
    )


@malformed("table")
def missing_value(rng: random.Random) -> Bad:
    name = rng.choice(("temp", "mode", "line"))
    return spoilt(rng, name, ("", "  ", "NaN", "NA", "?"), f"{name} is missing; data.missing=mean or indicator says")


@malformed("table")
def missing_key(rng: random.Random) -> Bad:
    name = rng.choice(("state", "machine", "part"))
    return spoilt(rng, name, ("", "  ", "NaN"), f"{name} is missing; every row must have one")


@malformed("table")
def strange_split(rng: random.Random) -> Bad:
    return spoilt(rng, "part", ("dev", "2", "tset"), "part='{text}' is not allowed: must be train or test")


@malformed("table")
def one_sided_split(rng: random.Random) -> Bad:
    made, side = own.table(rng), rng.choice(("train", "test"))
    for row in range(80):
        made.put(row, "part", side)
    made.write()
    return Bad(f"x.csv: column part: every sample is for {side}ing", TABLE)


@malformed("table")
def one_class(rng: random.Random) -> Bad:
    made = own.table(rng)
    for row in range(80):
        made.put(row, "state", "ok")
    made.write()
    return Bad("x.csv: column state: every sample has the label 'ok': two classes are the least", TABLE)


@malformed("table")
def continuous_label(rng: random.Random) -> Bad:
    own.table(rng).write()
    return Bad("different numbers such as", TABLE | {"label": "temp", "drop": ["state"]})


@malformed("table")
def label_of_names(rng: random.Random) -> Bad:
    made = own.table(rng)
    made.add("serial", [f"s{rng.random()}" for _ in range(80)])
    made.write()
    return Bad("x.csv: column serial: 80 different labels for 80 samples", TABLE | {"label": "serial"})


@malformed("table")
def column_not_there(rng: random.Random) -> Bad:
    own.table(rng).write()
    key, name, near = rng.choice(
        (("label", "stat", "state"), ("device", "machin", "machine"), ("split", "prt", "part"))
    )
    return Bad(f"data.{key}={name}: x.csv has no such column. Did you mean '{near}'?", TABLE | {key: name}, CONFIG)


@malformed("table")
def list_names_a_column_not_there(rng: random.Random) -> Bad:
    own.table(rng).write()
    key = rng.choice(("drop", "categories"))
    return Bad(f"data.{key}=tmep: x.csv has no such column. Did you mean 'temp'?", TABLE | {key: ["tmep"]}, CONFIG)


@malformed("table")
def one_column_for_two_keys(rng: random.Random) -> Bad:
    own.table(rng).write()
    return Bad("column state cannot be both data.label and data.device", TABLE | {"device": "state"})


@malformed("table")
def dropped_label(rng: random.Random) -> Bad:
    own.table(rng).write()
    return Bad("column state is data.label and cannot be in data.drop", TABLE | {"drop": ["state"]})


@malformed("table")
def nothing_left(rng: random.Random) -> Bad:
    own.table(rng).write()
    return Bad(
        "x.csv: no columns are left to learn from", TABLE | {"drop": ["batch", "temp", "vibration", "mode", "line"]}
    )


@malformed("table")
def column_without_a_name(rng: random.Random) -> Bad:
    made = own.table(rng)
    made.add("", [str(at) for at in range(80)])
    made.write()
    return Bad("x.csv: column 9 has no name", TABLE)


@malformed("table")
def column_without_values(rng: random.Random) -> Bad:
    made = own.table(rng)
    made.add("none", [rng.choice(("", "NA")) for _ in range(80)])
    made.write()
    return Bad(
        "x.csv: column none has no values at all", TABLE | {"missing": rng.choice(("refuse", "mean", "indicator"))}
    )


@malformed("table")
def too_many_levels(rng: random.Random) -> Bad:
    made = own.table(rng, 300)
    made.add("note", [f"n{at}" for at in range(300)])
    made.write()
    return Bad("column note has 300 different values as a category", TABLE)


@malformed("table")
def device_that_is_not_tested(rng: random.Random) -> Bad:
    made = own.table(rng)
    for row in range(80):
        if made.column("machine")[row] == "m7":
            made.put(row, "part", "train")
    made.write()
    return Bad("device 3 (m7) would have no test samples", TABLE, CONFIG, "natural")


@malformed("table")
def group_on_both_sides(rng: random.Random) -> Bad:
    made, key = own.table(rng), rng.choice(("device", "split"))
    made.add("lot", [str(at % 7) for at in range(80)])
    made.write()
    what = "of more than one device" if key == "device" else "on both sides of the split"
    return Bad(f"are {what}: near-duplicates belong together", {"label": "state", "group": "lot", key: TABLE[key]})


@malformed("table")
def another_ending(rng: random.Random) -> Bad:
    name = rng.choice(("x.xlsx", "x.txt", "x", "x.csv.gz", "x.tsv"))
    Path(name).write_text("a,b\n1,2\n")
    return Bad(f"{name}: must be a file named .csv or .parquet", TABLE | {"file": name})


@malformed("table")
def no_file(rng: random.Random) -> Bad:
    name = rng.choice(("nope.csv", "folder.csv", "pipe.csv"))
    os.makedirs("folder.csv")
    os.mkfifo("pipe.csv")
    return Bad("nope.csv: No such file" if name == "nope.csv" else f"{name}: not a plain file", TABLE | {"file": name})


@malformed("table")
def damaged_parquet(rng: random.Random) -> Bad:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        Path("x.parquet").write_bytes(b"PAR1")
        return Bad(
            "reading Parquet needs an extra: pip install 'fedprune[tables]'", TABLE | {"file": "x.parquet"}, CONFIG
        )
    made = own.table(rng)
    columns = {name: pa.array(made.column(name)) for name in made.header}
    columns["line"] = pa.array([b"caf\xe9"] * 80, pa.binary()).view(pa.string())
    parquet.write_table(pa.table(columns), "x.parquet")
    data = Path("x.parquet").read_bytes()
    Path("x.parquet").write_bytes(
        rng.choice((b"", b"PAR1", data[: len(data) // 2], rng.randbytes(100), data[4:], data))
    )
    return Bad("x.parquet: damaged, or not Parquet", TABLE | {"file": "x.parquet"})


@malformed("table")
def columns_that_parquet_alone_has(rng: random.Random) -> Bad:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    made = own.table(rng)
    columns = {name: pa.array(made.column(name)) for name in made.header}
    name, kind = (
        rng.choice(("temp", "mode", "state")),
        rng.choice((pa.list_(pa.field("element", pa.int64())), pa.binary(), pa.duration("s"))),
    )
    columns[name] = pa.nulls(80, kind)
    parquet.write_table(pa.table(columns), "x.parquet")
    return Bad(f"x.parquet: column {name} holds {kind}, and neither numbers nor texts", TABLE | {"file": "x.parquet"})


@malformed("table")
def parquet_row(rng: random.Random) -> Bad:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    made, row = own.table(rng), rng.randrange(80)
    columns = {name: pa.array(made.column(name)) for name in made.header}
    numbers = [float(cell) for cell in made.column("temp")]
    numbers[row] = rng.choice((float("inf"), float("nan"), 1e31, None))
    columns["temp"] = pa.array(numbers, from_pandas=False)
    parquet.write_table(pa.table(columns), "x.parquet")
    return Bad(f"x.parquet, row {row + 1}: temp", TABLE | {"file": "x.parquet"})


@malformed("table")
def unknown_policy(rng: random.Random) -> Bad:
    own.table(rng).write()
    return Bad("data.missing=drop: must be one of refuse, mean, indicator", TABLE | {"missing": "drop"}, CONFIG)


# --- time series ----------------------------------------------------------------------------------------------------


@malformed("windows")
def time_that_goes_back(rng: random.Random) -> Bad:
    made = own.series(rng)
    row = 3 + rng.randrange(20)
    made.put(row, "t", "-1")
    made.write()
    return Bad(f"x.csv, line {row + 2}: t=-1 is not after", SERIES)


@malformed("windows")
def time_that_is_none(rng: random.Random) -> Bad:
    made, row = own.series(rng), rng.randrange(100)
    made.put(row, "t", rng.choice(("noon", "12:30", "2024-13-01T00:00:00")))
    made.write()
    return Bad(" is not a time: must be a number of seconds, or a date", SERIES)


@malformed("windows")
def time_missing(rng: random.Random) -> Bad:
    made, row = own.series(rng), rng.randrange(100)
    made.put(row, "t", "")
    made.write()
    return Bad(f"x.csv, line {row + 2}: t is missing", SERIES)


@malformed("windows")
def another_rate(rng: random.Random) -> Bad:
    own.series(rng).write()
    rate = rng.choice((20, 100, 0.05))
    return Bad(f"rows are 0.02 s apart, which is 50 Hz and not data.rate_hz={rate}", SERIES | {"rate_hz": rate})


@malformed("windows")
def too_short(rng: random.Random) -> Bad:
    own.series(rng).write()
    return Bad(
        "x.csv: no window: the longest run of one device, series and label without a gap has",
        SERIES | {"length": rng.randint(91, 1000)},
    )


@malformed("windows")
def class_without_a_window(rng: random.Random) -> Bad:
    made = own.series(rng)
    for row in range(5, 9):
        made.put(row, "act", "jump")
    made.write()
    return Bad("x.csv: act=jump has no window", SERIES)


@malformed("windows")
def device_without_a_window(rng: random.Random) -> Bad:
    made = own.series(rng)
    made.rows += [["p9", "r99", f"{9e4 + at / 50:.2f}", "0", "0", "walk"] for at in range(9)]
    made.write()
    return Bad("x.csv: who=p9 has no window", SERIES)


@malformed("windows")
def axis_of_words(rng: random.Random) -> Bad:
    own.series(rng).write()
    return Bad(
        "x.csv, line 2: rec='r0' is not a number; every column is an axis",
        SERIES | {"series": None, "device": None, "drop": ["who"], "time": None},
    )


@malformed("windows")
def axis_missing(rng: random.Random) -> Bad:
    made, row = own.series(rng), rng.randrange(200)
    made.put(row, "y", rng.choice(("", "nan")))
    made.write()
    return Bad(f"x.csv, line {row + 2}: y is missing; data.missing=gap", SERIES)


@malformed("windows")
def length_of_nothing(rng: random.Random) -> Bad:
    own.series(rng).write()
    key = rng.choice(("length", "stride", "block"))
    return Bad(f"data.{key}=0: must be in", SERIES | {key: 0}, CONFIG)


# --- arrays ---------------------------------------------------------------------------------------------------------


def saved(rng: random.Random, words: str, code: int = DATA, keys: dict[str, Any] | None = None, **changed: Any) -> Bad:
    """Writes sound arrays, some of them changed or (None) left out."""
    made = own.arrays(np.random.default_rng(rng.randrange(1000))) | changed
    np.savez("x.npz", **{name: array for name, array in made.items() if array is not None})
    return Bad(words, keys or {}, code)


@malformed("arrays")
def no_npz(rng: random.Random) -> Bad:
    Path("x.npz").write_bytes(rng.choice((b"", b"PK\x03\x04", rng.randbytes(500), b"\x93NUMPY\x01\x00")))
    return Bad("x.npz: damaged, or not NumPy's .npz")


@malformed("arrays")
def cut_npz(rng: random.Random) -> Bad:
    saved(rng, "")
    data = Path("x.npz").read_bytes()
    Path("x.npz").write_bytes(data[: rng.randrange(len(data))])
    return Bad("x.npz: damaged, or not NumPy's .npz")


@malformed("arrays")
def flipped_byte(rng: random.Random) -> Bad:
    saved(rng, "")
    data = bytearray(Path("x.npz").read_bytes())
    at = data.index(b"\x93NUMPY") + 300 + rng.randrange(500)
    data[at] ^= 255
    Path("x.npz").write_bytes(data)
    return Bad("x.npz: damaged, or not NumPy's .npz (Bad CRC-32")


@malformed("arrays")
def python_objects(rng: random.Random) -> Bad:
    name = rng.choice(("inputs", "labels", "device"))
    array = np.empty(60, dtype=object)
    array[:] = [{"x": 1}] * 60
    return saved(rng, f"x.npz: {name} holds Python objects, which are never unpickled", **{name: array})


@malformed("arrays")
def array_not_there(rng: random.Random) -> Bad:
    return saved(rng, "data.labels=label: x.npz has no such array. Did you mean 'labels'?", CONFIG, {"labels": "label"})


@malformed("arrays")
def no_inputs(rng: random.Random) -> Bad:
    return saved(rng, "data.inputs=inputs: x.npz has no such array", CONFIG, inputs=None)


@malformed("arrays")
def unlike_lengths(rng: random.Random) -> Bad:
    name = rng.choice(("inputs", "device", "test"))
    shape = (59, 6, 5) if name == "inputs" else (59,)
    return saved(rng, f"x.npz: {name} has 59 samples, labels has 60", **{name: np.ones(shape, dtype=np.uint8)})


@malformed("arrays")
def labels_of_two_dimensions(rng: random.Random) -> Bad:
    return saved(rng, "x.npz: labels has the shape (60, 3): must be [samples]", labels=np.eye(3)[np.arange(60) % 3])


@malformed("arrays")
def input_not_finite(rng: random.Random) -> Bad:
    inputs = np.random.default_rng(0).normal(size=(60, 2, 3, 4))
    at = tuple(rng.randrange(size) for size in inputs.shape)
    inputs[at] = rng.choice((np.nan, np.inf, -np.inf, 1e31))
    return saved(
        rng, f"x.npz: inputs: sample {at[0]} holds {inputs[at]} at {[*at[1:]]} of [channel, row, column]", inputs=inputs
    )


@malformed("arrays")
def strange_numbers(rng: random.Random) -> Bad:
    kind = rng.choice(("complex128", "<U3", "datetime64[s]"))
    return saved(rng, "x.npz: inputs holds values of the type", inputs=np.zeros((60, 4), dtype=kind))


@malformed("arrays")
def nothing_in_it(rng: random.Random) -> Bad:
    shape = rng.choice(((0, 6, 5), (60, 0), (60, 3, 0, 5)))
    return saved(rng, f"x.npz: inputs is empty: its shape is {shape}", inputs=np.zeros(shape))


@malformed("arrays")
def other_dimensions(rng: random.Random) -> Bad:
    shape = rng.choice(((60,), (60, 1, 2, 3, 4)))
    return saved(rng, f"x.npz: inputs has the shape {shape}, which data.layout=images is not", inputs=np.zeros(shape))


@malformed("arrays")
def channels_last(rng: random.Random) -> Bad:
    shape = (60, 8, 8, rng.choice((1, 3)))
    return saved(rng, "which data.layout=channels_last reads", inputs=np.zeros(shape, dtype=np.uint8))


@malformed("arrays")
def layout_of_others(rng: random.Random) -> Bad:
    layout = rng.choice(("rows", "channels_last"))
    return saved(rng, f"has the shape (60, 6, 5), which data.layout={layout} is not", keys={"layout": layout})


@malformed("arrays")
def measured_labels(rng: random.Random) -> Bad:
    return saved(rng, "x.npz: labels: 60 different numbers such as", labels=np.random.default_rng(0).normal(size=60))


@malformed("arrays")
def labels_missing(rng: random.Random) -> Bad:
    labels, at = (np.arange(60) % 3).astype(float), rng.randrange(60)
    labels[at] = np.nan
    return saved(rng, f"x.npz: labels[{at}] is nan: every sample must have one", labels=labels)


@malformed("arrays")
def the_same_label(rng: random.Random) -> Bad:
    return saved(rng, "x.npz: labels: every sample has the label '7'", labels=np.full(60, 7))


@malformed("arrays")
def three_sides(rng: random.Random) -> Bad:
    return saved(rng, "x.npz: test[2]=2 is not allowed: must be 0 or 1", test=np.arange(60) % 3)


@malformed("arrays")
def more_than_memory(rng: random.Random) -> Bad:
    """A head that says more than any machine holds, and nothing behind it."""
    saved(rng, "")
    head = io.BytesIO()
    shape = {"descr": "<f8", "fortran_order": False, "shape": (60, 10 ** rng.randint(12, 15))}
    np.lib.format.write_array_header_1_0(head, shape)  # type: ignore[arg-type]
    with zipfile.ZipFile("x.npz") as packed:
        labels = packed.read("labels.npy")
    with zipfile.ZipFile("x.npz", "w") as packed:
        packed.writestr("inputs.npy", head.getvalue())
        packed.writestr("labels.npy", labels)
    return Bad("GiB of memory", code=MACHINE)


# --- folders --------------------------------------------------------------------------------------------------------


def with_images(rng: random.Random, **kind: bool) -> Path:
    """Writes a sound folder; returns one of its images."""
    own.folder(np.random.default_rng(rng.randrange(1000)), Path("x"), **kind)
    return rng.choice(sorted(Path("x").rglob("*.png")))


def png(width: int, height: int) -> bytes:
    """Returns a PNG that says so many pixels and holds none."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + head
        + struct.pack(">I", zlib.crc32(head))
        + struct.pack(">I", 0)
        + b"IDAT"
        + b"\0" * 4
    )


@malformed("folder")
def no_folder(rng: random.Random) -> Bad:
    root = rng.choice(("nope", "file", "empty"))
    Path("file").touch()
    Path("empty").mkdir()
    return Bad(
        {"nope": "nope: No such file", "file": "file: Not a directory", "empty": "empty: is empty"}[root],
        {"root": root},
    )


@malformed("folder")
def broken_image(rng: random.Random) -> Bad:
    path = with_images(rng)
    data = path.read_bytes()
    path.write_bytes(rng.choice((b"", rng.randbytes(200), data[:30], data[:-30], b"GIF89a", b"\xff\xd8\xff")))
    return Bad(f"{path}: damaged, or not an image")


@malformed("folder")
def unlike_size(rng: random.Random) -> Bad:
    from PIL import Image

    with_images(rng)
    path = rng.choice(sorted(Path("x").rglob("*.png"))[1:])
    Image.new("L", (7, 6)).save(path)
    return Bad(f"{path}: 7x6 pixels, x/broken/002.png has 5x6; data.size=28 resizes")


@malformed("folder")
def image_of_no_pixels(rng: random.Random) -> Bad:
    path = with_images(rng)
    path.write_bytes(png(*rng.choice(((0, 6), (5, 0), (0, 0)))))
    return Bad(f"{path}: ")


@malformed("folder")
def image_without_end(rng: random.Random) -> Bad:
    path = with_images(rng)
    path.write_bytes(png(2 ** rng.randint(14, 30), 2**15))
    return Bad(f"{path}: ", {"size": rng.choice((None, 8))})


@malformed("folder")
def image_of_sixteen_bits(rng: random.Random) -> Bad:
    from PIL import Image

    path = with_images(rng)
    Image.fromarray(np.zeros((6, 5), dtype=np.uint16)).save(path)
    return Bad(f"{path}: pixels of the kind 'I;16': must be grey or colour of 8 bits")


@malformed("folder")
def moving_image(rng: random.Random) -> Bad:
    from PIL import Image

    path = with_images(rng).with_suffix(".gif")
    pictures = [Image.new("L", (5, 6), shade) for shade in (0, 255)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    return Bad(f"{path}: holds 2 pictures: must be one")


@malformed("folder")
def another_file(rng: random.Random) -> Bad:
    path = with_images(rng).with_name(rng.choice(("notes.txt", "labels.csv", "image", "a.png.part")))
    path.write_text("x")
    return Bad(f"{path}: not an image by its name")


@malformed("folder")
def loose_file(rng: random.Random) -> Bad:
    with_images(rng)
    Path("x/loose.png").write_bytes(b"x")
    return Bad("x/loose.png: a file where folders of classes are expected")


@malformed("folder")
def deeper_folders(rng: random.Random) -> Bad:
    with_images(rng, devices=True)
    return Bad("a folder where images are expected; with folders of devices above the classes: data.devices=true")


@malformed("folder")
def flatter_folders(rng: random.Random) -> Bad:
    with_images(rng)
    return Bad(".png: a file where folders of classes are expected", {"devices": True})


@malformed("folder")
def empty_class(rng: random.Random) -> Bad:
    with_images(rng)
    Path("x/more").mkdir()
    return Bad("x/more: is empty")


@malformed("folder")
def one_class_of_images(rng: random.Random) -> Bad:
    with_images(rng)
    for name in ("worn", "broken"):
        for path in Path("x", name).iterdir():
            path.rename(Path("x/ok", path.name))
        Path("x", name).rmdir()
    return Bad("x: every image is of the class 'ok': two classes are the least")


@malformed("folder")
def device_without_a_test(rng: random.Random) -> Bad:
    with_images(rng, devices=True, split=True)
    os.makedirs("x/train/d9/ok")
    os.link("x/train/d0/ok/012.png", "x/train/d9/ok/1.png")
    return Bad("device 4 (d9) would have no test samples", {"devices": True}, CONFIG, "natural")


@malformed("folder")
def other_keys(rng: random.Random) -> Bad:
    with_images(rng)
    key, value = rng.choice((("size", 0), ("channels", 2), ("size", 5000)))
    return Bad(f"data.{key}={value}: must be", {key: value}, CONFIG)


# --- the laws -------------------------------------------------------------------------------------------------------


def files() -> dict[str, bytes | None]:
    """Returns everything below the folder of the test."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def refused(name: str, seed: int) -> None:
    """Spoils some data and asks for a run on them: one line of the right class, and nothing written."""
    kind, way = MALFORMED[name]
    bad = way(random.Random(f"{name} {seed}"))
    before = files()
    count = {"devices": 5, "fresh": 0} if name.endswith("without_a_test") else {"devices": 4, "fresh": 0}
    config = own.config_of(kind, bad.partition, **bad.keys)
    config.devices.count, config.devices.fresh = count["devices"], count["fresh"]
    try:
        life.begin_or_reopen(config)
    except FedpruneError as error:
        text, code = str(error), error.exit_code
    else:
        pytest.fail(f"{name} {seed}: was taken for sound")
    assert text == one_line(text)
    assert bad.words in text, (name, seed, text)
    assert code == bad.code, (name, seed, text)
    assert files() == before


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_refused_in_one_line(name: str) -> None:
    refused(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 301))
def test_three_hundred_malformed_data_are_refused_in_one_line(seed: int) -> None:
    refused([*MALFORMED][seed % len(MALFORMED)], seed)


@pytest.mark.parametrize("kind", own.REQUIRED)
def test_what_the_malformed_are_made_of_is_sound(kind: str) -> None:
    """Else a test above could pass for another reason."""
    rng, keys = random.Random(0), {"table": TABLE, "windows": SERIES}.get(kind, {})
    if kind == "arrays":
        saved(rng, "")
    elif kind == "folder":
        with_images(rng)
    else:
        {"table": own.table, "windows": own.series}[kind](rng).write()
    assert len(own.load(kind, **keys).labels) >= 60


def test_the_command_line_prints_one_line_and_writes_nothing() -> None:
    made = own.table(random.Random(0))
    made.put(5, "temp", "hot")
    made.write()
    before = files()
    ran = fedprune("train", "data=table", "data.file=x.csv", "data.label=state")
    assert ran.returncode == DATA
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: x.csv, line 7: temp='hot' is not a number, as 79 others of this column are")
    assert ran.stderr.count("\n") == 1
    assert files() == before
