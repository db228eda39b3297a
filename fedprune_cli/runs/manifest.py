"""What a run is made of, and what came of it: its manifest before the first round, its summary after the last."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

from fedprune_cli.config.experiment import Experiment
from fedprune_cli.round.setup import Setup
from fedprune_cli.store import folder
from fedprune_cli.wire.quantize import BITS_PER_PARAM

PACKAGES = ("fedprune", "torch", "torchvision", "numpy", "scipy", "hydra-core", "safetensors", "scikit-learn")


def build_manifest(setup: Setup) -> dict[str, object]:
    """Returns what a run is made of: configuration, seed, versions, dataset hash, model counts and the data's split."""
    experiment, scenario, cost = setup.experiment, setup.scenario, setup.blueprint.cost
    dataset, partition = scenario.dataset, scenario.partition
    return {
        "experiment": experiment.name,
        "method": experiment.method.name,
        "seed": experiment.seed,
        "config_hash": experiment.config_hash,
        "config": experiment.identity,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "dataset": {
            "name": dataset.name,
            "sha256": dataset.sha256,
            "samples": len(dataset.labels),
            "num_classes": dataset.num_classes,
        },
        "model": {
            "name": experiment.model.name,
            "shared_params": cost.shared_params,
            "personal_params": cost.personal_params,
            "shared_bits": BITS_PER_PARAM * cost.shared_params,
            "personal_bits": BITS_PER_PARAM * cost.personal_params,
            "flops_per_sample": {
                kind: {"shared": round(u), "personal": round(v)} for kind, (u, v) in cost.flops.items()
            },
        },
        "fresh_devices": len(partition.train) - scenario.num_devices,
        **({} if scenario.fleet.names is None else {"device_names": [*scenario.fleet.names]}),
        "train_samples": partition.train.sizes.tolist(),
        "test_samples": partition.test.sizes.tolist(),
        "histogram": partition.histogram.tolist(),
    }


def summarise(experiment: Experiment, run_dir: Path) -> dict[str, object]:
    """Returns the run's summary: figures of the last round (never of the best), sums, and the state's hash."""
    records = folder.read_records(run_dir)
    last = next(record for record in reversed(records) if record.accuracy is not None)
    target = experiment.evaluation.target_accuracy
    reached = [one.simulated_s for one in records if target is not None and (one.accuracy or 0.0) >= target]
    return {
        "method": experiment.method.name,
        "seed": experiment.seed,
        "rounds": len(records),
        "final_accuracy": last.accuracy,
        "final_accuracy_p10": last.accuracy_p10,
        "fresh_accuracy": last.fresh_accuracy,
        "simulated_s": records[-1].simulated_s,
        "time_to_target_s": reached[0] if reached else None,
        "bytes_up": sum(record.bytes_up for record in records),
        "joules": sum(record.joules for record in records),
        "state_sha256": hashlib.sha256((run_dir / folder.STATE).read_bytes()).hexdigest(),
    }
