"""A scenario: one seed's data, owners, devices and channel, ready to be asked for any round."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedprune_cli.errors import ConfigError
from fedprune_cli.store.state import Array
from fedprune_cli.world.channel import Channel, block_gain_of
from fedprune_cli.world.datasets import Dataset, DatasetConfig
from fedprune_cli.world.devices import Devices
from fedprune_cli.world.fleet import Fleet
from fedprune_cli.world.partition import Natural, Partition, PartitionConfig, build_partition


@dataclass(frozen=True)
class World:
    """What a scenario is drawn from: the configured parts, and the fraction of its samples that every device is tested on."""

    data: DatasetConfig
    partition: PartitionConfig
    devices: Devices
    channel: Channel
    test_fraction: float


@dataclass(frozen=True)
class Conditions:
    """What a round meets: the devices' power gains, gain_linear [N], and who can be reached, available, bool [N];

    block_gain: the gain in each block relative to that [N, blocks], where blocks differ.
    """

    gain_linear: Array
    available: Array
    block_gain: Array | None = None


@dataclass(frozen=True)
class Scenario:
    """The world of one seed. Devices 0..num_devices-1 train; those after them are fresh and never do.

    available: bool [rounds, N].
    """

    seed: int
    num_devices: int
    dataset: Dataset
    partition: Partition
    fleet: Fleet
    channel: Channel
    available: Array

    def at(self, number: int) -> Conditions:
        """Returns the conditions of a round, 0 <= number < rounds; the same for the same seed, whichever rounds were asked before."""
        gain_linear = self.channel.gain(self.seed, number, self.fleet)
        return Conditions(
            gain_linear, self.available[number], block_gain_of(self.channel, self.seed, number, len(gain_linear))
        )


def build_scenario(world: World, seed: int, rounds: int) -> Scenario:
    """Returns the scenario of one seed; raises ConfigError or DataError when a part cannot be had."""
    fleet = world.devices.draw(seed)
    size = len(fleet.cpu_hz)
    available = world.channel.available(seed, rounds, size)
    dataset = world.data.load()
    owners = build_partition(world.partition, dataset, size, world.test_fraction, seed)
    if isinstance(world.partition, Natural):
        fleet = _named(fleet, dataset.source.owner_names)
    return Scenario(seed, world.devices.num_devices, dataset, owners, fleet, world.channel, available)


def _named(fleet: Fleet, owners: tuple[str, ...]) -> Fleet:
    """Returns the fleet under the names of those whose samples its devices hold; raises ConfigError when a table has other names."""
    if fleet.names is not None and fleet.names != owners:
        bad = next(at for at, pair in enumerate(zip(fleet.names, owners, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"partition=natural: the fleet's device {bad} is called {fleet.names[bad]!r}, the data's is {owners[bad]!r}: the table must "
            "have the data's devices, in the order of their names"
        )
    return replace(fleet, names=owners)
