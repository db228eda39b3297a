"""What a file with a model says of it: what goes in and comes out, how large it is, and which round of which run it is from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedprune_cli.errors import DataError
from fedprune_cli.store.files import Plain, fits, parse_json

KEY = "fedprune"  # of the metadata, in every format
VERSION = 1  # of a description; raised when an older program could not read it
MAX_SIDE = 10**6


@dataclass(frozen=True)
class Input:
    """shape: of one sample (channels, height, width); dtype: `uint8` or `float32`; the network sees (x / scale - mean) / std, by channel.

    encoding: how a row of the source becomes a sample, where the source has rows.
    """

    shape: tuple[int, int, int]
    dtype: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encoding: Mapping[str, Plain]


@dataclass(frozen=True)
class Sizes:
    """shared, personal: entries of u and v_k in the network; kept: those that are not dropped, of a mask fewer than there are;

    dense: entries of the whole model, unpruned; bytes: of the float32 values; flops: of one sample's forward pass, as the network
    computes it: what a mask drops is computed all the same.
    """

    shared: int
    personal: int
    kept: int
    dense: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Origin:
    """Which state of which run: its configuration's hash, seed, round of how many, and the SHA-256 of its state.safetensors."""

    experiment: str
    method: str
    config_hash: str
    seed: int
    round: int
    rounds: int
    state_sha256: str
    fedprune: str
    torch: str


@dataclass(frozen=True)
class Description:
    """kind: `trained`, a device's own model; `fresh`, of a device that never trained; or `shared`, a newcomer's. device: its number,
    None for a newcomer; called: its name, else its number.

    model: the network's configuration; precision: what the run computed in; labels: of the classes; correct, total: what the run's
    last test found on the device's own test samples, None for a newcomer.
    """

    kind: str
    device: int | None
    called: str
    model: Mapping[str, Plain]
    precision: str
    labels: tuple[str, ...]
    input: Input
    sizes: Sizes
    run: Origin
    correct: int | None
    total: int | None

    def as_json(self) -> str:
        """Returns it as JSON."""
        return json.dumps({"version": VERSION, **asdict(self)})


_INPUT = {"shape": [int], "dtype": str, "scale": float, "mean": [float], "std": [float], "encoding": dict}
_SIZES = dict.fromkeys(Sizes.__dataclass_fields__, int)
_RUN = {key: int if of.type == "int" else str for key, of in Origin.__dataclass_fields__.items()}
_FORM = {
    "kind": str, "device": (int, None), "called": str, "model": {"name": str}, "precision": str, "labels": [str],
    "input": _INPUT, "sizes": _SIZES, "run": _RUN, "correct": (int, None), "total": (int, None),
}  # fmt: skip


def parse_description(text: str | bytes | None, where: str) -> Description:
    """Returns the description that a file holds; raises DataError for a file of another origin, of a later version, or a damaged one."""
    if text is None:
        raise DataError(f"{where}: no model that `fedprune export` wrote (it has no description of one)")
    try:
        value = parse_json(text.encode() if isinstance(text, str) else text)
    except ValueError as error:
        raise DataError(f"{where}: damaged (its description is not JSON: {error})") from None
    version = value.pop("version", None) if isinstance(value, dict) else None
    if version is None:
        raise DataError(f"{where}: no model that `fedprune export` wrote (its description has no version)")
    if version != VERSION:
        raise DataError(
            f"{where}: a model of version {version!r}, this fedprune reads version {VERSION}: use the one that wrote it"
        )
    if not fits(value, _FORM) or value.keys() != _FORM.keys() or not _sound(value["input"], len(value["labels"])):
        raise DataError(f"{where}: damaged (its description cannot be)")
    seen, sizes = value["input"], value["sizes"]
    tuples = {key: tuple(seen[key]) for key in ("shape", "mean", "std")}
    parts = {"input": Input(**{**seen, **tuples}), "sizes": Sizes(**sizes), "run": Origin(**value["run"])}
    return Description(**{**value, **parts, "labels": tuple(value["labels"])})


def _sound(seen: Mapping[str, Any], classes: int) -> bool:
    shape = seen["shape"]
    return (
        len(shape) == 3
        and all(0 < side <= MAX_SIDE for side in shape)
        and shape[0] == len(seen["mean"]) == len(seen["std"])
        and seen["dtype"] in ("uint8", "float32")
        and seen["scale"] > 0
        and all(seen["std"])
        and classes > 0
        and seen.keys() == _INPUT.keys()
    )
