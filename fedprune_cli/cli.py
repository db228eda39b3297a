"""The commands. Imports nothing heavy at the top: `fedprune --help` answers at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fedprune_cli import __version__
from fedprune_cli.errors import ConfigError, DeviceError, FedpruneError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fedprune_cli.config import Experiment
    from fedprune_cli.members import Failure, Member
    from fedprune_cli.run import Record, Setup

INTERRUPTED = 130

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated learning on wireless edge devices: personalized, pruned, and allocated with a certificate.",
    epilog="Exit codes: 0 done, 2 configuration, 3 infeasible or regressed, 4 certificate, 5 run folder, 6 data, 7 device, 8 output, "
    "130 interrupted.",
)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OVERRIDES]...", help="Hydra overrides, such as data=fmnist partition.alpha=0.3."),
]


def main() -> NoReturn:
    """Runs the command line; a user's mistake is one line on stderr and an exit code of its own."""
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        app(standalone_mode=True)
    except FedpruneError as error:
        _fail(error)
    except (MemoryError, RuntimeError) as error:
        _fail(_out_of_memory(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    raise SystemExit(0)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _out_of_memory(error: MemoryError | RuntimeError) -> DeviceError:
    """Returns a refusal of memory, NumPy's or PyTorch's, as an error of one line; raises every other one again."""
    if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
        raise error
    return DeviceError(f"out of memory ({str(error) or 'refused by the system'}); finished rounds are safe")


def _fail(error: FedpruneError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"fedprune {__version__}")
        raise typer.Exit


@app.command(context_settings={"ignore_unknown_options": True})
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
    config_dir: Annotated[
        str | None, typer.Option("--config-dir", help="A folder of further configuration files.")
    ] = None,
    config_name: Annotated[str | None, typer.Option("--config-name", help="Another primary configuration.")] = None,
) -> None:
    """Train one experiment: allocate, prune, train, aggregate, meter, record, and report."""
    flags = ["-m"] * multirun + ["--resolve"] * resolve
    for flag, value in (
        ("--cfg", cfg),
        ("-p", package),
        ("--info", info),
        ("--config-dir", config_dir),
        ("--config-name", config_name),
    ):
        flags += [flag, value] if value is not None else []
    from fedprune_cli.config import check_config_dir, check_overrides

    check_overrides(overrides or [])
    if config_dir is not None:
        check_config_dir(Path(config_dir))
    _hydra(flags + (overrides or []))


def _hydra(arguments: list[str]) -> None:
    """Hands the arguments to Hydra itself, so that its flags, sweepers and launchers all work."""
    import hydra

    from fedprune_cli.config import CONF, explain

    composed = False
    failures: list[FedpruneError] = []

    def task(config: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:
            _train(config)
        except (FedpruneError, MemoryError, RuntimeError) as error:
            # kept from Hydra, which would print a line of its own and end a sweep
            failures.append(error if isinstance(error, FedpruneError) else _out_of_memory(error))
            if "-m" in arguments:
                print(f"error: {failures[-1]}", file=sys.stderr)

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["fedprune train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)()
    except Exception as error:
        if composed:
            raise
        raise explain(error) from None
    finally:
        sys.argv = argv
        if full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    if failures and "-m" in arguments:
        raise type(failures[0])(f"{len(failures)} members of the sweep failed, see above")
    if failures:
        raise failures[0]


def _train(config: DictConfig) -> None:
    from fedprune_cli.config import build_experiment

    experiment = build_experiment(config)
    _show(experiment.run_dir, _start(experiment, config))


def _start(experiment: Experiment, config: DictConfig) -> Path:
    """Makes a new run and takes it to its end; returns the report's page."""
    from fedprune_cli.run import create, prepare

    run_dir = experiment.run_dir
    with _status("loading data and building the world"):
        setup = prepare(experiment)
    create(setup, config, run_dir)
    return _continue(setup, run_dir)


@app.command()
def resume(run_dir: Annotated[Path, typer.Argument(help="The folder of an interrupted run.")]) -> None:
    """Continue an interrupted run; it ends with the bytes of one that was never interrupted."""
    _show(run_dir, _resume(run_dir))


def _resume(run_dir: Path) -> Path:
    from fedprune_cli.run import reopen

    with _status("loading data and building the world"):
        setup = reopen(run_dir)
    return _continue(setup, run_dir)


def _continue(setup: Setup, run_dir: Path) -> Path:
    """Runs the remaining rounds under a progress display, then writes the report; returns its page."""
    from fedprune_cli.report import write_report
    from fedprune_cli.run import run

    try:
        with _progress(setup.experiment) as show:
            for record in run(setup, run_dir):
                show(record)
    except KeyboardInterrupt:
        print(f"interrupted; every finished round is safe: fedprune resume {run_dir}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    with _status("drawing the report"):
        return write_report(run_dir)


def _show(run_dir: Path, page: Path) -> None:
    """Prints a run's table and where its report is."""
    from fedprune_cli.report import read_run, run_table

    _print(run_table(read_run(run_dir)))
    print(f"report: {page}")


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="One run folder, or several to compare.")],
    out: Annotated[
        Path | None, typer.Option(help="Where a comparison goes; default: comparison/ beside the first run.")
    ] = None,
) -> None:
    """Draw the report of a run, or compare several runs."""
    if len(run_dirs) == 1:
        from fedprune_cli.report import write_report

        _show(run_dirs[0], write_report(run_dirs[0]))
    else:
        _compare(run_dirs, out or run_dirs[0].parent / "comparison")


@app.command()
def compare(
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods to compare, joined by commas; default: the experiment's arms, or proposed,personalized."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas; each is run with every method.")] = "0",
    out: Annotated[Path | None, typer.Option(help="Where the comparison goes; default: beside the runs.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at the same time, each on one core; 1: one by one; default: the cores."),
    ] = None,
) -> None:
    """Run several methods on the same data, devices and channel draws, and report what each gains.

    Finished runs are read and not run again; interrupted ones are continued. A run that fails is named, and the rest go on.
    """
    from omegaconf import OmegaConf

    from fedprune_cli.config import build_experiment, compose_config
    from fedprune_cli.members import Member

    if not seeds.replace(",", "").isdigit():
        raise ConfigError(f"--seeds {seeds}: must be whole numbers joined by commas")
    if any(override.lstrip("+").split("=")[0] in ("method", "seed", "out") for override in overrides or []):
        raise ConfigError("compare chooses method, seed and out itself: use --methods, --seeds and --out")
    arms = _arms(overrides or [], methods)
    chosen = [(arm, int(seed)) for seed in seeds.split(",") for arm in arms]
    configs = [compose_config([*(overrides or []), *arms[arm], f"seed={seed}"]) for arm, seed in chosen]
    run_dirs = [build_experiment(config).run_dir for config in configs]  # all are checked before the first one runs
    members = [
        Member(arm, seed, OmegaConf.to_yaml(config, resolve=True), run_dir)
        for (arm, seed), config, run_dir in zip(chosen, configs, run_dirs, strict=True)
    ]
    unfinished = [member for member in members if not (member.run_dir / "summary.json").exists()]
    if len(unfinished) < len(members):
        print(f"{len(members) - len(unfinished)} of {len(members)} runs were finished before")
    failures = _run_members(unfinished, min(jobs or _usable_cores(), len(unfinished)))
    failed = {failure.member.seed for failure in failures}
    complete = [member for member in members if member.seed not in failed]
    if complete:
        digest = hashlib.sha256(" ".join(str(member.run_dir) for member in members).encode()).hexdigest()[:8]
        _compare(
            [member.run_dir for member in complete],
            out or members[0].run_dir.parent / f"comparison-{digest}",
            [member.arm for member in complete],
            command=shlex.join(["fedprune", *sys.argv[1:]]),
            missing=[str(failure) for failure in failures],
        )
    if failures:
        left_out = f"; left out of the report: seed {', '.join(map(str, sorted(failed)))}" if complete else ""
        error = FedpruneError(f"{len(failures)} of {len(members)} runs failed, see above{left_out}")
        error.exit_code = failures[0].exit_code
        raise error


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_members(members: Sequence[Member], jobs: int) -> list[Failure]:
    """Takes the members to their ends, side by side or one by one; says of each how it ended, and returns the failures."""
    from fedprune_cli.folder import read_summary
    from fedprune_cli.members import Failure, run_members

    def one_by_one() -> Iterator[tuple[Member, Failure | None]]:
        for member in members:
            try:
                _resume(member.run_dir) if member.run_dir.exists() else _begin(member.config)
                yield member, None
            except FedpruneError as error:
                yield member, Failure(member, error.exit_code, str(error))

    failures = []
    try:
        side_by_side = jobs > 1
        ended = run_members(members, jobs) if side_by_side else one_by_one()
        with _status(f"{len(members)} runs, {jobs} at a time") if side_by_side else contextlib.nullcontext():
            for number, (member, failure) in enumerate(ended, start=1):
                if failure is None:
                    accuracy = 100 * (read_summary(member.run_dir) or {})["final_accuracy"]
                    print(f"{number}/{len(members)}  {member}: accuracy {accuracy:.2f} %, {member.run_dir}", flush=True)
                else:
                    failures.append(failure)
                    print(f"error: {failure}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted; every finished round is safe: the same command continues", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    return failures


def _begin(config_yaml: str) -> None:
    from omegaconf import DictConfig, OmegaConf

    from fedprune_cli.config import build_experiment

    config = OmegaConf.create(config_yaml)
    assert isinstance(config, DictConfig)
    _start(build_experiment(config), config)


def _arms(overrides: list[str], methods: str | None) -> dict[str, list[str]]:
    """Returns what to compare, name -> overrides: the methods named, else the experiment's arms, else the two of the headline."""
    from omegaconf import OmegaConf

    from fedprune_cli.config import compose_config

    arms = OmegaConf.to_container(compose_config(overrides).arms or OmegaConf.create({}))
    if methods is not None or not arms:
        return {name: [f"method={name}"] for name in (methods or "proposed,personalized").split(",")}
    if not isinstance(arms, dict) or not all(isinstance(of, list) for of in arms.values()):
        raise ConfigError("arms: must map each name to a list of overrides, such as {tight: [deadline.fraction=0.3]}")
    return {str(name): [str(override) for override in of] for name, of in arms.items()}


@app.command()
def allocate(
    overrides: Overrides = None,
    devices: Annotated[
        Path | None, typer.Option(help="A CSV table of devices, physical columns or the problem's own.")
    ] = None,
    objective: Annotated[
        str, typer.Option(help="p1 (least mean ratio), p2 (least deadline) or minmax (least largest ratio).")
    ] = "p1",
    bandwidth_mhz: Annotated[float | None, typer.Option(help="Total uplink bandwidth.")] = None,
    deadline_s: Annotated[float | None, typer.Option(help="Deadline of the round in seconds.")] = None,
    deadline_fraction: Annotated[
        float | None, typer.Option(help="Deadline as a fraction of the dense optimum.")
    ] = None,
    max_ratio: Annotated[float | None, typer.Option(help="The most a device may drop.")] = None,
    mean_ratio: Annotated[float | None, typer.Option(help="For p2: the weighted mean ratio allowed.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for allocation.csv, allocation.json and frontier.svg.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Choose every device's pruning ratio and bandwidth for one round, without training."""
    import json

    from fedprune_cli.config import build_experiment, compose_config
    from fedprune_cli.errors import unknown
    from fedprune_cli.planning import answer, frontier_rows, price_sentence, problem_from_config, problem_from_csv

    allocators = {"p1": "kkt", "p2": "minlatency", "minmax": "minmax"}
    if objective not in allocators:
        raise unknown("objective", objective, allocators)
    chosen = [*(overrides or [])]
    if not any(override.split("=")[0] == "allocator" for override in chosen):
        chosen.append(f"allocator={allocators[objective]}")
    options = {"channel.bandwidth_mhz": bandwidth_mhz, "deadline.seconds": deadline_s, "deadline.fraction": deadline_fraction,
               "pruner.max_ratio": max_ratio, "allocator.mean_ratio": mean_ratio}  # fmt: skip
    chosen += [f"{key}={value}" for key, value in options.items() if value is not None]
    experiment = build_experiment(compose_config(chosen))
    problem = problem_from_csv(devices, experiment) if devices else problem_from_config(experiment)
    result = answer(problem, experiment.allocator.solve(problem, experiment.seed, 0))
    if out:
        from fedprune_cli.report import write_allocation

        write_allocation(out, result, frontier_rows(problem))
    if as_json:
        print(json.dumps(result))
        return
    from fedprune_cli.report import allocation_table

    _print(allocation_table(result))
    _print(price_sentence(problem, result))
    if out:
        print(f"written: {out}/allocation.csv, allocation.json, frontier.csv, frontier.svg")


@app.command()
def ladder(
    overrides: Overrides = None,
    allocators: Annotated[
        str, typer.Option(help="Allocators, joined by commas.")
    ] = "kkt,minmax,equal,uniform,alternating",
    fractions: Annotated[
        str, typer.Option(help="Deadlines as fractions of the dense optimum.")
    ] = "0.4,0.5,0.6,0.7,0.8,0.9,1.0",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Compare allocators by deadline on one round: weighted mean and largest pruning ratio."""
    import json

    from fedprune_cli.config import build_experiment, compose_config
    from fedprune_cli.planning import ladder as build_ladder
    from fedprune_cli.planning import problem_from_config

    try:
        wanted = [float(text) for text in fractions.split(",")]
    except ValueError:
        raise ConfigError(f"--fractions {fractions}: must be numbers joined by commas") from None
    chosen = {
        name: build_experiment(compose_config([*(overrides or []), f"allocator={name}"]))
        for name in allocators.split(",")
    }
    problem = problem_from_config(next(iter(chosen.values())))
    rows = build_ladder(problem, {name: experiment.allocator for name, experiment in chosen.items()}, wanted)
    if as_json:
        print(json.dumps(rows))
        return
    from fedprune_cli.report import ladder_table

    _print(ladder_table(rows))


@app.command()
def verify(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    every: Annotated[int, typer.Option(help="Solve every Nth round again with cvxpy.")] = 10,
) -> None:
    """Audit a run: checksums, records against state and summary, the meter's figures, allocations and certificates, some by cvxpy."""
    from fedprune_cli.errors import CertificateError
    from fedprune_cli.run import reopen
    from fedprune_cli.verify import verify_run

    with _status("loading data and building the world"):
        setup = reopen(run_dir)
    findings = verify_run(setup, run_dir, every)
    _print(findings.table())
    if findings.failures:
        raise CertificateError(
            f"{run_dir}: {findings.failures[0]}"
            + (f" (and {len(findings.failures) - 1} more)" if findings.failures[1:] else "")
        )


@app.command()
def bench(
    tasks: Annotated[str, typer.Option(help="Tasks, joined by commas.")] = "t1,t2,t3,allocator,startup",
    repeats: Annotated[int, typer.Option(help="How often each pair is measured.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure smaller rounds, twice, in less than a minute.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and github-action-benchmark's files.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="A bench.json to compare with; worse is exit code 3.")] = None,
    max_regression: Annotated[str, typer.Option(help="How much worse an exact figure may be.")] = "15%",
    max_wall_regression: Annotated[str, typer.Option(help="How much worse a measured ratio may be.")] = "100%",
) -> None:
    """Measure fedprune against bare references in the same run, and compare with an earlier measurement."""
    import json

    from fedprune_cli import bench as benches

    chosen, effort = benches.choose(tasks), benches.build_effort(repeats, quick)
    limits = benches.parse_limits(max_regression, max_wall_regression)
    earlier = benches.read_baseline(baseline, chosen, quick) if baseline else ()
    if out:
        benches.make_folder(out)
    measures: list[benches.Measure] = []
    notes: list[str] = []
    for name in chosen:
        with _status(f"measuring {name}"):
            measures += benches.TASKS[name](effort, notes.append)
    if out:
        benches.write(out, measures, quick)
    if as_json:
        print(json.dumps(benches.to_json(measures, quick)))
    else:
        _print(benches.table(measures))
    for note in notes:
        print(note, file=sys.stderr if as_json else sys.stdout)
    if baseline:
        found = benches.regressions(measures, earlier, limits)
        for regression in found:
            print(regression, file=sys.stderr)
        benches.check(found, baseline)


@app.command()
def calibrate(
    overrides: Overrides = None,
    ratios: Annotated[str, typer.Option(help="Pruning ratios, joined by commas.")] = "0,0.25,0.5,0.75,0.9",
    turns: Annotated[int, typer.Option(help="How often each ratio is measured.", min=1, max=10_000)] = 20,
    cpu_ghz: Annotated[float | None, typer.Option(help="This machine's clock; default: what the system says.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for calibration.json, calibration.svg and devices/calibrated.yaml.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Measure this machine's step time at several ratios against the latency model, and fit the model's constant."""
    import json

    from fedprune_cli import calibrate as calibration
    from fedprune_cli.config import build_experiment, compose_config

    chosen = calibration.parse_ratios(ratios)
    if cpu_ghz is not None and not 1e-6 <= cpu_ghz <= 1e6:
        raise ConfigError(f"--cpu-ghz {cpu_ghz}: must be in [1e-06, 1e+06]")
    experiment = build_experiment(compose_config([*(overrides or []), "pruner.granularity=channel"]))
    clock = calibration.clock_hz() if cpu_ghz is None else cpu_ghz * 1e9
    with _status("measuring steps"):
        result = calibration.calibrate(experiment, chosen, turns, clock)
    if out:
        calibration.write(out, result)
    if as_json:
        print(json.dumps(calibration.to_json(result)))
        return
    _print(calibration.table(result))
    print(result.sentence())
    ghz, cycles = f"{result.cpu_hz / 1e9:.6g}", f"{result.cycles_per_flop:.6g}"
    print(
        f"devices like this machine: devices.min_cpu_ghz={ghz} devices.max_cpu_ghz={ghz} "
        f"devices.min_cycles_per_flop={cycles} devices.max_cycles_per_flop={cycles}"
    )
    if out:
        print(
            f"written: {out}/calibration.json, calibration.svg; use it with fedprune train --config-dir {out} devices=calibrated"
        )


def _compare(
    run_dirs: list[Path],
    out: Path,
    labels: list[str] | None = None,
    command: str | None = None,
    missing: Sequence[str] = (),
) -> None:
    """Writes the comparison of finished runs and prints its table and its answer."""
    from fedprune_cli import report as reports

    comparison = reports.compare([reports.read_run(path) for path in run_dirs], labels)
    with _status("drawing the comparison"):
        page = reports.write_comparison(comparison, out, command, missing)
    _print(reports.comparison_table(comparison))
    _print(reports.headline(comparison))
    print(f"report: {page}")


def _print(table: Any) -> None:
    from rich.console import Console

    Console(markup=False, emoji=False).print(table)  # names are the user's, and may look like markup


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    """Says what is going on while it takes long, on a terminal only."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def _progress(experiment: Experiment) -> Iterator[Callable[[Record], None]]:
    """Yields a function that shows a record: a live bar on a terminal, else a line every two seconds at most."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(experiment.method.name, total=experiment.rounds, figures="")
            yield lambda record: bar.update(task, completed=record["round"], figures=_figures(record))
        return
    started = shown = time.monotonic()
    first = 0

    def line(record: Record) -> None:
        nonlocal shown, first
        first = first or record["round"] - 1
        now, left = time.monotonic(), experiment.rounds - record["round"]
        if now - shown >= 2 or not left:
            shown = now
            eta = (now - started) / (record["round"] - first) * left
            print(
                f"round {record['round']}/{experiment.rounds}  {_figures(record)}  ETA {eta:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    yield line


def _figures(record: Record) -> str:
    """Returns a round's figures in a few words."""
    accuracy = "" if record["accuracy"] is None else f"accuracy {100 * record['accuracy']:.1f} %  "
    ratio = "" if record["mean_ratio"] is None else f"  ratio {record['mean_ratio']:.2f}"
    return f"{accuracy}simulated {record['simulated_s']:.4g} s{ratio}"
