"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedprune_cli import plugins
from fedprune_cli.commands.completion import complete_override
from fedprune_cli.terminal import be_quiet, need_stdout

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OVERRIDES]...",
        help="Hydra overrides, such as data=fmnist partition.alpha=0.3.",
        autocompletion=complete_override,
    ),
]
ConfigDir = Annotated[
    Path | None,
    typer.Option("--config-dir", help="A folder of further configuration files, such as what calibrate writes."),
]


def _give(paths: list[Path] | None) -> list[Path] | None:
    """Gives the process the files that the command line names, and no others; raises ConfigError for one that cannot be run."""
    plugins.give([plugins.read(path) for path in paths or ()])
    return paths


Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin", metavar="FILE.py", callback=_give, help="A file with parts of one's own, which is run; repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", callback=need_stdout, help="Print JSON and nothing else on stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=be_quiet, help="Print nothing but errors and what --json asks for.")
]
