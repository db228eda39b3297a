"""What a model is asked about: an .npz of samples, an image or a folder of them, or the rows of a table; and what their labels are."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from fedprune_cli.errors import DataError, one_line, unknown
from fedprune_cli.round.setup import Setup
from fedprune_cli.store.files import read_bytes
from fedprune_cli.store.state import Array
from fedprune_cli.take_home.description import Input
from fedprune_cli.take_home.take import Samples, describe_input, label_names

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TABLES = (".csv", ".parquet")
MAX_BYTES = 2**33  # of samples, unpacked
MAX_IMAGES = 10**6


@dataclass(frozen=True)
class Asked:
    """inputs: [n, C, H, W] of the type that the network takes; labels: int64 [n], -1 where a sample has none; names: of the samples."""

    inputs: Array
    labels: Array
    names: tuple[str, ...]


def read_asked(path: Path, seen: Input, classes: Sequence[str]) -> Asked:
    """Returns the samples in a file or a folder for a model that takes `seen`; raises DataError for what is none, or not what it takes."""
    if path.is_dir() or path.suffix.lower() in IMAGES:
        asked = _read_images(path, seen, classes)
    elif path.suffix.lower() == ".npz":
        asked = _read_arrays(path, seen, classes)
    elif path.suffix.lower() in TABLES:
        asked = _read_rows(path, seen, classes)
    else:
        raise DataError(f"{path}: must be an .npz, an image, a folder of images, a .csv or a .parquet")
    if not len(asked.inputs):
        raise DataError(f"{path}: there are no samples in it")
    return asked


def read_newcomers(path: Path, setup: Setup) -> Samples:
    """Returns labelled samples for a newcomer to a run; raises DataError as `read_asked` does, and for a sample without a label."""
    asked = read_asked(path, describe_input(setup), label_names(setup))
    if (asked.labels < 0).any():
        raise DataError(
            f"{path}: sample {asked.names[int(np.argmax(asked.labels < 0))]} has no label: a newcomer trains on labelled ones"
        )
    return Samples(asked.inputs, asked.labels)


# --- arrays ---------------------------------------------------------------------------------------------------------


DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError, RuntimeError, KeyError)


def _read_arrays(path: Path, seen: Input, classes: Sequence[str]) -> Asked:
    """Reads `inputs` [n, ...] and, where there are any, `labels` [n], under the names that they had in the run's own file."""
    called, labelled = (str(seen.encoding.get(key, key)) for key in ("inputs", "labels"))
    read_bytes(path, MAX_BYTES, DataError)  # says what is wrong with a file that cannot be read
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(one.file_size for one in packed.infolist())
        if size > MAX_BYTES:
            raise DataError(f"{path}: {size} bytes unpacked, at most {MAX_BYTES} are read")
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays.files)
            found = {name: arrays[name] for name in names if name in (called, labelled)}
    except DAMAGED as error:
        raise DataError(f"{path}: damaged, or no arrays of numbers ({' '.join(str(error).split())[:100]})") from None
    if called not in found:
        has = ", ".join(map(one_line, names[:10])) or "nothing"
        raise DataError(
            f"{path}: there is no array {called!r} in it, but {has}; {called!r} [samples, ...] is needed, {labelled!r} [samples] may be"
        )
    inputs = found[called]
    if seen.encoding.get("layout") == "channels_last" and inputs.ndim == 4:
        inputs = inputs.transpose(0, 3, 1, 2)
    inputs = _fitting(inputs, seen, str(path))
    labels = np.full(len(inputs), -1)
    if labelled in found:
        labels = _labels(found[labelled], len(inputs), classes, str(path), named="kind" in seen.encoding)
    return Asked(inputs, labels, tuple(map(str, range(len(inputs)))))


def _fitting(inputs: Array, seen: Input, where: str) -> Array:
    """Returns inputs in the shape and type that the network takes; axes of length 1 may be left out."""
    shape = tuple(side for side in seen.shape if side != 1)
    if inputs.ndim < 1 or tuple(side for side in inputs.shape[1:] if side != 1) != shape:
        raise DataError(
            f"{where}: inputs have the shape {list(inputs.shape)}, the model takes [samples, {', '.join(map(str, seen.shape))}]"
        )
    if inputs.dtype.kind not in "uif":
        raise DataError(f"{where}: inputs are of type {inputs.dtype}, must be numbers")
    inputs = inputs.reshape(-1, *seen.shape)
    if not np.isfinite(inputs).all():
        raise DataError(
            f"{where}: sample {int(np.argwhere(~np.isfinite(inputs))[0][0])} holds a value that is not finite"
        )
    if seen.dtype == "float32":
        return inputs.astype(np.float32)
    if inputs.size and (inputs.min() < 0 or inputs.max() > 255 or (inputs != np.rint(inputs)).any()):
        raise DataError(
            f"{where}: inputs must be whole numbers in 0..255, raw and not normalised: the model does that itself"
        )
    return inputs.astype(np.uint8)


def _labels(labels: Array, count: int, classes: Sequence[str], where: str, *, named: bool) -> Array:
    """Returns labels as indices into the classes, int64 [n]; named: a number is a class's name too, and not its index."""
    if labels.shape != (count,):
        raise DataError(f"{where}: labels have the shape {list(labels.shape)}, must be [{count}], one for each sample")
    if labels.dtype.kind in "US" or named:
        code = {name: at for at, name in enumerate(classes)}
        texts = [str(label) for label in labels.astype(str)]
        if strange := next((text for text in texts if text not in code), None):
            raise DataError(f"{where}: {unknown('label', strange, classes)}")
        return np.array([code[text] for text in texts], dtype=np.int64)
    if labels.dtype.kind not in "ui" or (count and not (labels.min() >= 0 and labels.max() < len(classes))):
        raise DataError(f"{where}: labels must be names of classes, or whole numbers in 0..{len(classes) - 1}")
    return labels.astype(np.int64)


# --- images ---------------------------------------------------------------------------------------------------------


def _read_images(path: Path, seen: Input, classes: Sequence[str]) -> Asked:
    """Reads an image, or those of a folder; the label of one in a folder that is called like a class is that class."""
    from fedprune_cli.world.datasets.images import read_image

    kind = seen.encoding.get("kind", "images")
    if (
        kind not in ("images", "arrays")
        or seen.dtype != "uint8"
        or min(seen.shape[1:]) == 1
        or seen.shape[0] not in (1, 3)
    ):
        raise DataError(f"{path}: this model does not take images, but samples of the shape {list(seen.shape)}")
    paths = sorted(_images_in(path)) if path.is_dir() else [path]
    if not paths:
        raise DataError(f"{path}: there are no images in it ({', '.join(IMAGES)})")
    code = {name: at for at, name in enumerate(classes)}
    labels = [code.get(one.parent.name, -1) if path.is_dir() and one.parent != path else -1 for one in paths]
    if "kind" in seen.encoding and kind == "images":  # of any size: the run resized its own in the same way
        inputs = np.stack([read_image(one, seen.shape) for one in paths])
    else:
        inputs = np.stack([_read_image(one, seen) for one in paths])
    return Asked(
        inputs, np.array(labels), tuple(str(one.relative_to(path)) if path.is_dir() else one.name for one in paths)
    )


def _images_in(path: Path) -> Iterator[Path]:
    for count, one in enumerate(path.rglob("*")):
        if count > MAX_IMAGES:
            raise DataError(f"{path}: more than {MAX_IMAGES} files")
        if one.suffix.lower() in IMAGES and one.is_file():
            yield one


def _read_image(path: Path, seen: Input) -> Array:
    """Returns an image as the model's raw input [C, H, W]; its pixels must be as many as the model takes."""
    from PIL import Image, UnidentifiedImageError

    channels, height, width = seen.shape
    try:
        with Image.open(path) as image:
            if image.size != (width, height):
                raise DataError(f"{path}: has {image.width}x{image.height} pixels, the model takes {width}x{height}")
            pixels = _pixels(image, channels)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: no image that can be read ({type(error).__name__})") from None
    # a model may count its grey levels otherwise
    levels = pixels if seen.scale == 255 else np.rint(pixels * (seen.scale / 255))
    return levels.astype(seen.dtype)


def _pixels(image: Image, channels: int) -> Array:
    values = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return values[None] if channels == 1 else values.transpose(2, 0, 1)


# --- rows of a table ------------------------------------------------------------------------------------------------


def _read_rows(path: Path, seen: Input, classes: Sequence[str]) -> Asked:
    """Reads the rows of a table by the encoding that the run learnt; labels stand in the run's own column of them, where it is there."""
    from fedprune_cli.world.datasets.encoding import encode_table, labels_of
    from fedprune_cli.world.datasets.sheets import read_sheet
    from fedprune_cli.world.datasets.windows import encode_windows, window_labels

    kind, encoding = seen.encoding.get("kind"), seen.encoding
    if kind not in ("table", "windows"):
        raise DataError(
            f"{path}: this model takes no rows of a table, but samples of the shape {list(seen.shape)} in an .npz"
        )
    try:
        sheet = read_sheet(str(path), cast(list[str], encoding["marks"]))
        if kind == "table":
            inputs, labels = encode_table(sheet, encoding), labels_of(sheet, encoding, classes)
            names = [str(row + 1) for row in range(len(inputs))]
        else:
            inputs, first = encode_windows(sheet, encoding)
            labels = window_labels(sheet, encoding, classes, first)
            names = [f"from row {row + 1}" for row in first.tolist()]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: the model's encoding of rows is damaged ({type(error).__name__})") from None
    return Asked(
        _fitting(inputs, seen, str(path)), np.full(len(inputs), -1) if labels is None else labels, tuple(names)
    )
