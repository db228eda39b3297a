"""Overrides, KEY=VALUE: parsed by Hydra's grammar, and refused in our own words that say what to type instead."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType

from fedprune_cli import CONF, plugins
from fedprune_cli.errors import ConfigError, unknown
from fedprune_cli.store.files import NUMBER

MAX_OVERRIDE = 10_000  # characters
KEY = re.compile(r"[A-Za-z_$][\w$-]*([./][\w$-]+)*", re.ASCII)
TYPOGRAPHIC = "“”„‟‘’‚‛«»‹›＂＇"
MINUS = str.maketrans("−–—", "---")
PAIRS = {"[": "]", "{": "}"}


def check_overrides(overrides: Sequence[str], *, sweep: bool = True, config_dir: Path | None = None) -> None:
    """Raises ConfigError for what Hydra would refuse in its own words, or run; `sweep`: several values joined by commas are allowed."""
    for override in overrides:
        parsed = parse_override(override, sweep=sweep)
        if parsed.value_type in (ValueType.SIMPLE_CHOICE_SWEEP, ValueType.CHOICE_SWEEP):
            _check_choices(parsed, config_dir)


def parse_override(text: str, *, sweep: bool = False) -> Override:
    """Returns one override, its key and value; raises ConfigError saying what to type instead."""
    _check_harmless(text)
    try:
        parsed = OverridesParser.create().parse_override(text)
    except Exception:  # whatever the grammar makes of it: why, is said here
        raise ConfigError(f"{text}: {_why(text)}") from None
    key = parsed.key_or_group
    if not key:
        raise ConfigError(f"{text}: a key is missing: must be KEY=VALUE")
    if parsed.package is not None:
        raise ConfigError(f"{text}: no key has an '@'")
    if parsed.is_sweep_override():
        if not sweep:
            value = text.partition("=")[2]
            a_list = "" if "(" in value else f"; a list is {key}=[{value.strip()}]"
            one = _or_quoted(text, ", and one text is " if a_list else "; one text is ")
            raise ConfigError(f"{text}: several values are for `fedprune train -m`{a_list}{one}")
        return parsed
    _check_choice(parsed, key)
    return parsed


def _check_harmless(text: str) -> None:
    """Raises ConfigError for what no file can hold, and for folders of configuration files that `check_config_dir` does not see."""
    if len(text) > MAX_OVERRIDE:
        raise ConfigError(f"{text[:40]}...: {len(text)} characters, at most {MAX_OVERRIDE} are read")
    if "\0" in text or (not text.isascii() and text != text.encode(errors="replace").decode()):
        raise ConfigError(f"{text!r}: is not text")
    if "_target_" in text:  # Hydra would build, and so run, whatever it names
        raise ConfigError(f"{text}: not allowed: no override names what is run")
    if text.lstrip("+~").startswith(("hydra.searchpath", "-cd", "-cp", "--config")):  # Hydra's spellings
        raise ConfigError(f"{text}: a folder of configuration files is given with --config-dir DIR")
    if text.startswith("-"):
        raise ConfigError(f"{text}: must be KEY=VALUE; options stand before a `--`")


def _check_choice(parsed: Override, key: str) -> None:
    """Raises ConfigError where a group is given something that can be no option's name."""
    value = parsed.value()
    folder = CONF / key
    if (
        parsed.is_delete()
        or isinstance(value, str | list | dict)
        or not re.fullmatch(r"[\w/]+", key)
        or not folder.is_dir()
    ):
        return
    options = [path.stem for path in folder.glob("*.yaml")]
    if options:
        options += plugins.names(key)
        raise unknown(f"{key} option", "null" if value is None else str(value), options)


def _check_choices(parsed: Override, config_dir: Path | None) -> None:
    """Raises ConfigError where a sweep over a group names an option that is in no folder, before any of its runs begins."""
    key = parsed.key_or_group
    folders = [root / key for root in (CONF, config_dir) if root is not None and (root / key).is_dir()]
    options = [path.stem for folder in folders for path in folder.glob("*.yaml")] + plugins.names(key)
    for name in parsed.sweep_string_iterator() if options else ():
        if name not in options and "[" not in name:
            raise unknown(f"{key} option", name, options)


def _why(text: str) -> str:
    """Says what is wrong with an override that the grammar refuses, and what to type instead."""
    sign, rest = re.fullmatch(r"([+~]*)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    key, equals, value = rest.partition("=")
    bare = key.strip().rstrip(":").rstrip()
    if not rest.strip() or (equals and not bare):
        return "a key is missing: must be KEY=VALUE"
    if sign not in ("", "+", "++", "~"):
        return f"{sign!r} begins no override: must be KEY=VALUE, or ~KEY to take one out"
    if not equals and sign != "~":
        return "must be KEY=VALUE"
    if not KEY.fullmatch(key):
        if KEY.fullmatch(bare) and equals:
            return f"type {bare}={value.strip()}"
        return f"{key!r} is no key: must be letters, digits, '_' and '-', joined by '.', such as training.lr"
    inner = value.strip()
    unmatched = _unmatched(inner)
    if inner[:1] in PAIRS and unmatched:
        return f"{unmatched} has no counterpart: a list is {key}=[1,2], a group {key}={{a: 1}}"
    if re.search(r"\$\{[^}]*$", inner):
        return "'${' has no '}'"
    if inner[:1] in PAIRS:
        return f"it cannot be read: a list is {key}=[1,2], a group {key}={{a: 1}}, and a text in them stands in quotation marks"
    if re.fullmatch(r"[\w\s.+-]*(,[\w\s.+-]*)+", inner):
        rest = ",".join(item.strip() for item in inner.split(",") if item.strip())
        return "an item between commas is empty" + (f": type {sign}{key}={rest}" if rest else "")
    if NUMBER.fullmatch(digits := unicodedata.normalize("NFKC", inner.translate(MINUS))):
        return f"digits and signs must be plain ones: type {sign}{key}={digits}"
    return "the value must be quoted" + _or_quoted(text, ": ")


def _unmatched(value: str) -> str | None:
    """Returns the first bracket without its counterpart, quoted text apart."""
    open_: list[str] = []
    for sign in re.sub(r"'[^']*'|\"[^\"]*\"", "", value):
        if sign in PAIRS:
            open_.append(sign)
        elif sign in PAIRS.values() and (not open_ or PAIRS[open_.pop()] != sign):
            return repr(sign)
    return repr(open_[-1]) if open_ else None


def _or_quoted(text: str, before: str) -> str:
    """Returns `before` and the override with its value quoted, for the shell, if that is sound; else nothing."""
    start, _, value = text.partition("=")
    value = value.strip()
    for marks in ("\"'" + TYPOGRAPHIC, ""):  # what was meant to quote does not belong to the value
        plain = value.strip(marks) if marks else value
        quoted = f"{start}={QuotedString(plain, Quote.double).with_quotes()}"
        try:
            if plain and OverridesParser.create().parse_override(quoted).value() == plain:
                return f"{before}{shlex.quote(quoted)}"
        except Exception:  # what no quoting makes sound
            continue
    return ""
