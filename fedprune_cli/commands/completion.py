"""What the Tab key offers: groups, their options, and keys with the values that are known. Reads conf/ and nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedprune_cli import CONF, plugins
from fedprune_cli.store.files import Plain

# Typer's own script takes the words that bash has split, and bash splits at '='. This one splits the line at blanks, and gives bash back
# only what comes after the last '=' where bash will put it there; it changes nothing for other programs.
BASH = """\
_fedprune_completion() {
    local line=${COMP_LINE:0:COMP_POINT} words current IFS=$' \\t\\n'
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[-1]}
    IFS=$'\\n'
    COMPREPLY=($(COMP_WORDS="$line" COMP_CWORD=$((${#words[@]} - 1)) _FEDPRUNE_COMPLETE=complete_bash "$1"))
    [[ $COMP_WORDBREAKS == *=* && $current == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*=}"}"}")
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
    return 0
}
complete -o default -F _fedprune_completion fedprune
"""


def complete_override(incomplete: str) -> list[str]:
    """Returns the overrides that a word may become: `key=` for keys and groups, `key=value` once the key is there."""
    key, equals, value = incomplete.partition("=")
    if not equals:
        return sorted(f"{name}=" for name in {*groups(), *keys()} if name.startswith(incomplete))
    *before, last = value.split(",")  # a sweep's list
    start = "".join(f"{item}," for item in before)
    return sorted(
        f"{key}={start}{name}" for name in values(key.lstrip("+")) if name.startswith(last) and name not in before
    )


def groups() -> dict[str, list[str]]:
    """Returns the groups of conf/ with the names of their options, those of plug-ins last."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONF.rglob("*.yaml")):
        if path.parent != CONF:
            found.setdefault(path.parent.relative_to(CONF).as_posix(), []).append(path.stem)
    return {group: [*options, *plugins.names(group)] for group, options in found.items()}


def keys() -> dict[str, Plain]:
    """Returns the dotted keys of the configuration and of every option of its groups, with their values."""
    found = dict(_leaves(_read(CONF / "config.yaml"), ""))
    found |= {f"{kind.key}.{name}": None for kind in plugins.KINDS for name in plugins.fields_of_files(kind)}
    for group, options in groups().items():
        if group != "experiment" and not group.startswith("hydra"):
            for path in (CONF / group / f"{option}.yaml" for option in options if option not in plugins.names(group)):
                everywhere = path.read_text().startswith("# @package _global_")
                found |= _leaves(_read(path), "" if everywhere else f"{group}.")
    return {
        key: value
        for key, value in found.items()
        if key.split(".")[0] not in ("hydra", "defaults") and not key.endswith(".name")
    }


def values(key: str) -> list[str]:
    """Returns the values that are known for a key: a group's options, or both of a switch."""
    if key in (of := groups()):
        return of[key]
    return ["true", "false"] if isinstance(keys().get(key), bool) else []


def _read(path: Path) -> dict[str, Plain]:
    import yaml

    content = yaml.safe_load(path.read_text())
    return content if isinstance(content, dict) else {}


def _leaves(content: dict[str, Plain], prefix: str) -> Iterator[tuple[str, Plain]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif key != "defaults":
            yield f"{prefix}{key}", value
