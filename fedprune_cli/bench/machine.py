"""This machine as a class of real devices: what was measured of it, in the form that `devices=measured` and `devices=table` read."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fedprune_cli.bench import kinds, power
from fedprune_cli.bench.kinds import ByKind
from fedprune_cli.bench.power import Power
from fedprune_cli.config.compose import compose_config
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.config.plain import plain
from fedprune_cli.errors import ConfigError
from fedprune_cli.processor import processor
from fedprune_cli.store.files import Plain
from fedprune_cli.terminal import Table
from fedprune_cli.world.devices import FLEETS
from fedprune_cli.world.measured import RANGES

RADIO = {
    "tx_power_dbm": 23,
    "radio_power_w": 3.2,
    "radio_circuit_w": 0.0,
}  # of a phone on 5G; assumed, as nothing here measures a radio


@dataclass(frozen=True)
class Machine:
    """This machine under the name of a class: its clock as given, its figures by kind of layer, and its watts."""

    name: str
    cpu_hz: float
    by_kind: ByKind
    power: Power

    def entry(self) -> dict[str, Plain]:
        """Returns the class in human units; what is measured of it and what is assumed stands in its source."""
        models = ", ".join(dict.fromkeys(probe.model.split()[0].removeprefix("model=") for probe in kinds.FITTED))
        source = (
            f"fedprune calibrate, {datetime.date.today().isoformat()}: {processor()}, one thread of PyTorch {version('torch')}, steps of "
            f"{models}; {self.power.said}; radio assumed"
        )
        figures: dict[str, Plain] = {
            "cycles_per_flop": _written(float(self.by_kind.seconds_per_flop[0]) * self.cpu_hz),
            **{f"{kind}_scale": _written(scale) for kind, scale in self.by_kind.scales.items()},
            "step_s": _written(self.by_kind.step_s),
            "energy_coefficient": min(_written(self.power.dynamic_w / self.cpu_hz**3), RANGES["energy_coefficient"][1]),
        }
        idle_w = None if self.power.idle_w is None else _written(self.power.idle_w)
        first: dict[str, Plain] = {"name": self.name, "source": source, "cpu_ghz": _written(self.cpu_hz / 1e9)}
        return first | figures | RADIO | {"idle_power_w": idle_w, "max_bandwidth_mhz": None}

    def fleet_yaml(self, fleet: Mapping[str, Plain]) -> str:
        """Returns the file of a fleet of real devices with this machine among its classes; a mix then is of nothing else."""
        classes = fleet["classes"]
        others = (
            [entry for entry in classes if isinstance(entry, dict) and entry.get("name") != self.name]
            if isinstance(classes, list)
            else []
        )
        mix: dict[str, Plain] = {"mix": [self.name], "shares": [1]} if "mix" in fleet else {}
        text = OmegaConf.to_yaml(OmegaConf.create({**fleet, **mix, "classes": [*others, self.entry()]}))
        return f"# Real devices, {self.name} among them as `fedprune calibrate` measured it.\n{text}"

    def table(self) -> Table:
        """Returns the class for the terminal."""
        facts = [(key, str(value)) for key, value in self.entry().items() if key not in ("name", "source")]
        return Table.of_facts(f"class {self.name}", facts)

    def as_json(self) -> dict[str, object]:
        """Returns what was measured, the class, and the models that it is held against."""
        return {"class": self.entry(), "power": asdict(self.power), "held_out": self.by_kind.rows}


def _written(value: float) -> float:
    """Returns a figure as it is written down: to five digits."""
    return float(f"{value:.5g}")


def check_name(name: str) -> str:
    """Returns the name of a class, which is that of a file as well; raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,59}", name) or name in FLEETS:
        allowed = f"letters, digits and '_', at most 60, and none of {', '.join(FLEETS)}"
        raise ConfigError(f"--class {name}: must be {allowed}")
    return name


def measure(experiment: Experiment, turns: int, machine: tuple[str, float], meter: Power | None) -> Machine:
    """Returns this machine under a name and at the clock (Hz) that are given, with watts of a meter or of its own counters."""
    name, cpu_hz = machine
    by_kind = kinds.measure(experiment, turns)
    watts = power.measure(lambda: kinds.time_probe(experiment, kinds.HELD_OUT[1], 1)) if meter is None else meter
    return Machine(name, cpu_hz, by_kind, watts)


def fleet_to_join(config: DictConfig, config_dir: Path | None) -> dict[str, Plain]:
    """Returns the keys of the fleet whose classes the machine becomes one of: the configuration's, or else that of devices=measured."""
    chosen = plain(config)["devices"]
    if not (isinstance(chosen, dict) and chosen.get("name") in ("measured", "table")):
        chosen = plain(compose_config(["devices=measured"], config_dir))["devices"]
    assert isinstance(chosen, dict)
    return chosen
