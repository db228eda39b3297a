"""Writes docs/reference/ from the program itself: its commands, its groups and its keys.

Nothing on these pages is typed in twice. Commands and options come from the Typer application, exit codes from the error classes, choices
from the registries and conf/, defaults from the YAML files, what is allowed from the classes' own `require` calls, and what a key means
from the comment beside it, or else from the docstring of its class. `make reference` writes the pages; a test compares them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from typer.models import ArgumentInfo, OptionInfo

from fedprune_cli import CONF, errors

# Where the program keeps what is documented here. When a module moves, this is the place to say so.
from fedprune_cli.commands.app import app
from fedprune_cli.config.build import GROUPS, SECTIONS, UNITS
from fedprune_cli.config.experiment import Experiment

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "reference"
GENERATED = "<!-- Written by `make reference` from the program itself. Do not edit: a test compares it. -->\n"
SIGNALS = {  # exit code: what it means
    130: "Ctrl-C (SIGINT) ended the command. Every finished round is safe.",
    143: "SIGTERM ended the command. Every finished round is safe.",
}

# Units by the end of a key's name; the first one that fits counts.
UNIT_OF = (
    ("_dbm_per_hz", "dBm/Hz"), ("_dbm", "dBm"), ("_db", "dB"), ("_ghz", "GHz"), ("_mhz", "MHz"), ("_km", "km"), ("_m", "m"),
    ("_j", "J"), ("seconds", "s"), ("_steps", "steps"), ("_rounds", "rounds"), ("cycles_per_flop", "cycles"), ("bits", "bits"),
    ("energy_coefficient", "J s²/cycle"),
)  # fmt: skip
SCALE = {"_ghz": 1e9, "_mhz": 1e6, "_km": 1e3}  # of what the classes check in SI units


def pages() -> dict[str, str]:
    """Returns the text of every page by its file's name."""
    return {"commands.md": commands_page(), "groups.md": groups_page(), "keys.md": keys_page()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [
        header,
        ["---"] * len(header),
        *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def prose(text: str) -> str:
    """Returns a comment as text of a page: what would be taken for an HTML tag shows."""
    return re.sub(r"<(?=\w)", "&lt;", text)


# --- commands -------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Returns the page of all commands with their arguments and options, and of the exit codes."""
    commands = {str(info.name or of(info).__name__): of(info) for info in app.registered_commands}
    text = [
        GENERATED, "# Commands\n", f"{app.info.help}\n",
        table(["command", "what it does"],
              [[f"[`fedprune {name}`](#fedprune-{name})", paragraphs(function)[0]] for name, function in commands.items()]),
        "Options of `fedprune` itself:\n",
        table(["option", "what it does"],
              [*option_rows(app.registered_callback.callback), COMPLETION, HELP]),
    ]  # fmt: skip
    for name, function in commands.items():
        text += [f"## fedprune {name}\n", "\n\n".join(paragraphs(function)) + "\n"]
        arguments = argument_rows(function)
        text.append(
            f"```text\n{' '.join(['fedprune', name, '[OPTIONS]', *(row[0].strip('`') for row in arguments)])}\n```\n"
        )
        if arguments:
            text.append(table(["argument", "what it is"], arguments))
        text.append(table(["option", "what it does"], [*option_rows(function), HELP]))
    text += ["## Exit codes\n", "What to do about each: [errors](../errors.md).\n", exit_codes()]
    return "\n".join(text)


HELP = ["`--help`", "Show the help and exit."]
COMPLETION = [
    "`--install-completion`",
    "Install completion for zsh, fish or PowerShell. For bash: `fedprune completion`.",
]


def of(info: Any) -> Callable[..., Any]:
    """Returns the function of a registered command."""
    assert info.callback is not None
    return info.callback


def paragraphs(function: Callable[..., Any]) -> list[str]:
    """Returns the help of a command by paragraph, each in one line."""
    return [" ".join(part.split()) for part in inspect.cleandoc(function.__doc__ or "").split("\n\n")]


def parameters(function: Callable[..., Any], kind: type) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yields name, type, Typer's description and default of a command's arguments, or of its options."""
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        for described in getattr(hints[name], "__metadata__", ()):
            if isinstance(described, kind):
                yield name, hints[name].__origin__, described, parameter.default


def argument_rows(function: Callable[..., Any]) -> list[list[str]]:
    """Returns the arguments of a command: how a usage line shows each, and what it is."""
    rows = []
    for name, type_, described, default in parameters(function, ArgumentInfo):
        several = "list" in str(type_)
        shown = (described.metavar or name.upper()).removesuffix("...").strip("[]")
        shown = shown if default is inspect.Parameter.empty else f"[{shown}]"
        known = default not in (None, inspect.Parameter.empty)
        rows.append(
            [f"`{shown}{'...' if several else ''}`", f"{described.help}{f' Default: `{default}`.' if known else ''}"]
        )
    return rows


TAKES = {"int": "NUMBER", "float": "NUMBER", "Path": "PATH", "str": "TEXT"}


def option_rows(function: Any) -> Iterator[list[str]]:
    """Yields the options of a command: how each is spelt, and what it does and by default is."""
    for name, type_, described, default in parameters(function, OptionInfo):
        kind = next((word for key, word in TAKES.items() if re.search(rf"\b{key}\b", str(type_))), "")
        declared = [
            described.default,
            *(described.param_decls or ()),
        ]  # the first one stands in Typer's place for a default
        spelt = [word for word in declared if isinstance(word, str) and word.startswith("-")] or [
            f"--{name.replace('_', '-')}"
        ]
        known = default not in (None, False, inspect.Parameter.empty)
        text = f"{described.help}{f' Default: `{default}`.' if known else ''}"
        if described.min is not None or described.max is not None:
            text += (
                f" In {described.min}..{described.max}." if described.max is not None else f" At least {described.min}."
            )
        if "list" in str(type_):
            text += " May be given several times."
        yield [", ".join(f"`{word} {kind}`".replace(" `", "`") for word in spelt), text]


def exit_codes() -> str:
    """Returns the table of the exit codes, from the error classes."""
    found: dict[int, list[str]] = {0: ["The command did what was asked."]}
    for cls in kinds_of_error():
        found.setdefault(cls.exit_code, []).append(f"`{cls.__name__}`: {first_sentence(cls)}")
    found |= {code: [text] for code, text in SIGNALS.items()}
    return table(["code", "meaning"], [[str(code), "<br>".join(texts)] for code, texts in sorted(found.items())])


def kinds_of_error() -> list[type[errors.FedpruneError]]:
    """Returns the error classes that a command may end with: all but their base, whose exit code no command has."""
    base = errors.FedpruneError
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, base) and cls is not base]


def first_sentence(cls: type) -> str:
    """Returns the first sentence of a class's docstring."""
    text = " ".join((cls.__doc__ or "").split())
    return re.split(r"(?<=\.)\s", re.split(r"; `", text)[0])[0].removesuffix(".") + "."


# --- groups ---------------------------------------------------------------------------------------------------------


def groups_page() -> str:
    """Returns the page of all groups with their choices, the experiments, and the launchers and sweepers."""
    chosen = defaults()
    text = [
        GENERATED, "# Groups\n",
        "A group is a folder of `conf/`; `GROUP=CHOICE` on the command line picks one of its files. The keys that each file sets are on "
        "[the page of the keys](keys.md).\n",
    ]  # fmt: skip
    for group in (name for name in folders() if name != "experiment" and not name.startswith("hydra")):
        text.append(f"## {group}\n")
        rows = [
            [f"`{group}={path.stem}`" + (" (default)" if path.stem == chosen.get(group) else ""), comment(path)]
            for path in options(group)
        ]
        text.append(table(["choice", "what it is"], rows))
    text += ["## experiment\n", "`fedprune compare experiment=NAME` runs an experiment's arms; the minutes are those of the command "
             "in the file, on two cores.\n"]  # fmt: skip
    rows = [
        [f"`experiment={path.stem}`", field_of(path, "Question"), field_of(path, "Minutes")]
        for path in options("experiment")
    ]
    text.append(table(["choice", "what it asks", "minutes"], rows))
    for group in (name for name in folders() if name.startswith("hydra")):
        text += [
            f"## {group}\n",
            table(["choice", "what it is"], [[f"`{group}={p.stem}`", comment(p)] for p in options(group)]),
        ]
    return "\n".join(text)


def folders() -> list[str]:
    """Returns the groups of conf/, in the order of the main file's defaults where it names them."""
    found = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."}
    named = [name for name in defaults() if name in found]
    return [*named, *sorted(found - {*named})]


def options(group: str) -> list[Path]:
    """Returns the files of a group: in the order of the registry where it has one, else the default and then by name."""
    order = [*GROUPS.get(group, [defaults().get(group)])]
    paths = sorted((CONF / group).glob("*.yaml"))
    return sorted(paths, key=lambda path: order.index(path.stem) if path.stem in order else len(order))


def defaults() -> dict[str, str]:
    """Returns the choices of the main file's defaults by group."""
    entries = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    return {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}


def comment(path: Path) -> str:
    """Returns the comment at the top of a file, in one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.lstrip("# ") for line in lines if not line.startswith("# @package"))


def field_of(path: Path, name: str) -> str:
    """Returns what stands after `# NAME:` in an experiment's file, the lines that go on with it included."""
    found = re.search(rf"^# {name}:((?:.*\n)(?:#  .*\n)*)", path.read_text(), re.MULTILINE)
    return " ".join(found[1].replace("#", " ").split()) if found else ""


# --- keys -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Key:
    """A key as its page shows it, by the choices that have it: its default, what is allowed and what it means."""

    defaults: dict[str, str]
    allowed: dict[str, str]
    meanings: dict[str, str]
    documented: list[str]  # by the classes, for a key without a comment


def keys_page() -> str:
    """Returns the page of all keys: default, unit, what is allowed, what it means."""
    text = [
        GENERATED, "# Keys\n",
        "Every key can be given on the command line as `KEY=VALUE`; `fedprune train --cfg job` shows all of them with their values. "
        "The unit follows from the end of a key's name. An empty cell of a unit means a number without one, or no number. "
        "`${...}` takes the value of another key.\n",
        "## Top level\n", key_table("", {"conf/config.yaml": CONF / "config.yaml"}, {"": Experiment}, only_scalars=True),
    ]  # fmt: skip
    for section, cls in SECTIONS.items():
        files = {path.stem: path for path in options(section)} or {"config": CONF / "config.yaml"}
        text += [f"## {section}\n", key_table(section, files, dict.fromkeys(files, cls))]
    for group, registry in GROUPS.items():
        files = {path.stem: path for path in options(group)}
        text += [f"## {group}\n", key_table(group, files, {name: registry[name] for name in files if name in registry})]
    return "\n".join(text)


def key_table(
    section: str, files: Mapping[str, Path], classes: Mapping[str, type], *, only_scalars: bool = False
) -> str:
    """Returns the table of a section's or a group's keys, whichever of its choices have them."""
    found: dict[str, Key] = {}
    for choice, path in files.items():
        cls = classes.get(choice) or next(iter(classes.values()))
        values = yaml.safe_load(path.read_text()) or {}
        inside = section and isinstance(values.get(section), dict)
        values = values[section] if inside else values
        comments = comments_of(path, section if inside else "")
        for shared in included(values):
            values |= yaml.safe_load(shared.read_text())
            comments |= comments_of(shared, "")
        allowed, meaning = allowed_of(cls), meanings_of(cls)
        for key, value in values.items():
            if (
                key == "defaults"
                or (section and key == "name")
                or (only_scalars and (isinstance(value, dict) or key in SECTIONS))
            ):
                continue
            name = si_name(key)
            entry = found.setdefault(key, Key({}, {}, {}, []))
            entry.defaults[choice] = written(value)
            entry.allowed[choice] = human(allowed.get(name, typed(cls, name)), key)
            if key in comments:
                entry.meanings[choice] = comments[key]
            entry.documented.append(meaning.get(name, ""))
    rows = []
    for key, entry in found.items():
        name, everywhere = f"{section}.{key}" if section else key, len(entry.defaults) == len(files)
        meaning_text = "; ".join(dict.fromkeys(entry.meanings.values())) or entry.documented[0]
        allowed_text = by_choice(entry.allowed, always=True)
        rows.append(
            [f"`{name}`", by_choice(entry.defaults, always=everywhere), unit_of(key), allowed_text, prose(meaning_text)]
        )
    return table(["key", "default", "unit", "allowed", "meaning"], rows) if rows else "It has no keys of its own.\n"


def included(values: Mapping[str, Any]) -> list[Path]:
    """Returns the files outside of the groups whose keys a file takes as its own: `/NAME@_here_` among its defaults."""
    entries = [entry for entry in values.get("defaults", ()) if isinstance(entry, str) and entry.startswith("/")]
    return [CONF / f"{entry.strip('/').removesuffix('@_here_')}.yaml" for entry in entries]


def written(value: object) -> str:
    """Returns a default as the tables show it."""
    if value == "???":
        return "required"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} entries, see the file"
    if isinstance(value, bool) or value is None:
        return f"`{ {True: 'true', False: 'false', None: 'null'}[value] }`".replace("{ ", "").replace(" }", "")
    return f"`{value}`"


def by_choice(texts: Mapping[str, str], *, always: bool) -> str:
    """Returns the text, with the choices it belongs to where they differ; always: where they do not it needs none."""
    by_text: dict[str, list[str]] = {}
    for choice, text in texts.items():
        by_text.setdefault(text, []).append(choice)
    if len(by_text) == 1 and always:
        return next(iter(by_text))
    return "; ".join(f"{text} ({', '.join(choices)})" for text, choices in by_text.items())


def unit_of(key: str) -> str:
    """Returns the unit that the end of a key's name says."""
    return next((unit for suffix, unit in UNIT_OF if key.endswith(suffix)), "")


def si_name(key: str) -> str:
    """Returns what a key is called in its class, which sees SI units."""
    return next((key.removesuffix(suffix) + si for suffix, si, _ in UNITS if key.endswith(suffix)), key)


def human(allowed: str, key: str) -> str:
    """Returns what is allowed in the key's own unit: the classes check SI units."""
    if key.endswith(("_dbm", "_dbm_per_hz")) and allowed == "> 0 and finite":
        return "any finite number"
    scale = next((scale for suffix, scale in SCALE.items() if key.endswith(suffix)), 1.0)
    if "(SI units)" not in allowed:
        return allowed
    plain = allowed.replace(" (SI units)", "")
    return re.sub(r"\d[\d.]*(?:e[+-]?\d+)?", lambda number: f"{float(number[0]) / scale:g}", plain)


def typed(cls: type, name: str) -> str:
    """Returns what a field's type allows, for one whose class checks nothing more."""
    try:
        hint = str(get_type_hints(cls).get(name, ""))
    except NameError:
        return ""
    kinds = (("bool", "true or false"), ("int", "a whole number"), ("float", "a number"), ("str", "text"))
    kind = next((text for word, text in kinds if re.search(rf"\b{word}\b", hint)), "")
    return kind + (" or null" if kind and "None" in hint else "")


def comments_of(path: Path, section: str) -> dict[str, str]:
    """Returns the comments beside a file's keys: of those at its top, or of those in a section."""
    found: dict[str, str] = {}
    at = "" if section else None
    for line in path.read_text().splitlines():
        if outer := re.match(r"(\w+):", line):
            at = outer[1]
        inner = re.match(r"(\s*)(\w+):[^#]*(?:#\s*(.*))?$", line)
        if inner and inner[3] and (inner[1] == "") == (not section) and (not section or at == section):
            found[inner[2]] = inner[3]
        if section and outer and outer[1] == section and "#" in line:
            found.pop(section, None)
    return found


def meanings_of(cls: type) -> dict[str, str]:
    """Returns what the docstrings of a class and its bases say of their fields, as `name: text` or `name, name: text`."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        names = {field.name for field in dataclasses.fields(each)} if dataclasses.is_dataclass(each) else set()
        text = " ".join((each.__doc__ or "").split())
        starts = [
            match
            for match in re.finditer(r"(?:^|(?<=[.;] ))((?:\w+, )*\w+): ", text)
            if {*match[1].split(", ")} <= names
        ]
        for match, following in itertools.zip_longest(starts, starts[1:]):
            said = text[match.end() : following.start() if following else len(text)]
            for name in match[1].split(", "):
                found[name] = re.split(r"(?<=[.;])\s", said)[0].strip().rstrip(".;")
    return found


# --- what is allowed: the `require` calls of a class ----------------------------------------------------------------


def allowed_of(cls: type) -> dict[str, str]:
    """Returns what each field must be, as the `require` calls of the class and its bases say it."""
    found: dict[str, list[str]] = {}
    names = [field.name for field in dataclasses.fields(cls)]
    for each in reversed(cls.__mro__):
        check = each.__dict__.get("__post_init__")
        if inspect.isfunction(check):
            for key, allowed in requirements(check, {}, names):
                if allowed not in found.setdefault(key, []):
                    found[key].append(allowed)
    return {key: "; ".join(texts) for key, texts in found.items()}


def requirements(
    function: Callable[..., Any], given: Mapping[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yields (field, what is allowed) of the `require` calls in a function and in the helpers that it calls.

    given: the values of its parameters where they are known. What only a run can tell (a machine's devices) is passed over.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return
    scope: dict[str, Any] = {**function.__globals__, **given}
    yield from _in_block(tree.body[0].body, scope, names)  # type: ignore[attr-defined]


def _in_block(body: Sequence[ast.stmt], scope: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for statement in body:
        if (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
        ):
            scope.pop(statement.targets[0].id, None)
            if (value := _value(statement.value, scope)) is not None:
                scope[statement.targets[0].id] = value
        elif isinstance(statement, ast.For):
            for bound in _turns(statement, scope, names):
                yield from _in_block(statement.body, {**scope, **bound}, names)
        elif isinstance(statement, ast.If):
            yield from _in_block([*statement.body, *statement.orelse], scope, names)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            yield from _in_call(statement.value, scope, names)


def _in_call(call: ast.Call, scope: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "require" and len(call.args) == 4:
        key, allowed = _value(call.args[1], scope), _value(call.args[3], scope)
        if key in names and isinstance(allowed, str):
            yield key, allowed
        return
    helper = scope.get(name) if isinstance(call.func, ast.Name) else None
    if inspect.isfunction(helper) and helper.__module__.startswith("fedprune_cli"):
        values = {
            parameter: value
            for parameter, argument in zip(inspect.signature(helper).parameters, call.args, strict=False)
            if (value := _value(argument, scope)) is not None
        }
        yield from requirements(helper, values, names)


def _turns(loop: ast.For, scope: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns what a loop's variables are bound to in each turn; of a loop over what only a run can tell, every field."""
    targets = [loop.target] if isinstance(loop.target, ast.Name) else list(getattr(loop.target, "elts", ()))
    variables = [target.id for target in targets if isinstance(target, ast.Name)]
    items = _value(loop.iter, scope)
    if items is None and isinstance(loop.iter, ast.Tuple):  # of each row what can be told
        items = [
            [_value(cell, scope) for cell in row.elts] if isinstance(row, ast.Tuple) else _value(row, scope)
            for row in loop.iter.elts
        ]
    if items is None:
        items = names if len(variables) == 1 else []
    return [dict(zip(variables, item if len(variables) > 1 else [item], strict=False)) for item in items]


def _value(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    """Returns what a constant expression is, None where it depends on more than constants. Of calls only str.join is one."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and not (isinstance(part.func, ast.Attribute) and part.func.attr == "join"):
            return None
        if isinstance(part, ast.Name) and (part.id == "self" or part.id not in scope):
            return None
        if isinstance(part, ast.Name) and not isinstance(scope[part.id], str | int | float | tuple | list | Mapping):
            return None
        if isinstance(part, ast.Attribute) and part.attr != "join":
            return None
    return eval(compile(ast.Expression(node), "reference", "eval"), {"__builtins__": {}}, dict(scope))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
        print(FOLDER.relative_to(ROOT) / name, file=sys.stderr)
