"""The command line's surface: commands, options and their types, exit codes, and the keys of every --json. A change is a decision.

After one, write the picture anew: python tests/system/test_surface.py (in a folder of its own), and say so in CHANGELOG.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_args

import numpy as np
from conftest import TINY, fedprune
from typer.models import OptionInfo

from fedprune_cli import errors
from fedprune_cli.commands.app import app
from fedprune_cli.errors import FedpruneError

PICTURE = Path(__file__).with_name("surface.json")
ALLOCATE = ("devices.count=2", "devices.fresh=1")
JSON_OF = {  # in this order: later ones look at what earlier ones made
    "train": ("train", *TINY, "out=run"),
    "train -m": ("train", "-m", *TINY, "method=personalized", "seed=0,1"),
    "resume": ("resume", "run"),
    "report": ("report", "run"),
    "report of several": ("report", "run", "outputs/main/*-s0"),
    "report of a sweep": ("report", "outputs/sweeps/*"),
    "compare": ("compare", *TINY, "--jobs", "1"),
    "runs": ("runs",),
    "runs --prune": ("runs", "--prune"),
    "watch": ("watch", "run", "--once"),
    "export": ("export", "run", "--device", "1"),
    "predict": ("predict", "device-1.safetensors", "x.npz"),
    "allocate": ("allocate", *ALLOCATE),
    "ladder": ("ladder", *ALLOCATE, "--allocators", "equal", "--fractions", "0.5"),
    "verify": ("verify", "run"),
    "leak": ("leak", "run", "--samples", "1", "--trials", "1"),
    "bench": ("bench", "--tasks", "startup", "--repeats", "1"),
    "calibrate": ("calibrate", *TINY, "--turns", "1", "--ratios", "0,0.5", "--ratios-only"),
}


def form(value: Any) -> Any:
    """Returns what a JSON value looks like: keys with the forms of their values, the first item's form of a list, else the type."""
    if isinstance(value, dict):
        return {
            "PATH" if "/" in key else key: form(of) for key, of in value.items()
        }  # a run's folder is named by a hash
    if isinstance(value, list):
        return [form(value[0])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def commands() -> dict[str, dict[str, str]]:
    """Returns the commands in their order, each with its parameters: how they are typed, of which type, with which default."""
    callbacks = [command.callback for command in app.registered_commands]
    return {
        of.__name__: dict(map(parameter, signature(of, eval_str=True).parameters.values())) for of in callbacks if of
    }


def parameter(of: Parameter) -> tuple[str, str]:
    """Returns a parameter as it is typed, and its type and default."""
    kind, info = get_args(of.annotation)[:2]
    names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]  # Typer's own reading
    typed = " ".join(names or [f"--{of.name.replace('_', '-')}"]) if isinstance(info, OptionInfo) else of.name
    default = "required" if of.default is of.empty else f"default {of.default}"
    return typed, f"{kind.__name__ if kind in (str, int, float, bool, Path) else kind}, {default}".replace(
        "pathlib.", ""
    )


def exit_codes() -> dict[str, int]:
    """Returns the exit codes of errors by name."""
    classes = [of for of in vars(errors).values() if isinstance(of, type) and issubclass(of, FedpruneError)]
    return {of.__name__: of.exit_code for of in classes} | {"SIGINT": 130, "SIGTERM": 143}


def write_samples() -> None:
    """Writes the file that `predict` is asked about."""
    np.savez("x.npz", inputs=np.zeros((2, 8, 8), np.uint8), labels=[3, 4])


def answers() -> Iterator[tuple[str, Any]]:
    """Yields each command with the form of what it prints with --json."""
    write_samples()
    for name, arguments in JSON_OF.items():
        spread = [str(path) for text in arguments for path in (sorted(Path().glob(text)) if "*" in text else [text])]
        result = fedprune(*spread, "--json")
        assert result.returncode == 0, result.stderr
        yield name, form(json.loads(result.stdout))


def surface() -> dict[str, Any]:
    """Returns the whole picture."""
    return {"commands": commands(), "exit_codes": exit_codes(), "json": dict(answers())}


def test_the_surface_is_the_picture() -> None:
    picture, now = json.loads(PICTURE.read_text()), surface()
    assert list(now["commands"]) == list(picture["commands"])  # their order in --help too
    for part, of in now.items():
        assert of == picture[part], f"{part} changed: decide, then write the picture anew (see above)"


if __name__ == "__main__":
    PICTURE.write_text(json.dumps(surface(), indent=1, sort_keys=False) + "\n")
