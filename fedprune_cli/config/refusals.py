"""What Hydra and OmegaConf refuse, in our own words: one line that names the key, what is allowed, and the nearest valid name."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable

from hydra import compose, initialize_config_dir
from omegaconf import errors as refused

from fedprune_cli import CONF, plugins
from fedprune_cli.config.plain import leaves, plain
from fedprune_cli.errors import ConfigError, DeviceError, FedpruneError, explained, unknown

EXTRAS = {
    "joblib": "joblib",
    "submitit_slurm": "submitit",
    "submitit_local": "submitit",
    "ray": "ray",
    "optuna": "optuna",
}
FOREIGN = re.compile(
    r"hydra|omegaconf|exception|no viable|mismatched|extraneous|\bstruct\b|interpolation|config search|defaults? list|(Dict|List)Config",
    re.I,
)


def explain(error: Exception) -> FedpruneError:
    """Returns an error of a composition, or of a launcher, as one line, with the nearest valid name."""
    if isinstance(error, OSError | ImportError | MemoryError) and type(error).__module__ == "builtins":
        return explained(error)  # the system's refusals are not about the configuration
    text = str(error) or type(error).__name__
    if type(error).__module__.split(".")[0] in ("joblib", "submitit", "ray"):
        return DeviceError(f"the launcher lost a run ({text.splitlines()[0]}); the same command continues the sweep")
    for pattern, answer in REFUSALS:
        if found := re.search(pattern, text):
            return answer(found)
    if found := re.search(r"Could not override '([^']+)'", text):
        inner = str(getattr(error.__cause__, "full_key", None) or "")  # where a group of values was given
        return _unknown_key(inner if inner.startswith(f"{found[1]}.") else found[1])
    if found := re.search(r"Error merging override ([^=]+)=(.*)", text, re.DOTALL):
        return ConfigError(f"{found[1].lstrip('+~')}={found[2]}: {reason(error.__cause__ or error)}")
    if found := re.search(r"(?:In|list in|defined in) '?(?!config')([\w/.-]*/[\w.-]+?)'?(?:[:,\s]|$)", text):
        return ConfigError(f"{found[1]}.yaml: its list of defaults cannot be followed")
    first = text.splitlines()[0]
    if FOREIGN.search(first):
        first = "these files and overrides do not fit together; `fedprune train --cfg job` shows all keys"
    return ConfigError(first)


def _launcher(found: re.Match[str]) -> FedpruneError:
    if extra := EXTRAS.get(found["name"]):
        return ConfigError(f"{found['kind']} {found['name']} needs an extra: pip install 'fedprune[{extra}]'")
    return ConfigError(f"unknown {found['kind']} {found['name']!r}")


def _option(found: re.Match[str]) -> FedpruneError:
    options = {*found["options"].split(), *plugins.names(found["group"])}
    return unknown(f"{found['group']} option", found["name"].removeprefix(f"{found['group']}/"), options)


REFUSALS: tuple[tuple[str, Callable[[re.Match[str]], FedpruneError]], ...] = (
    (r"Could not load 'hydra/(?P<kind>launcher|sweeper)/(?P<name>\w+)'", _launcher),
    (r"Could not find '(?P<name>[^']+)'\n\nAvailable options in '(?P<group>[^']*)':\n(?P<options>(\t.*\n?)*)", _option),
    (r"Could not (?:find|load) '([^']*)'", lambda found: ConfigError(f"there is no configuration file {found[1]}.yaml")),
    (r"Cannot find primary config '([^']*)'", lambda found: ConfigError(f"--config-name {found[1]}: there is no such configuration file")),
    (r"You must specify '([^']*)'.*\nAvailable options:\n((\t.*\n?)*)",
     lambda found: ConfigError(f"{found[1]}: missing value: must be one of {', '.join(found[2].split())}")),
    (r"An item is already at '([^']*)'", lambda found: ConfigError(f"+{found[1]}: is there already, type {found[1]}=VALUE")),
    (r"Could not delete '([^']*)'|Could not delete from config. '([^']*)' does not exist",
     lambda found: ConfigError(f"~{found[1] or found[2]}: there is nothing of that name to take out")),
    (r"Could not delete from config. The value of '([^']*)' is (.*) and not (.*)\.",
     lambda found: ConfigError(f"~{found[1]}={found[3]}: its value is {found[2]}; ~{found[1]} takes it out")),
    (r"force-add of config groups is not supported: '\++([^']*)'", lambda found: ConfigError(f"++{found[1]}: type {found[1]}")),
    (r"(\S+) appears more than once|Multiple values for (\S+?)\.(\s|$)",
     lambda found: ConfigError(f"{found[1] or found[2]}: is chosen twice; an override chooses without a '+'")),
    (r"(?:argument|parameters) '([^']*)'", lambda found: ConfigError(f"{found[1]}: several values are for `fedprune train -m`")),
    (r"Error resolving interpolation '([^']*)'", lambda found: ConfigError(f"{found[1]}: is the name of no option")),
    (r"Config group override", lambda found: ConfigError("a group is chosen by the name of an option, such as data=digits")),
)  # fmt: skip


def _unknown_key(key: str) -> ConfigError:
    """Returns the error for a key that the configuration lacks, with the options of its group that have it, or the nearest key."""
    group, _, name = key.partition(".")
    if name and (CONF / group).is_dir():
        having = [
            path.stem
            for path in sorted((CONF / group).glob("*.yaml"))
            if re.search(rf"(?m)^ *{re.escape(name)}:", path.read_text())
        ]
        if having:
            return ConfigError(
                f"unknown configuration key {key!r}. It belongs to {', '.join(f'{group}={option}' for option in having)}"
            )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        base = compose("config")
    own = [f"{kind.key}.{field}" for kind in plugins.KINDS for field in plugins.fields_of_files(kind)]
    near = difflib.get_close_matches(key, own, n=1, cutoff=0.8) or difflib.get_close_matches(
        key, leaves(plain(base)), n=1, cutoff=0.5
    )
    return ConfigError(
        f"unknown configuration key {key!r}."
        + (f" Did you mean {near[0]!r}?" if near else " `fedprune train --cfg job` shows all keys.")
    )


def reason(error: BaseException, hint: object = None) -> str:
    """Says in a few words why OmegaConf refuses a value; `hint`: the type that it should be of, where that is known."""
    text = str(error)
    if isinstance(error, refused.GrammarParseError) or "no viable" in text or "mismatched" in text:
        return "'${' and '}' must enclose a key, such as ${seed}"
    if isinstance(error, refused.InterpolationResolutionError) or "nterpolation" in text:
        return _interpolation(text)
    if found := re.search(r"[Mm]issing mandatory value(?:: (\w+))?", text):
        return f"missing value of {found[1]}" if found[1] else "missing value"
    if found := re.search(r"found duplicate key (\S+)", text):
        return f"key {found[1]} stands there twice"
    if "list index out of range" in text:
        return "the list has no such place"
    if found := re.search(r"Key '([^']*)' not in", text):
        return f"unknown key {found[1]!r}"
    if hint is not None:
        return f"must be {in_words(hint)}"
    if "Cannot merge" in text:
        return "must be a list" if "object_type=list" in text else "must be a group of values"
    first = text.splitlines()[0] if text else ""
    return "it does not fit there" if not first or FOREIGN.search(first) else first


def _interpolation(text: str) -> str:
    for pattern, answer in (
        (r"Interpolation key '([^']*)' not found", "${{{}}}: there is no such key"),
        (r"Environment variable '([^']*)' not found", "the environment has no variable {}"),
        (r"Unsupported interpolation type (\S+)", "${{{}:...}}: there is no such function"),
        (r"Error trying to access ([\w.]+)", "${{{}}}: there is no such key"),
    ):
        if found := re.search(pattern, text):
            return answer.format(found[1])
    return "what its ${...} refers to has no value"


def in_words(hint: object) -> str:
    """Returns a type as what a user may give: `a number or null`."""
    plain = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    if isinstance(hint, type) and hint in plain:
        return plain[hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(in_words(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) in (tuple, list):
        return f"a list of {in_words(typing.get_args(hint)[0]).removeprefix('a ').replace('group', 'groups').replace('number', 'numbers')}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "a group of values"
    return "of another kind"
