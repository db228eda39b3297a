"""The command line as a whole: its commands in the order of --help, and what any of them may end with."""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from fedprune_cli import __version__, interrupt, plugins
from fedprune_cli.commands.allocate import allocate, ladder
from fedprune_cli.commands.compare import compare
from fedprune_cli.commands.leak import leak
from fedprune_cli.commands.look import completion, report, runs, verify, watch
from fedprune_cli.commands.measure import bench, calibrate
from fedprune_cli.commands.new import new
from fedprune_cli.commands.pilot import enroll, join, pilot, serve
from fedprune_cli.commands.take import export, predict, rounds
from fedprune_cli.commands.train import resume, train
from fedprune_cli.errors import ConfigError, FedpruneError, OutputError, explained
from fedprune_cli.terminal import hold_streams, let_go, tell, tell_error

PACKAGE = __name__.partition(".")[0]
COMPLETION = "_FEDPRUNE_COMPLETE"  # set by the shell that asks

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Federated learning on wireless edge devices: personalized, pruned, and allocated with a certificate.",
    epilog="Exit codes: 0 done, 2 configuration, 3 infeasible or regressed, 4 certificate, 5 run folder, 6 data, 7 machine (memory, "
    "processes, a library), 8 output, 9 limit broken, 10 a defect, 130 interrupted, 143 terminated.",
)


def _shielded(command: Callable[..., None]) -> Callable[..., None]:
    """Returns the command with every error explained before Typer, which has words and exit codes of its own for some, can see it."""

    @functools.wraps(command)
    def run(*args: object, **options: object) -> None:
        import logging

        logging.getLogger("matplotlib").setLevel(
            logging.CRITICAL
        )  # says where its fonts are cached, when that is not at home
        try:
            _check_here()
            command(*args, **options)
        except FedpruneError:
            raise
        except Exception as error:
            if hasattr(error, "format_message"):
                raise
            raise explained(error) from error

    return run


def _check_here() -> None:
    """Raises OutputError when the folder that relative paths start from was removed: libraries end the process over it."""
    try:
        os.getcwd()
    except OSError as error:
        raise OutputError(
            f"cannot use the current folder: {error.strerror}; it was removed, or may not be read"
        ) from None


for command in (
    train, resume, report, compare, runs, watch, export, predict, rounds, completion, allocate, ladder, verify, leak, bench,
    calibrate, new, enroll, pilot, serve, join,
):  # fmt: skip
    app.command()(_shielded(command))


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        tell(f"fedprune {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        tell(context.get_help() + "\n")


def main() -> NoReturn:
    """Runs the command line; whatever goes wrong is one line on stderr and an exit code of its own."""
    interrupt.heed()
    hold_streams()
    os.environ.pop(plugins.VARIABLE, None)  # what is run stands on the command line
    threading.excepthook = _quiet_threads
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=rf"(?!{PACKAGE})")  # libraries' words for those who program with them
    code = _run()
    if interrupt.signalled():  # whatever was made of it on the way up
        interrupt.leave()
    if (refused := let_go()) and code == 0:
        tell_error(refused)
        code = refused.exit_code
    raise SystemExit(code)


def _run() -> int:
    """Runs the command line; returns its exit code, and has said why when it is not 0."""
    try:
        return int(app(prog_name="fedprune", standalone_mode=False) or 0)
    except SystemExit as end:
        if end.code != 1 or COMPLETION in os.environ:
            return end.code if isinstance(end.code, int) else 0
        known: FedpruneError = OutputError("cannot write to stdout: Broken pipe")  # what Typer and Rich make of it
    except KeyboardInterrupt:  # of another's making
        interrupt.leave()
    except Exception as error:
        known = _usage(error) or explained(error)
    if not interrupt.signalled():
        tell_error(known)
    return known.exit_code


def _usage(error: Exception) -> FedpruneError | None:
    """Returns what Typer says of a command line, None for any other error: where its classes are at home differs between its versions."""
    message, context = getattr(error, "format_message", None), getattr(error, "ctx", None)
    if message is None:
        return None
    text = " ".join(message().split())
    of = f"{context.command_path} --help" if context else "fedprune --help"
    return ConfigError(f"{text}{'' if text[-1] in '.?' else '.'} See `{of}`.")


def _quiet_threads(args: threading.ExceptHookArgs) -> None:
    """Passes over what a signal ends in threads."""
    if not interrupt.signalled():
        threading.__excepthook__(args)
