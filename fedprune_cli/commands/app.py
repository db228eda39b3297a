"""The command line as a whole: its commands in the order of --help, and what any of them may end with."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from fedprune_cli import __version__, interrupt
from fedprune_cli.commands.allocate import allocate, ladder
from fedprune_cli.commands.compare import compare
from fedprune_cli.commands.look import completion, report, runs, verify, watch
from fedprune_cli.commands.measure import bench, calibrate
from fedprune_cli.commands.train import resume, train
from fedprune_cli.errors import ConfigError, FedpruneError, out_of_memory

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Federated learning on wireless edge devices: personalized, pruned, and allocated with a certificate.",
    epilog="Exit codes: 0 done, 2 configuration, 3 infeasible or regressed, 4 certificate, 5 run folder, 6 data, 7 device, 8 output, "
    "9 limit broken, 130 interrupted.",
)
for command in (
    train, resume, report, compare, runs, watch, completion, allocate, ladder, verify, bench, calibrate,
):  # fmt: skip
    app.command()(command)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"fedprune {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> NoReturn:
    """Runs the command line; a user's mistake is one line on stderr and an exit code of its own."""
    interrupt.heed()
    try:
        raise SystemExit(app(standalone_mode=False) or 0)
    except BaseException as error:
        if interrupt.signalled():  # whatever was made of it on the way up
            interrupt.leave()
        if isinstance(error, FedpruneError):
            _fail(error)
        if isinstance(error, MemoryError | RuntimeError):
            _fail(out_of_memory(error))
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        # Typer's own errors have it; where their class is at home differs between its versions
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        text = " ".join(message().split())
        _fail(ConfigError(f"{text}{'' if text[-1] in '.?' else '.'} See `{_help_of(error)}`."))


def _help_of(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context else "fedprune --help"


def _fail(error: FedpruneError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)
