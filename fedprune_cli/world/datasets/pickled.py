"""Arrays in a pickle, read without unpickling it.

Unpickling calls whatever the file names. Here the file's opcodes are walked, and only values are built from them: numbers, text, tuples,
lists, dictionaries and numpy's arrays of numbers or of such values. No name in the file is looked up, imported or called: the four that
numpy writes are known by their spelling, and any other is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fedprune_cli.errors import DataError

Value: TypeAlias = Any  # whatever a pickle holds

_HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(127) + b"\n"
_ARRAY, _TYPE, _ENCODE, _CLASS = "array", "dtype", "encode", "class"
_KNOWN = {
    "numpy.core.multiarray _reconstruct": _ARRAY,
    "numpy._core.multiarray _reconstruct": _ARRAY,
    "numpy dtype": _TYPE,
    "numpy ndarray": _CLASS,
    "_codecs encode": _ENCODE,
}
_KINDS = frozenset(f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)) | {"O8"}
_MARK = object()


@dataclass
class _Name:
    """A name in the file."""

    kind: str


@dataclass
class _Kind:
    """A data type that is being built: numpy gives its byte order after its name."""

    code: str
    order: str = "|"


@dataclass
class _Made:
    """An array that is being built: numpy gives its content after it."""

    values: Value = None


class _OtherError(Exception):
    """The file holds something else."""


_MALFORMED = (
    _OtherError, ValueError, TypeError, KeyError, IndexError, AttributeError, StopIteration, EOFError, RecursionError, OverflowError,
)  # fmt: skip


def read_pickled_object(data: bytes, where: str) -> Value:
    """Returns the value in a .npy file that holds one pickled object; raises DataError for a file with anything but values in it."""
    try:
        if not data.startswith(_HEADER):
            raise _OtherError("no .npy file of one object")
        whole = _plain(_walk(data[len(_HEADER) :]))
        if not isinstance(whole, list) or len(whole) != 1:
            raise _OtherError("holds more than one object")
        return whole[0]
    except _MALFORMED as error:
        raise DataError(f"{where}: not a file of arrays ({error or type(error).__name__})") from None


def _walk(pickle: bytes) -> Value:
    """Returns what the opcodes leave on the stack, arrays still as they were made."""
    stack: list[Value] = []
    memo: dict[Value, Value] = {}
    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Name(_known(str(argument))))
        elif name in _ARGUMENT:
            stack.append(argument)
        elif name in _CONSTANT:
            stack.append(_CONSTANT[name]())
        elif name in _COUNT:
            size = _COUNT[name]
            stack[-size:] = [tuple(stack[-size:])]
        elif name in _STEP:
            _STEP[name](stack)
        else:
            raise _OtherError(f"opcode {name}")
    raise _OtherError("no end")


def _known(name: str) -> str:
    if name not in _KNOWN:
        raise _OtherError(f"the name {name!r}")
    return _KNOWN[name]


def _after_mark(stack: list[Value]) -> list[Value]:
    """Returns and removes what lies above the last mark, and the mark."""
    at = len(stack) - 1 - next(back for back, value in enumerate(reversed(stack)) if value is _MARK)
    above = stack[at + 1 :]
    del stack[at:]
    return above


def _reduce(stack: list[Value]) -> None:
    """Puts what numpy's call would make, from the call's name and arguments."""
    arguments, name = stack.pop(), stack.pop()
    if not isinstance(name, _Name):
        raise _OtherError("a call of what is no name")
    if name.kind == _ENCODE and arguments[1] == "latin1":
        stack.append(arguments[0].encode("latin1"))
    elif name.kind == _TYPE and arguments[0] in _KINDS:
        stack.append(_Kind(arguments[0]))
    elif name.kind == _ARRAY:
        stack.append(_Made())
    else:
        raise _OtherError(f"a call of {name.kind} with {str(arguments)[:40]}")


def _build(stack: list[Value]) -> None:
    """Gives an array its content, or a data type its byte order."""
    state, made = stack.pop(), stack[-1]
    if isinstance(made, _Kind):
        made.order = state[1]
        return
    if not isinstance(made, _Made):
        raise _OtherError("content for what is no array")
    _, shape, kind, by_column, content = state
    if kind.code == "O8":
        made.values = content
    else:
        flat = np.frombuffer(content, np.dtype(kind.order + kind.code))
        made.values = flat.reshape(shape, order="F" if by_column else "C")


def _append(stack: list[Value]) -> None:
    value = stack.pop()
    stack[-1].append(value)


def _appends(stack: list[Value]) -> None:
    values = _after_mark(stack)
    stack[-1].extend(values)


def _set_items(stack: list[Value]) -> None:
    values = _after_mark(stack)
    stack[-1].update(zip(values[::2], values[1::2], strict=True))


def _tuple(stack: list[Value]) -> None:
    stack.append(tuple(_after_mark(stack)))


def _plain(value: Value) -> Value:
    """Returns the value with its arrays in place of what they were made from."""
    if isinstance(value, _Made):
        return _plain(value.values)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, int | float | str | bytes | tuple | np.ndarray):
        return value
    raise _OtherError(f"a {type(value).__name__.lower()} as a value")


_ARGUMENT = frozenset({"BININT", "BININT1", "BININT2", "BINUNICODE", "BINFLOAT"})  # whose argument is the value
_CONSTANT: dict[str, Callable[[], Value]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_COUNT = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STEP: dict[str, Callable[[list[Value]], None]] = {
    "REDUCE": _reduce,
    "BUILD": _build,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEMS": _set_items,
    "TUPLE": _tuple,
}
