"""Laws of whole runs that choose a part: the audit finds nothing, and an interrupted one ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprune_cli import plugins
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.contracts.parts import TABLES, TINY, has_field, names
from fedprune_cli.round.setup import prepare
from fedprune_cli.runs import life

# What is built in has such runs in fedprune's own tests: of it, one part stands for all.
CHOICES: list[object] = [
    pytest.param(kind.entry, name, id=f"{kind.key}={name}", marks=pytest.mark.foreign)
    for kind in plugins.KINDS
    for name in names(kind.entry)
    if name not in TABLES[kind.entry].own
] or [pytest.param("allocators", "kkt", id="allocator=kkt")]


def overrides_of(entry: str, name: str) -> list[str]:
    """Returns what chooses a part in a small run."""
    key = plugins.KIND[entry].key
    chosen = [f"{key}=[{name}]" if entry == "faults" else f"{key}={name}"]
    tiny = [text for text in TINY if entry != "models" or text != "model.hidden=[16]"]
    if entry == "devices":
        tiny = [
            text
            for text in tiny
            if has_field(entry, name, text.split("=")[0].removeprefix("devices.")) or "devices." not in text
        ]
    return [*tiny, *chosen]


def files(run_dir: Path) -> dict[str, bytes]:
    names = ("state.safetensors", "rounds.jsonl", "summary.json", "manifest.json")
    return {name: (run_dir / name).read_bytes() for name in names}


@pytest.mark.parametrize(("entry", "name"), CHOICES)
def test_a_run_is_sound_and_ends_the_same_when_it_is_interrupted(entry: str, name: str, tmp_path: Path) -> None:
    overrides = overrides_of(entry, name)
    assert name in TABLES[entry]
    config = compose_config(overrides)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for place in (whole, stopped):
        life.create(prepare(build_experiment(config)), config, place)
    list(life.run(life.reopen(whole), whole))
    records = life.run(life.reopen(stopped), stopped)
    next(records)
    records.close()  # type: ignore[attr-defined]
    list(life.run(life.reopen(stopped), stopped))
    assert files(stopped) == files(whole), "an interrupted run ends with other bytes"
    failures = verify_run(life.reopen(whole), whole, every=3).failures
    assert failures == (), failures
