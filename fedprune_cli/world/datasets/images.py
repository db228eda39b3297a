"""Images of one's own in class folders, read by Pillow.

    ROOT/CLASS/image.png                    data.devices=false
    ROOT/DEVICE/CLASS/image.png             data.devices=true
    ROOT/train/..., ROOT/test/...           either of both below, when ROOT holds these two folders and no other

A class or a device is known by its folder's name. Hidden files are passed over.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fedprune_cli.errors import DataError, require
from fedprune_cli.store.files import Plain
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.dataset import Dataset, Source, image_dataset
from fedprune_cli.world.datasets.levels import coded
from fedprune_cli.world.datasets.room import check_room

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
PASSED_OVER = ("thumbs.db", "desktop.ini")
GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")
MOST_SIDE = 4096  # pixels
SPLIT = ["test", "train"]


@dataclass(frozen=True)
class Folder:
    """Images in class folders; `devices`: whether folders of devices stand above these."""

    name: str
    root: str
    devices: bool
    size: int | None
    channels: int | None

    def __post_init__(self) -> None:
        require(self.size is None or 1 <= self.size <= MOST_SIDE, "size", self.size, f"in 1..{MOST_SIDE} or null")
        require(self.channels in (None, 1, 3), "channels", self.channels, "1, 3 or null")

    @property
    def folder(self) -> Path:
        """Where the images are."""
        return Path(self.root)

    def load(self) -> Dataset:
        found = list(_find(self.folder, devices=self.devices))
        names, labels = coded([one.label for one in found])
        if len(names) < 2:
            raise DataError(f"{self.folder}: every image is of the class {names[0]!r}: two classes are the least")
        paths = [one.path for one in found]
        shape = _look(paths, self.size, self.channels)
        images = np.empty((len(paths), *shape), dtype=np.uint8)
        for at, path in enumerate(paths):
            images[at] = read_image(path, shape)
        owner_names, owner = coded([one.device for one in found]) if self.devices else ((), None)
        held = np.array([one.held_out for one in found]) if found[0].held_out is not None else None
        encoding: dict[str, Plain] = {"kind": "images", "channels": shape[0], "height": shape[1], "width": shape[2]}
        source = Source(owner, owner_names, held, None, names, encoding)
        return image_dataset(self.name, images, labels, len(names), 255.0, source)


@dataclass(frozen=True)
class _Found:
    """An image's file, and what its folders say of it; held_out is None where they do not say it."""

    path: Path
    label: str
    device: str
    held_out: bool | None


def _find(root: Path, *, devices: bool) -> Iterator[_Found]:
    """Yields the images in the order of their paths; raises DataError for what lies where it should not."""
    top = _entries(root)
    split = [path.name for path in top] == SPLIT and all(path.is_dir() for path in top)
    for part, held_out in ((root / "train", False), (root / "test", True)) if split else ((root, None),):
        for owner in _folders(part, "devices") if devices else [part]:
            for label in _folders(owner, "classes"):
                for path in _images(label, devices=devices):
                    yield _Found(path, label.name, owner.name, held_out)


def _entries(folder: Path) -> list[Path]:
    """Returns what a folder holds, hidden files left out, sorted; raises DataError when it cannot be read, or holds nothing."""
    try:
        names = sorted(name for name in os.listdir(folder) if name[0] != "." and name.lower() not in PASSED_OVER)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: {getattr(error, 'strerror', None) or error}") from None
    for name in names:
        if not name.isprintable():
            raise DataError(f"{folder}: {name!r}: a name that cannot be shown")
    if not names:
        raise DataError(f"{folder}: is empty")
    return [folder / name for name in names]


def _folders(folder: Path, of: str) -> list[Path]:
    entries = _entries(folder)
    if loose := next((path for path in entries if not path.is_dir()), None):
        raise DataError(f"{loose}: a file where folders of {of} are expected")
    return entries


def _images(folder: Path, *, devices: bool) -> list[Path]:
    entries = _entries(folder)
    for path in entries:
        if path.is_dir():
            hint = (
                "folders go deeper than devices and classes"
                if devices
                else "with folders of devices above the classes: data.devices=true"
            )
            raise DataError(f"{path}: a folder where images are expected; {hint}")
        if path.suffix.lower() not in ENDINGS:
            raise DataError(
                f"{path}: not an image by its name, which may end with {', '.join(ENDINGS)}; take it out of the folder"
            )
    return entries


def _look(paths: Sequence[Path], size: int | None, channels: int | None) -> tuple[int, int, int]:
    """Returns the channels, height and width that all images will have, seen from their heads; DataError when sizes are unlike."""
    sizes, colour = list[tuple[int, int]](), False
    for path in paths:
        size_of, mode, pictures = _use(path, lambda image: (image.size, image.mode, getattr(image, "n_frames", 1)))
        if mode not in GREY + COLOUR:
            raise DataError(
                f"{path}: pixels of the kind {mode!r}: must be grey or colour of 8 bits; data=arrays reads other numbers"
            )
        if pictures > 1:
            raise DataError(f"{path}: holds {pictures} pictures: must be one")
        sizes.append(size_of)
        colour = colour or mode in COLOUR
        _check_size(path, sizes[-1], None if size else (paths[0], sizes[0]))
    width, height = (size, size) if size else sizes[0]
    shape = (channels or (3 if colour else 1), height, width)
    needed = 3 * len(paths) * shape[0] * height * width
    check_room(
        f"{paths[0].parent.parent}: {len(paths)} images of {width}x{height} pixels", needed, "take a smaller data.size"
    )
    return shape


def _check_size(path: Path, size: tuple[int, int], first: tuple[Path, tuple[int, int]] | None) -> None:
    """Raises DataError for an image of no pixels, or, unless it is to be resized, of too many or of another size than the first one."""
    width, height = size
    if min(size) < 1:
        raise DataError(f"{path}: {width}x{height} pixels: must be at least one a side")
    if first is None:
        return
    if max(size) > MOST_SIDE:
        raise DataError(f"{path}: {width}x{height} pixels, at most {MOST_SIDE} a side; data.size=32 resizes all images")
    if size != first[1]:
        raise DataError(
            f"{path}: {width}x{height} pixels, {first[0]} has {first[1][0]}x{first[1][1]}; data.size=28 resizes all images to 28x28"
        )


def read_image(path: Path, shape: tuple[int, int, int]) -> Array:
    """Returns an image as uint8 [channels, height, width], converted and resized to that shape; raises DataError."""

    def pixels(image: Image) -> Array:
        plain = image.convert("L" if shape[0] == 1 else "RGB")
        if plain.size != (shape[2], shape[1]):
            plain = plain.resize((shape[2], shape[1]), resample=2)  # bilinear, over all pixels that become one
        return np.asarray(plain, dtype=np.uint8).reshape(shape[1], shape[2], shape[0])

    return _use(path, pixels).transpose(2, 0, 1)


def _use(path: Path, use: Callable[[Image], T]) -> T:
    """Returns what `use` makes of an image's file while it is open; raises DataError for whatever Pillow raises."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                return use(image)
        except Exception as error:  # whatever Pillow makes of a damaged file
            raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, MemoryError):
        raise error
    reason = " ".join(str(error).replace(str(path), "it").split())[:200]
    return DataError(
        f"{path}: damaged, or not an image ({getattr(error, 'strerror', None) or reason or type(error).__name__})"
    )
