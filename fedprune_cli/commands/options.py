"""What several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

from fedprune_cli.commands.completion import complete_override
from fedprune_cli.terminal import be_quiet

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OVERRIDES]...",
        help="Hydra overrides, such as data=fmnist partition.alpha=0.3.",
        autocompletion=complete_override,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=be_quiet, help="Print nothing but errors and what --json asks for.")
]
