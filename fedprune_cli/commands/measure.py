"""What this machine needs: `bench` against bare references, `calibrate` against the latency model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedprune_cli.commands.options import ConfigDir, Json, Overrides, Plugins, Quiet
from fedprune_cli.errors import ConfigError
from fedprune_cli.terminal import note, print_json, say, show, status


def bench(
    tasks: Annotated[str, typer.Option(help="Tasks, joined by commas.")] = "t1,t2,t3,allocator,startup",
    repeats: Annotated[int, typer.Option(help="How often each pair is measured.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure smaller rounds, twice, in less than a minute.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and github-action-benchmark's files.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="A bench.json to compare with; worse is exit code 3.")] = None,
    max_regression: Annotated[str, typer.Option(help="How much worse an exact figure may be.")] = "15%",
    max_wall_regression: Annotated[str, typer.Option(help="How much worse a measured ratio may be.")] = "100%",
) -> None:
    """Measure fedprune against bare references in the same run, and compare with an earlier measurement."""
    from fedprune_cli import bench as benches

    chosen, effort = benches.choose(tasks), benches.build_effort(repeats, quick)
    limits = benches.parse_limits(max_regression, max_wall_regression)
    earlier = benches.read_baseline(baseline, chosen, quick) if baseline else ()
    if out:
        benches.make_folder(out)
    measures: list[benches.Measure] = []
    notes: list[str] = []
    for name in chosen:
        with status(f"measuring {name}"):
            measures += benches.TASKS[name](effort, notes.append)
    if out:
        benches.write(out, measures, quick)
    if as_json:
        print_json(benches.to_json(measures, quick))
    else:
        show(benches.table(measures))
    for line in notes:
        (note if as_json else say)(line)
    if baseline:
        found = benches.regressions(measures, earlier, limits)
        for regression in found:
            print(regression, file=sys.stderr)
        benches.check(found, baseline)


def calibrate(
    overrides: Overrides = None,
    ratios: Annotated[str, typer.Option(help="Pruning ratios, joined by commas.")] = "0,0.25,0.5,0.75,0.9",
    turns: Annotated[int, typer.Option(help="How often each ratio is measured.", min=1, max=10_000)] = 20,
    cpu_ghz: Annotated[float | None, typer.Option(help="This machine's clock; default: what the system says.")] = None,
    ratios_only: Annotated[
        bool, typer.Option("--ratios-only", help="Leave out the kinds of layers, which take half a minute.")
    ] = False,
    class_name: Annotated[
        str, typer.Option("--class", help="What this machine is called as a class of real devices.")
    ] = "this_machine",
    busy_w: Annotated[float | None, typer.Option(help="What a meter shows while this machine trains.")] = None,
    idle_w: Annotated[float | None, typer.Option(help="What a meter shows while it does nothing.")] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="RUN_DIR",
            help="Measure nothing: fit a fleet and a channel to what the nodes of this run took.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for calibration.json and .svg and devices/CLASS.yaml; with --run for devices=fitted."
        ),
    ] = None,
    config_dir: ConfigDir = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine's step time against the latency model: at several ratios, and by kind of layer as a class of real devices.

    With --run the devices are those of a pilot: their speeds and uplinks come from the seconds that its rounds took on each of them.
    """
    if run is not None:
        if overrides or config_dir:
            raise ConfigError(
                f"{overrides[0] if overrides else '--config-dir'}: not with --run, whose folder has its configuration"
            )
        _fit(run, out, as_json=as_json)
        return
    from fedprune_cli.bench import calibrate as calibration
    from fedprune_cli.bench import kinds, machine, power
    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.config.compose import compose_config

    chosen, name, meter = (
        calibration.parse_ratios(ratios),
        machine.check_name(class_name),
        power.of_meter(busy_w, idle_w),
    )
    if cpu_ghz is not None and not 1e-6 <= cpu_ghz <= 1e6:
        raise ConfigError(f"--cpu-ghz {cpu_ghz}: must be in [1e-06, 1e+06]")
    config = compose_config([*(overrides or []), "pruner.granularity=channel"], config_dir)
    experiment = build_experiment(config)
    fleet = machine.fleet_to_join(config, config_dir)
    clock = calibration.clock_hz() if cpu_ghz is None else cpu_ghz * 1e9
    with status("measuring steps"):
        result = calibration.calibrate(experiment, chosen, turns, clock)
    this = None
    if not ratios_only:
        with status("measuring kinds of layers"):
            this = machine.measure(experiment, turns, (name, clock), meter)
    if out:
        calibration.write(out, result, this, fleet)
    if as_json:
        print_json(calibration.to_json(result, this))
        return
    show(calibration.table(result))
    say(result.sentence())
    ghz, cycles = f"{result.cpu_hz / 1e9:.6g}", f"{result.cycles_per_flop:.6g}"
    say(
        f"devices like this machine: devices=sampled devices.min_cpu_ghz={ghz} devices.max_cpu_ghz={ghz} "
        f"devices.min_cycles_per_flop={cycles} devices.max_cycles_per_flop={cycles}"
    )
    if this is not None:
        show(kinds.table(this.by_kind))
        say(f"{this.by_kind.sentence()} {this.power.said[0].upper()}{this.power.said[1:]}.")
        show(this.table())
    if out:
        use = f"devices=calibrated{f', or devices={name} as a class of real devices' if this else ''}"
        say(f"written: {out}/calibration.json, calibration.svg; use it with fedprune train --config-dir {out} {use}")


def _fit(run_dir: Path, out: Path | None, *, as_json: bool) -> None:
    """Fits a fleet and a channel to a pilot's run, prints how far the model was off, and writes them where it is asked to."""
    from fedprune_cli.bench import fitted
    from fedprune_cli.runs.life import reopen

    with status("reading the run"):
        setup = reopen(run_dir)
        fit = fitted.fit_run(setup, run_dir)
    if out:
        fitted.write(out, setup, fit)
    if as_json:
        print_json(fitted.to_json(fit))
        return
    show(fitted.table(fit))
    say(fitted.sentence(fit))
    if out:
        use = f"--config-dir {out} devices=fitted channel=fitted"
        say(f"written: {out}/fitted.json, fleet.csv; use it with fedprune serve PILOT {use}")
