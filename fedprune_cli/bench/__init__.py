"""What fedprune costs: figures measured in the same run as their bare references, and compared with earlier ones."""

from __future__ import annotations

from fedprune_cli.bench.baseline import (
    check,
    make_folder,
    parse_limits,
    read_baseline,
    regressions,
    table,
    to_json,
    write,
)
from fedprune_cli.bench.measure import Measure, build_effort
from fedprune_cli.bench.tasks import TASKS, choose

__all__ = [
    "TASKS", "Measure", "build_effort", "check", "choose", "make_folder", "parse_limits", "read_baseline", "regressions", "table",
    "to_json", "write",
]  # fmt: skip
