"""What `fedprune bench` measures, by the names of its option --tasks; and the start of the command line itself."""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys

from fedprune_cli.bench.allocator import measure_allocator
from fedprune_cli.bench.measure import Effort, Measure, Say, Task, ratio, seconds
from fedprune_cli.bench.rounds import measure_channel_pruning, measure_cnn_rounds, measure_mlp_rounds
from fedprune_cli.errors import unknown


def measure_startup(effort: Effort, say: Say) -> tuple[Measure, ...]:
    """Measures `fedprune --help` against the import of the library that draws it."""
    commands = [sys.executable, "-m", "fedprune_cli", "--help"], [sys.executable, "-c", "import typer"]
    run = functools.partial(subprocess.run, stdout=subprocess.DEVNULL, check=True)
    count = 1 + effort.repeats * (1 if effort.quick else 2)
    turns = [[seconds(functools.partial(run, command)) for command in commands] for _ in range(count)]
    ours_s, bare_s = zip(*turns[1:], strict=True)  # the first turn fills the file cache
    return (ratio("startup/help", "x typer", "smaller", ours_s, bare_s, statistics.median(bare_s)),)


TASKS: dict[str, Task] = {
    "t1": measure_cnn_rounds, "t2": measure_mlp_rounds, "t3": measure_channel_pruning,
    "allocator": measure_allocator, "startup": measure_startup,
}  # fmt: skip


def choose(names: str) -> list[str]:
    """Returns the tasks in a comma-separated list, each once; raises ConfigError for one that does not exist."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in TASKS:
            raise unknown("task", name, TASKS)
    return chosen
