"""`train`, its sweeps, and `resume`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedprune_cli import CONF, plugins
from fedprune_cli.commands.look import print_run, print_sweep
from fedprune_cli.commands.options import ConfigDir, Json, Overrides, Plugins, Quiet
from fedprune_cli.errors import ConfigError, FedpruneError, unknown
from fedprune_cli.interrupt import NOTHING, SAME_COMMAND, safe
from fedprune_cli.terminal import counting, note, status

if TYPE_CHECKING:
    from omegaconf import DictConfig


SHOWN_BY_CFG = ("job", "hydra", "all")
SHOWN_BY_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def train(
    overrides: Overrides = None,
    multirun: Annotated[
        bool,
        typer.Option("-m", "--multirun", help="Run every combination of comma-separated values (Hydra's sweeper)."),
    ] = False,
    cfg: Annotated[
        str | None, typer.Option("--cfg", help="Show the configuration instead of running: job, hydra or all.")
    ] = None,
    package: Annotated[str | None, typer.Option("-p", "--package", help="With --cfg: show only this part.")] = None,
    resolve: Annotated[bool, typer.Option("--resolve", help="With --cfg: resolve interpolations.")] = False,
    info: Annotated[
        str | None,
        typer.Option(
            "--info", help="Show Hydra's information: all, config, defaults, defaults-tree, plugins, searchpath."
        ),
    ] = None,
    config_dir: ConfigDir = None,
    config_name: Annotated[str | None, typer.Option("--config-name", help="Another primary configuration.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one experiment: allocate, prune, train, aggregate, meter, record, and report.

    With -m a sweep: the same command again skips its finished runs and continues the others.
    """
    from fedprune_cli.config.compose import check_config_dir, check_overrides
    from fedprune_cli.config.foreign import offer
    from fedprune_cli.config.words import parse_choice

    for option, word, allowed in (("--cfg", cfg, SHOWN_BY_CFG), ("--info", info, SHOWN_BY_INFO)):
        if word is not None:
            parse_choice(word, option, allowed)
    check_overrides(overrides or [], sweep=multirun, config_dir=config_dir)
    if config_dir is not None:
        check_config_dir(config_dir)
    offer(overrides or [], config_dir)
    if package is not None:
        _check_package(package, cfg, [] if multirun else overrides or [], config_dir)
    flags = ["--resolve"] * resolve
    given: tuple[tuple[str, str | Path | None], ...] = (
        ("--cfg", cfg),
        ("-p", package),
        ("--info", info),
        ("--config-dir", config_dir),
        ("--config-name", config_name),
    )
    for flag, value in given:
        flags += [flag, str(value)] if value is not None else []
    if multirun and cfg is None and info is None:
        _sweep(flags, overrides or [], as_json=as_json)
        return
    configs: list[DictConfig] = []
    _hydra(configs.append, [*["-m"] * multirun, *flags, *(overrides or [])])
    for config in configs:  # none when the configuration was only shown
        _train(config, as_json=as_json)


def _check_package(package: str, cfg: str | None, overrides: list[str], config_dir: Path | None) -> None:
    """Raises ConfigError when `--cfg` has no such part to show."""
    from fedprune_cli.config.compose import compose_config
    from fedprune_cli.config.plain import leaves, plain

    if cfg is None:
        raise ConfigError(f"-p {package}: shows a part of the configuration, with --cfg job")
    keys = leaves(plain(compose_config(overrides, config_dir)))
    if package not in ("_global_", *keys) and (cfg == "job" or not package.startswith("hydra")):
        raise unknown("part of the configuration", package, [key for key in keys if "." not in key])


def _hydra(task: Callable[[DictConfig], object], arguments: list[str]) -> None:
    """Hands the arguments to Hydra itself, so that its flags, sweepers and launchers all work; `task` gets the configurations."""
    import hydra

    from fedprune_cli.config.compose import explain

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["fedprune train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)()
    except FedpruneError:
        raise
    except Exception as error:
        raise explain(error) from None
    finally:
        sys.argv = argv
        if full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _sweep(flags: list[str], overrides: list[str], *, as_json: bool) -> None:
    """Runs every combination of a sweep and reports them; the failures' exit code is the first one's."""
    from fedprune_cli.many import sweep
    from fedprune_cli.report.sweep import ended, read_combinations

    asked = f"hydra.sweep.dir={sweep.sweep_dir([*flags, *overrides, *(file.sha256 for file in plugins.given())])}"
    given = [override.lstrip("+") for override in overrides if override.lstrip("+").startswith("hydra.sweep.dir=")]
    place = Path([asked, *given][-1].partition("=")[2])
    overrides = overrides if given else [*overrides, asked]
    for old in ended(place):
        old.unlink()
    with (
        safe(lambda: SAME_COMMAND if place.exists() else NOTHING),
        counting("runs ended", lambda: len(ended(place))),
    ):
        _hydra(sweep.run_combination, ["-m", *flags, *overrides])
    members = read_combinations([place])
    failed = [member for member in members if member.error is not None]
    if len(failed) < len(members):
        print_sweep([place], place / "report", as_json=as_json)
    if failed:
        error = FedpruneError(f"{len(failed)} of {len(members)} runs of the sweep failed, see above")
        error.exit_code = failed[0].exit_code
        raise error


def _train(config: DictConfig, *, as_json: bool) -> None:
    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.many.one import SHOWN, resumable, run_to_end
    from fedprune_cli.round.setup import prepare
    from fedprune_cli.runs.life import create

    experiment = build_experiment(config)
    if config.get("arms"):
        note("arms are for compare: train runs the experiment without them")
    with status("loading data and building the world"):
        setup = prepare(experiment)
    with resumable(experiment.run_dir):
        create(setup, config, experiment.run_dir)
        page = run_to_end(setup, experiment.run_dir, SHOWN)
        print_run(experiment.run_dir, page, as_json=as_json)


def resume(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of a branch: rounds, deadline.* and out, its own folder."),
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue an interrupted run; it ends with the bytes of one that was never interrupted.

    With KEY=VALUE go on from where the run is as a branch, another run that says where it comes from; the first one stays as it is.
    """
    from fedprune_cli.many.one import SHOWN, resumable, run_to_end
    from fedprune_cli.runs.life import branch, reopen

    with resumable(run_dir):
        with status("loading data and building the world"):
            setup = branch(run_dir, overrides) if overrides else reopen(run_dir)
        if overrides:
            run_dir = setup.experiment.run_dir
            note(f"a branch: {run_dir}")
    with resumable(run_dir):
        page = run_to_end(setup, run_dir, SHOWN)
        print_run(run_dir, page, as_json=as_json)
