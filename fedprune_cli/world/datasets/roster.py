"""The roster of a fleet whose data stay where they are: how many samples each device has, and their shape. No sample is here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fedprune_cli.errors import DataError
from fedprune_cli.store.files import Plain, fits, read_json
from fedprune_cli.world.datasets.dataset import Dataset, Source

CARD = {
    "train": int,
    "test": int,
    "shape": [int],
    "dtype": str,
    "scale": float,
    "classes": int,
    "labels": ([int], None),
}
MOST_SAMPLES, MOST_CLASSES = 10**9, 10**6


@dataclass(frozen=True)
class Card:
    """What a device says of its data: samples to train and to test on, the form of one, [C, H, W] of a type, and the number of classes.

    scale: by which inputs are divided; labels: how many samples of each class it has, None where it keeps that to itself.
    """

    train: int
    test: int
    shape: tuple[int, ...]
    dtype: str
    scale: float
    classes: int
    labels: tuple[int, ...] | None = None

    def as_plain(self) -> dict[str, Plain]:
        """Returns it as JSON has it; `read_card` reads it."""
        return json.loads(json.dumps(asdict(self)))


def read_card(value: Plain) -> Card:
    """Returns the card; raises ValueError for what cannot be one."""
    if not fits(value, CARD) or not isinstance(value, dict) or value.keys() != CARD.keys():
        raise ValueError("not the card of a device")
    fields = {key: tuple(one) if isinstance(one, list) else one for key, one in value.items()}
    card = Card(**fields)  # type: ignore[arg-type]  # which `fits` has checked
    sound = 1 <= card.train <= MOST_SAMPLES and 1 <= card.test <= MOST_SAMPLES and 1 <= card.classes <= MOST_CLASSES
    sound = sound and len(card.shape) == 3 and all(1 <= side <= 2**24 for side in card.shape) and card.scale > 0
    sound = sound and card.dtype in ("uint8", "float32")
    if card.labels is not None:
        counted = len(card.labels) == card.classes and min(card.labels) >= 0
        sound = sound and counted and sum(card.labels) == card.train + card.test
    if not sound:
        raise ValueError("the card of no device: its numbers contradict each other")
    return card


def read_cards(file: Path) -> list[Card]:
    """Returns the cards in a roster's file; raises DataError."""
    value: Mapping[str, Plain] = read_json(file, DataError)
    devices = value.get("devices")
    if not isinstance(devices, list) or not devices:
        raise DataError(f"{file}: not a roster: a list `devices` of at least one card is expected")
    cards = []
    for at, one in enumerate(devices):
        try:
            cards.append(read_card(one))
        except ValueError as error:
            raise DataError(f"{file}: devices[{at}]: {error}") from None
    return cards


def roster_json(cards: Sequence[Card]) -> bytes:
    """Returns the file of a roster: the cards of devices 0, 1, 2 and so on."""
    return (json.dumps({"devices": [card.as_plain() for card in cards]}, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Roster:
    """data=nodes: a roster file, which `fedprune serve` writes from what the nodes say. With partition=natural each card is a device."""

    name: str
    file: str

    def load(self) -> Dataset:
        """Returns a dataset with the roster's numbers in it and no sample: every input is zero, and takes no memory."""
        cards = read_cards(Path(self.file))
        first = cards[0]
        same = {(card.shape, card.dtype, card.scale, card.classes) for card in cards}
        if len(same) > 1:
            raise DataError(f"{self.file}: devices disagree about the form of their data: {sorted(same)[:3]}")
        sizes = np.array([[card.train, card.test] for card in cards]).ravel()
        owner = np.repeat(np.arange(len(cards)), sizes.reshape(-1, 2).sum(1))
        held_out = np.repeat(np.tile([False, True], len(cards)), sizes)
        labels = np.concatenate([_labels(card) for card in cards])
        inputs = np.broadcast_to(np.zeros((), first.dtype), (len(owner), *first.shape))
        names = tuple(f"device-{at}" for at in range(len(cards)))
        source = Source(owner, names, held_out)
        sha256 = hashlib.sha256(roster_json(cards)).hexdigest()
        return Dataset(self.name, inputs, labels, first.classes, first.scale, (0.0,), (1.0,), sha256, source)


def _labels(card: Card) -> np.ndarray:
    """Returns labels of which there are as many as the card says, in the order of the classes; all 0 where it does not say."""
    if card.labels is None:
        return np.zeros(card.train + card.test, dtype=np.int64)
    return np.repeat(np.arange(card.classes), card.labels)
