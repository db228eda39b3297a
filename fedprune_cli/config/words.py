"""Words of the command line that stand for several values, `--seeds 0,1,2`: read strictly, refused with what to type instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from fedprune_cli.errors import ConfigError, unknown
from fedprune_cli.store.files import NUMBER

T = TypeVar("T")
MAX_ITEMS = 10_000
MAX_SEED = 2**63 - 1


def parse_names(text: str, option: str) -> tuple[str, ...]:
    """Returns the names of a list joined by commas, each once; raises ConfigError for an empty or a repeated one."""
    return _distinct(_items(text, option), text, option)


def parse_seeds(text: str, option: str = "--seeds") -> tuple[int, ...]:
    """Returns the seeds of a list joined by commas, each once; raises ConfigError for what is no seed."""
    seeds = []
    for item in _items(text, option):
        if not (item.isascii() and item.isdigit()):  # of other alphabets too, and superscripts, Python takes for digits
            raise ConfigError(
                f"{option} {text}: {item!r} must be a whole number from 0 on; several are joined by commas: 0,1,2"
            )
        if len(item.lstrip("0")) > 19 or int(item) > MAX_SEED:
            raise ConfigError(f"{option} {text}: {item} is too large, the largest seed is {MAX_SEED}")
        seeds.append(int(item))
    return _distinct(seeds, text, option)


def parse_numbers(text: str, option: str, fits: Callable[[float], bool], allowed: str) -> tuple[float, ...]:
    """Returns the numbers of a list joined by commas, each once; raises ConfigError, with what is `allowed`, unless `fits`."""
    numbers = []
    for item in _items(text, option):
        if not NUMBER.fullmatch(item) or not fits(float(item)):
            raise ConfigError(f"{option} {text}: {item!r} must be a number {allowed}; several are joined by commas")
        numbers.append(float(item))
    return _distinct(numbers, text, option)


def parse_choice(text: str, option: str, allowed: Iterable[str]) -> str:
    """Returns the text; raises ConfigError naming what is allowed when it is none of that."""
    if text not in (allowed := tuple(allowed)):
        raise unknown(option, text, allowed)
    return text


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if len(items) > MAX_ITEMS:
        raise ConfigError(f"{option}: {len(items)} items, at most {MAX_ITEMS} are read")
    if "" in items:
        rest = ",".join(filter(None, items))
        raise ConfigError(f"{option} {text}: an item is empty" + (f"; type {option} {rest}" if rest else ""))
    return items


def _distinct(items: list[T], text: str, option: str) -> tuple[T, ...]:
    seen = set[T]()
    for item in items:
        if item in seen:
            raise ConfigError(f"{option} {text}: {item} stands there twice")
        seen.add(item)
    return tuple(items)
