"""A command line in a process of its own, forked from one that has everything imported: starting one anew takes seconds.

Of the tests, the process imports this module and `warm` and no other.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedprune_cli.commands import app as cli
from fedprune_cli.report import drawing

PRELOADED = [
    "antlr4.LL1Analyzer", "cvxpy", "fedprune_cli.audit.listing", "fedprune_cli.audit.verify", "fedprune_cli.audit.watch",
    "fedprune_cli.many.compared", "fedprune_cli.many.side_by_side", "fedprune_cli.many.sweep", "fedprune_cli.report.allocation",
    "fedprune_cli.report.comparison_page", "fedprune_cli.round.first", "fedprune_cli.runs.life", "fedprune_cli.take_home.take",
    "hydra", "hydra._internal.hydra", "matplotlib.backends.backend_pdf", "matplotlib.backends.backend_svg", "rich.progress",
    "scipy.optimize", "scipy.stats", "sklearn.datasets", "torch._dynamo", "torch.fx", "torch.onnx", "typer._adapters",
]  # fmt: skip


def without_drawing() -> None:
    """Makes figures that show nothing: drawing them takes longer than a tiny run."""
    drawing.Drawing.svg = lambda _: "<svg></svg>"  # type: ignore[method-assign]
    drawing.Drawing.pdf = lambda _: b"%PDF"  # type: ignore[method-assign]


def fedprune(
    *arguments: str, cwd: str = ".", before: Callable[[], None] = without_drawing
) -> subprocess.CompletedProcess[str]:
    """Returns what a command line gives in a process of its own.

    before: what that process does first. Figures are not drawn: tests/report looks at those.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as place:
        streams = [os.path.join(place, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_command, args=(arguments, os.path.abspath(cwd), streams, before))
        process.start()
        process.join(timeout=120)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"fedprune {' '.join(arguments)} took more than 120 s")
        stdout, stderr = (Path(stream).read_text() for stream in streams)
    return subprocess.CompletedProcess(arguments, process.exitcode, stdout, stderr)


def _command(arguments: tuple[str, ...], cwd: str, streams: list[str], before: Callable[[], None]) -> None:
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    sys.argv = ["fedprune", *arguments]
    before()
    cli.main()
