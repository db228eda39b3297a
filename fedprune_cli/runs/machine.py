"""The kind of processor that a run's arithmetic ran on: another kind gives other last digits."""

from __future__ import annotations

from pathlib import Path

from fedprune_cli.errors import CheckpointError
from fedprune_cli.processor import processor
from fedprune_cli.store import folder
from fedprune_cli.store.files import MAX_JSON_BYTES, parse_json, read_bytes


def last_processor(run_dir: Path) -> str | None:
    """Returns the kind that the last finished round ran on, as timings.jsonl has it; None where it does not say."""
    lines = read_bytes(run_dir / folder.TIMINGS, MAX_JSON_BYTES, CheckpointError).splitlines()
    timing = parse_json(lines[-1]) if lines else {}
    name = timing.get("processor") if isinstance(timing, dict) else None
    return name if isinstance(name, str) else None


def another_processor(run_dir: Path) -> str | None:
    """Returns a warning when a run goes on on another kind of processor than it was on, else None."""
    before, now = last_processor(run_dir), processor()
    if before is None or before == now:
        return None
    return f"{run_dir}: its last round ran on {before}; this is {now}: the last digits may differ from here on"
