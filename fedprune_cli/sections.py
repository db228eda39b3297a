"""Parts of a section: plug-ins whose fields are keys of one flat section of the configuration."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TypeVar

Part = TypeVar("Part")


def part_of(section: object, part: type[Part]) -> Part:
    """Returns the part, a dataclass, with the values that the section has for its fields; others keep their defaults.

    >>> from fedprune_cli.serve.aggregate import TrimmedMean
    >>> from types import SimpleNamespace
    >>> part_of(SimpleNamespace(aggregation="trimmed_mean", trim=0.1), TrimmedMean)
    TrimmedMean(trim=0.1)
    """
    names = [field.name for field in fields(part)] if is_dataclass(part) else []
    return part(**{name: getattr(section, name) for name in names if hasattr(section, name)})
