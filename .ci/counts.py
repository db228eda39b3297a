"""Writes the tables of docs/data.md from the data itself: `python .ci/counts.py`. A slow test compares them.

Needs the packages that hold the data (docs/data.md says how to get them).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.world.partition import build_partition

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
SETS = ("watch", "shakespeare", "optdigits", "letter", "satimage", "shuttle")
NATURAL = {"watch": ("person", "windows", "stretches"), "shakespeare": ("role", "windows", "stretches")}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table whose columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def sizes() -> str:
    """Returns the table of what each set has."""
    rows = []
    for name in SETS:
        data = build_experiment(compose_config([f"data={name}"])).data.load()
        group, counts = data.source.group, np.bincount(data.labels, minlength=data.num_classes)
        shape = " x ".join(str(size) for size in data.inputs.shape[1:] if size > 1)
        groups = "-" if group is None else f"{len(np.unique(group)):,}"
        largest = f"{100 * counts.max() / len(data.labels):.0f} %"
        rows.append([f"`{name}`", f"{len(data.labels):,}", shape, data.num_classes, largest, groups])
    return table(["data", "samples", "numbers of each", "classes", "largest class", "groups"], rows)


def of_devices(name: str) -> str:
    """Returns the table of a set's natural devices, with the split of seed 0."""
    experiment = build_experiment(compose_config([f"data={name}"]))
    data, source = experiment.data.load(), experiment.data.load().source
    count = len(source.owner_names)
    made = build_partition(experiment.partition, data, count, experiment.evaluation.test_fraction, 0)
    rows = []
    for device, owner in enumerate(source.owner_names):
        own = np.flatnonzero(source.owner == device)
        train, test = len(made.train[device]), len(made.test[device])
        assert len(own) == train + test
        rows.append([device, owner, len(own), len(np.unique(source.group[own])), train, test])
    return table(["device", *NATURAL[name], "to train on", "to test on"], rows)


def written(page: str) -> str:
    """Returns the page with its tables as they should be."""
    tables = {"sizes": sizes, **{name: lambda name=name: of_devices(name) for name in NATURAL}}
    for name, make in tables.items():
        begin, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        page, found = re.subn(
            f"{begin}.*?{end}", lambda _, b=begin, e=end, m=make: f"{b}\n\n{m()}\n{e}", page, flags=re.S
        )
        assert found == 1, f"{PAGE}: no place for the table {name}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
