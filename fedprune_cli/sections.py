"""Parts of a configuration: plug-ins whose fields are keys of one flat section, and fields that a part was given later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TypeVar

Part = TypeVar("Part")

# Of a field that an existing part was given: at its default a configuration is the one that it was before there was the field.
LATER: Mapping[str, bool] = {"later": True}


def part_of(section: object, part: type[Part]) -> Part:
    """Returns the part, a dataclass, with the values that the section has for its fields; others keep their defaults.

    >>> from fedprune_cli.serve.aggregate import TrimmedMean
    >>> from types import SimpleNamespace
    >>> part_of(SimpleNamespace(aggregation="trimmed_mean", trim=0.1), TrimmedMean)
    TrimmedMean(trim=0.1)
    """
    names = [field.name for field in fields(part)] if is_dataclass(part) else []
    return part(**{name: getattr(section, name) for name in names if hasattr(section, name)})


def as_before(part: object) -> list[str]:
    """Returns the fields of a part that it was given later and that have their default: they are left out of its identity."""
    given = [field for field in fields(part) if field.metadata.get("later")] if is_dataclass(part) else []
    return [field.name for field in given if getattr(part, field.name) == field.default]
