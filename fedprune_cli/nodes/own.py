"""A node's own samples from a configuration: all of its data, or one device's part of data that are split."""

from __future__ import annotations

from collections.abc import Sequence

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.errors import ConfigError
from fedprune_cli.nodes.data import Samples, samples_of
from fedprune_cli.world.partition import build_partition

ALONE = ("partition=iid", "devices.count=1", "devices.fresh=0")


def own_samples(overrides: Sequence[str], part: int | None) -> Samples:
    """Returns the samples of the device `part` of a configuration, or all of them; raises ConfigError or DataError."""
    experiment = build_experiment(compose_config([*overrides, *(ALONE if part is None else ())]))
    if experiment.execution.remote:
        raise ConfigError("data=nodes: a node needs data of its own, such as data=table data.file=FILE.csv")
    dataset, count = experiment.data.load(), len(experiment.devices.draw(experiment.seed).cpu_hz)
    if part is not None and part >= count:
        raise ConfigError(f"--part {part}: the data are split among {count} devices, 0 to {count - 1}")
    split = build_partition(experiment.partition, dataset, count, experiment.evaluation.test_fraction, experiment.seed)
    return samples_of(dataset, split, part or 0)
