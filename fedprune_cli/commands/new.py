"""`new`: a working part of one's own, and the test that holds it to fedprune's laws."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedprune_cli.commands.options import Json, Quiet
from fedprune_cli.errors import ConfigError, OutputError, unknown
from fedprune_cli.plugins import NAME
from fedprune_cli.terminal import print_json, say

TEMPLATES = Path(__file__).parent.parent / "templates"
TEST = '''"""Holds {name}.py to fedprune's laws. Needs the extra: pip install 'fedprune[contracts]'."""

import subprocess
import sys
from pathlib import Path


def test_every_law_is_kept() -> None:
    mine = str(Path(__file__).with_name("{name}.py"))
    laws = ["-p", "fedprune_cli.contracts.options", "--pyargs", "fedprune_cli.contracts", "--plugin", mine]
    assert subprocess.run([sys.executable, "-m", "pytest", "-q", *laws], check=False).returncode == 0
'''


def new(
    kind: Annotated[str, typer.Argument(help="allocator, model, dataset, pruner, aggregator or partition.")],
    name: Annotated[str, typer.Argument(help="What it is called, in small letters; the file is NAME.py.")],
    out: Annotated[Path, typer.Option(help="The folder that it is written to.")] = Path(),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a working part of your own, NAME.py, and test_NAME.py, which holds it to fedprune's laws."""
    kinds = sorted(path.stem for path in TEMPLATES.glob("*.py") if path.stem != "__init__")
    if kind not in kinds:
        raise unknown("kind of part", kind, kinds)
    if not NAME.fullmatch(name) or name != name.lower():
        raise ConfigError(f"name {name!r}: must be small letters, digits and '_', and begin with a letter")
    _check_free(kind, name)
    cls = "".join(word.capitalize() for word in name.split("_"))
    text = (TEMPLATES / f"{kind}.py").read_text()
    text = (
        text.replace("FILE", f"{name}.py")
        .replace("=mine", f"={name}")
        .replace('"mine"', f'"{name}"')
        .replace("Mine", cls)
    )
    paths = {out / f"{name}.py": text, out / f"test_{name}.py": TEST.format(name=name)}
    for path in paths:
        if path.exists():
            raise OutputError(f"{path} exists, and is not overwritten: choose another name or --out DIR")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, content in paths.items():
            with path.open("x") as file:
                file.write(content)
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or out}: {error.strerror}") from None
    use = next(line.strip() for line in text.splitlines() if line.strip().startswith("fedprune train"))
    if as_json:
        print_json({"files": [str(path) for path in paths], "use": use})
        return
    say(f"written: {' and '.join(map(str, paths))}")
    say(f"use it: {use.replace(f'{name}.py', str(next(iter(paths))))}")
    say(f"its laws: pytest {list(paths)[1]}")


def _check_free(kind: str, name: str) -> None:
    """Raises ConfigError for the name of a part that is built in."""
    from fedprune_cli.config.build import GROUPS, OF_SECTIONS

    entry = f"{kind}s"
    table = next(table for table in (*GROUPS.values(), *OF_SECTIONS) if table.entry == entry)
    if name in table.own:
        raise ConfigError(f"name {name!r}: is a built-in {kind}, choose another")
