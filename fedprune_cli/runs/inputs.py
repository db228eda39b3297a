"""What a run folder says of the files that its run read: where they are now, and whether they are still what they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fedprune_cli import plugins
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.config.inputs import TABLES, Input, copy_name, dataset_sha256, edited, read_input
from fedprune_cli.errors import CheckpointError, DataError
from fedprune_cli.store import folder
from fedprune_cli.store.files import read_json, read_yaml


def read_config(run_dir: Path) -> DictConfig:
    """Returns a run's configuration; a table that is gone from where it was is named by the copy that the folder keeps.

    Raises CheckpointError for one that was edited since, or is gone and was too large to be kept.
    """
    text = read_yaml(run_dir / folder.CONFIG, CheckpointError)
    config = OmegaConf.create(text)
    if not isinstance(config, DictConfig):
        raise CheckpointError(f"{run_dir / folder.CONFIG}: damaged (not a configuration)")
    manifest = read_json(run_dir / folder.MANIFEST, CheckpointError)
    check_plugins(run_dir, manifest)
    for key in TABLES:
        if path := OmegaConf.select(config, key):
            OmegaConf.update(config, key, str(_found(run_dir, key, Path(str(path)), _then(manifest, key)).path))
    return config


def check_inputs(run_dir: Path) -> None:
    """Raises CheckpointError when something that a run read, and that is still there, was edited since."""
    manifest = read_json(run_dir / folder.MANIFEST, CheckpointError)
    check_plugins(run_dir, manifest)
    data = _section(manifest, "data")
    if not any(_then(manifest, key) for key in TABLES) and "sha256" not in data:
        return
    config = read_config(run_dir)
    if "sha256" in data:
        experiment = build_experiment(config)
        if getattr(experiment.data, "folder", Path()).is_dir():
            check_dataset(experiment, manifest)


def check_plugins(run_dir: Path, manifest: Mapping[str, object]) -> None:
    """Raises CheckpointError when a part that a run chose from outside the package is not given, not installed, or another by now."""
    for choice, then in _section(manifest, "plugins").items():
        key, _, name = choice.partition("=")
        entry = next((kind.entry for kind in plugins.KINDS if kind.key == key), None)
        found = plugins.origin(entry, name) if entry else None
        sha256 = str(then).removeprefix("sha256:")
        if found is None and sha256 != then:
            copy = next((run_dir / folder.INPUTS).glob(f"plugin.{sha256[:12]}.*"), None)
            called = copy.name.split(".", 2)[2] if copy else "FILE"
            kept = f"; {copy} is a copy" if copy else ""
            raise CheckpointError(
                f"{run_dir}: {choice} is of the plug-in {called}, which no run folder runs by itself: add --plugin {called} "
                f"(SHA-256 {sha256}{kept})"
            )
        if found is None:
            raise CheckpointError(f"{run_dir}: {choice} is of the plug-in {then}, which is not installed")
        if found.origin == then:
            continue
        if isinstance(found.source, plugins.PluginFile) and sha256 != then:
            raise edited(found.source.path, found.source.sha256, sha256)
        raise CheckpointError(f"{run_dir}: {choice} is of the plug-in {then} and not of {found.origin}")


def check_dataset(experiment: Experiment, manifest: Mapping[str, object]) -> None:
    """Raises CheckpointError when the dataset's files have other content than a run's manifest says."""
    then = _section(manifest, "data").get("sha256")
    now = dataset_sha256(experiment.data) if then else None
    if then and now != then:
        where = getattr(experiment.data, "folder", experiment.data.name)
        raise edited(f"{where}: {experiment.data.name}", str(now), str(then))


def _found(run_dir: Path, key: str, path: Path, then: str | None) -> Input:
    """Returns a table, the original where it is still there and else the kept copy."""
    if then is None:
        raise CheckpointError(f"{run_dir}: made by an older fedprune, which did not note what {key} held")
    try:
        original = read_input(key, str(path))
    except DataError as error:
        return _copy(run_dir, key, path, _Gone(then, str(error)))
    if original.sha256 != then:
        raise edited(path, original.sha256, then)
    return original


@dataclass(frozen=True)
class _Gone:
    """An original that cannot be read: the SHA-256 that it had, and why."""

    then: str
    why: str


def _copy(run_dir: Path, key: str, path: Path, gone: _Gone) -> Input:
    copy = run_dir / folder.INPUTS / copy_name(key, path)
    if not copy.exists():
        raise CheckpointError(f"{gone.why}; it was too large for the run's folder to keep a copy")
    kept = read_input(key, str(copy), CheckpointError)
    if kept.sha256 != gone.then:
        raise CheckpointError(f"{copy}: damaged (SHA-256 {kept.sha256}, {gone.then} is noted)")
    return kept


def _section(manifest: Mapping[str, object], group: str) -> Mapping[str, object]:
    config = manifest.get("config")
    section = config.get(group) if isinstance(config, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _then(manifest: Mapping[str, object], key: str) -> str | None:
    """Returns the SHA-256 that a table had when the run was made."""
    group, name = key.split(".")
    noted = str(_section(manifest, group).get(name, ""))
    return noted.removeprefix("sha256:") if noted.startswith("sha256:") else None
