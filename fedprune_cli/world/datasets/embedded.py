"""Real data inside packages that are installed anyway: nothing to download, nothing to ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedprune_cli.errors import DataError, require
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.arrivals import reason
from fedprune_cli.world.datasets.dataset import Dataset, check_limit, image_dataset


@dataclass(frozen=True)
class Digits:
    """scikit-learn's embedded 1,797 handwritten digits, 8x8 pixels of 17 grey levels (UCI, test part of Optdigits)."""

    name: str
    limit: int | None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def load(self) -> Dataset:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = digits.images.astype(np.uint8)[: self.limit, None]
        return image_dataset(self.name, images, digits.target[: self.limit], 10, 16.0)


@dataclass(frozen=True)
class Patches:
    """Colour images of 32x32 pixels cut from three photographs that are installed anyway. Built here, and no standard benchmark.

    The photographs are scikit-learn's china.jpg and flower.jpg and matplotlib's grace_hopper.jpg. Each is cut into a grid of
    squares of `tile` pixels, enlarged to 32 by repetition: 3,264 images at 16, 13,280 at 8, 808 at 32 (nothing enlarged). The
    label is the quarter of the photograph that a square lies in: 12 classes. No pixel is in two images, so none is in training and
    test. What stays weak: neighbours look alike and come to lie on both sides of a split, as frames of one film would, so test
    accuracy flatters; and three photographs are no sample of the world. It compares methods, and says nothing of vision.
    """

    name: str
    tile: int
    limit: int | None
    side: ClassVar[int] = 32

    def __post_init__(self) -> None:
        require(self.tile in (8, 16, 32), "tile", self.tile, "8, 16 or 32")
        check_limit(self.limit)

    def load(self) -> Dataset:
        photographs = _photographs(self.name)
        cut = [_tiles(photograph, self.tile) for photograph in photographs]
        images = np.concatenate([tiles for tiles, _ in cut])
        labels = np.concatenate([quarter + 4 * index for index, (_, quarter) in enumerate(cut)])
        # steps of the golden ratio mix places and classes, so that the first samples are a fair part of all
        order = np.argsort(np.arange(len(labels)) * ((math.sqrt(5) - 1) / 2) % 1.0)
        order = order[: self.limit]
        enlarged = images[order].repeat(self.side // self.tile, axis=2).repeat(self.side // self.tile, axis=3)
        return image_dataset(self.name, enlarged, labels[order], 4 * len(photographs), 255.0)


def _photographs(name: str) -> list[Array]:
    """Returns the photographs uint8 [H, W, 3]; raises DataError when a package or its file is missing."""
    try:
        from matplotlib.cbook import get_sample_data
        from PIL import Image
        from sklearn.datasets import load_sample_image

        hopper = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
        return [load_sample_image("china.jpg"), load_sample_image("flower.jpg"), np.asarray(hopper)]
    except (ImportError, AttributeError, OSError) as error:
        raise DataError(
            f"{name} cannot be had: {reason(error)}. Its photographs come with pip's packages: "
            "pip install scikit-learn matplotlib pillow"
        ) from None


def _tiles(photograph: Array, tile: int) -> tuple[Array, Array]:
    """Returns the whole squares of a photograph, uint8 [N, 3, tile, tile] row by row, and the quarter 0..3 of each [N]."""
    rows, columns = photograph.shape[0] // tile, photograph.shape[1] // tile
    grid = photograph[: rows * tile, : columns * tile].reshape(rows, tile, columns, tile, 3)
    row, column = np.indices((rows, columns)).reshape(2, -1)
    return grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile, tile), 2 * (2 * row // rows) + 2 * column // columns
