from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import fedprune_cli
from fedprune_cli.rng import Purpose, stream

SOURCES = sorted(Path(fedprune_cli.__file__).parent.rglob("*.py"))


def test_streams_differ_by_seed_purpose_and_ids_and_repeat() -> None:
    keys = [
        (0, "batch"),
        (1, "batch"),
        (0, "fading"),
        (0, "batch", 0),
        (0, "batch", 0, 0),
        (0, "batch", 1),
        (0, "batch", 0, 1),
    ]
    draws = [tuple(stream(key[0], key[1], *key[2:]).integers(2**62, size=2)) for key in keys]  # type: ignore[arg-type]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(stream(key[0], key[1], *key[2:]).integers(2**62, size=2)) for key in keys]  # type: ignore[arg-type]


def test_every_purpose_is_used_and_nothing_else_draws() -> None:
    text = {path: path.read_text() for path in SOURCES}
    used = {
        node.args[1].value
        for source in text.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "stream"
        and isinstance(node.args[1], ast.Constant)
    }
    assert used == set(get_args(Purpose))
    for path, source in text.items():
        if path.name != "rng.py":
            assert "np.random.seed" not in source, path
            assert "default_rng" not in source, path
            assert "import random" not in source, path
