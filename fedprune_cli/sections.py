"""Parts of a section: plug-ins whose fields are keys of one flat section of the configuration."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TypeVar

Part = TypeVar("Part")


def part_of(section: object, part: type[Part]) -> Part:
    """Returns the part, a dataclass, with the values that the section has for its fields; others keep their defaults."""
    names = [field.name for field in fields(part)] if is_dataclass(part) else []
    return part(**{name: getattr(section, name) for name in names if hasattr(section, name)})
