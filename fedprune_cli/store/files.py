"""What comes in from files: read whole and up to a limit only, and refused in one line when it is too large or nested too deeply."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from fedprune_cli.errors import FedpruneError

# What a JSON or a YAML file can say.
Plain: TypeAlias = bool | int | float | str | list["Plain"] | dict[str, "Plain"] | None

# Python reads 1_0 and digits of every alphabet too; what no spreadsheet would is refused.
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MAX_JSON_BYTES = 2**28
MAX_NUMBER = 1e300
MAX_YAML_BYTES = 200_000
MAX_YAML_DEPTH = 50
MAX_YAML_VALUES = 20_000  # with every alias written out


def read_bytes(path: Path, most: int, error: type[FedpruneError]) -> bytes:
    """Returns a plain file's content; raises `error` when it cannot be read or has more than `most` bytes.

    A device or a pipe, which may never end, is refused.
    """
    data = bytearray()
    for part in _parts(path, error):
        data += part
        if len(data) > most:
            raise error(f"{path}: more than the {most} bytes that are read at most")
    return bytes(data)


@dataclass(frozen=True)
class Digest:
    """A file's SHA-256, and its content unless that is larger than was asked for."""

    sha256: str
    content: bytes | None


def read_digest(path: Path, most: int, error: type[FedpruneError]) -> Digest:
    """Returns the SHA-256 of a plain file of any size, and its content when that has at most `most` bytes; raises `error`."""
    digest, size, data = hashlib.sha256(), 0, bytearray()
    for part in _parts(path, error):
        digest.update(part)
        size += len(part)
        data += part if size <= most else b""
    return Digest(digest.hexdigest(), bytes(data) if size <= most else None)


def _parts(path: Path, error: type[FedpruneError]) -> Iterator[bytes]:
    """Yields a plain file's content piece by piece; raises `error` when it cannot be read, or is none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # asked first: a pipe blocks whoever opens it
            raise error(f"{path}: not a plain file")
        with path.open("rb") as file:
            while part := file.read(2**22):
                yield part
    except OSError as refused:
        raise error(f"{path}: {refused.strerror}") from None
    except ValueError as refused:  # a NUL or half a character in the name
        raise error(f"{str(path)!r}: no file can have this name ({refused})") from None


def parse_json(data: bytes) -> Any:
    """Returns the JSON value; raises ValueError for anything else, NaN, infinities and nesting without end included."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is too large")
        return value

    try:
        return json.loads(data, parse_constant=refuse, parse_float=number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def fits(value: object, form: object) -> bool:
    """Whether a JSON value has a form: a type, one of a tuple of forms, {key: form} with any further keys, [the form of every item].

    `float` stands for any number that arithmetic can take, None for null.
    """
    if isinstance(form, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], of) for key, of in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    if isinstance(form, tuple):
        return any(fits(value, of) for of in form)
    if form is None or isinstance(value, bool):
        return value is form or (form is bool and isinstance(value, bool))
    if form is float:
        return isinstance(value, int | float) and abs(value) <= MAX_NUMBER
    if form is int:
        return isinstance(value, int) and abs(value) <= 2**63
    return isinstance(form, type) and isinstance(value, form)


def read_json(path: Path, error: type[FedpruneError]) -> dict[str, Any]:
    """Returns the JSON object in a file; raises `error` naming the file when it is missing, damaged or too large."""
    try:
        value = parse_json(read_bytes(path, MAX_JSON_BYTES, error))
    except ValueError as reason:
        raise error(f"{path}: damaged ({reason})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: damaged (not a JSON object)")
    return value


def read_yaml(path: Path, error: type[FedpruneError]) -> str:
    """Returns a YAML file's text, sound and small enough to be loaded; raises `error` naming what it has too much of.

    It is counted before anything is built: a few lines of aliases can stand for more values than any memory holds.
    """
    import yaml

    data = read_bytes(path, MAX_YAML_BYTES, error)
    try:
        text = data.decode()
        sizes, anchors, open_ = [0], dict[str, int](), list[str | None]()
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                if event.anchor not in anchors:
                    raise error(f"{path}: alias *{event.anchor} stands for nothing that ends before it")
                sizes[-1] += anchors[event.anchor]
            elif isinstance(event, yaml.ScalarEvent):
                sizes[-1] += 1
                anchors |= {event.anchor: 1} if event.anchor else {}
            elif isinstance(event, yaml.CollectionStartEvent):
                sizes.append(1)
                open_.append(event.anchor)
            elif isinstance(event, yaml.CollectionEndEvent):
                size, anchor = sizes.pop(), open_.pop()
                sizes[-1] += size
                anchors |= {anchor: size} if anchor else {}
            if len(sizes) > MAX_YAML_DEPTH:
                raise error(f"{path}: nested more than {MAX_YAML_DEPTH} levels deep")
            if sizes[-1] > MAX_YAML_VALUES:
                raise error(f"{path}: more than {MAX_YAML_VALUES} values")
    except (yaml.YAMLError, ValueError) as reason:
        raise error(f"{path}: not YAML ({' '.join(str(reason).split())})") from None
    return text
