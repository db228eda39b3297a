"""The commands. Imports nothing heavy at the top: `fedprune --help` answers at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fedprune_cli import CONF, __version__
from fedprune_cli.commands.completion import BASH, complete_override
from fedprune_cli.errors import ConfigError, FedpruneError, out_of_memory
from fedprune_cli.terminal import be_quiet, counting, live, note, progress, say, show, status

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fedprune_cli.many.side_by_side import Failure, Member
    from fedprune_cli.round.all import Setup

INTERRUPTED = 130

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Federated learning on wireless edge devices: personalized, pruned, and allocated with a certificate.",
    epilog="Exit codes: 0 done, 2 configuration, 3 infeasible or regressed, 4 certificate, 5 run folder, 6 data, 7 device, 8 output, "
    "9 limit broken, 130 interrupted.",
)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OVERRIDES]...",
        help="Hydra overrides, such as data=fmnist partition.alpha=0.3.",
        autocompletion=complete_override,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=be_quiet, help="Print nothing but errors and what --json asks for.")
]


def main() -> NoReturn:
    """Runs the command line; a user's mistake is one line on stderr and an exit code of its own."""
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        raise SystemExit(app(standalone_mode=False) or 0)
    except FedpruneError as error:
        _fail(error)
    except (MemoryError, RuntimeError) as error:
        _fail(out_of_memory(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        # Typer's own errors have it; where their class is at home differs between its versions
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        text = " ".join(message().split())
        _fail(ConfigError(f"{text}{'' if text[-1] in '.?' else '.'} See `{_help_of(error)}`."))


def _help_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context else "fedprune --help"


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(error: FedpruneError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"fedprune {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one experiment: allocate, prune, train, aggregate, meter, record, and report.

    With -m a sweep: the same command again skips its finished runs and continues the others.
    """
    flags = ["--resolve"] * resolve
    for flag, value in (
        ("--cfg", cfg),
        ("-p", package),
        ("--info", info),
        ("--config-dir", config_dir),
        ("--config-name", config_name),
    ):
        flags += [flag, value] if value is not None else []
    from fedprune_cli.config.compose import check_config_dir, check_overrides

    check_overrides(overrides or [])
    if config_dir is not None:
        check_config_dir(Path(config_dir))
    if multirun and cfg is None and info is None:
        _sweep(flags, overrides or [], as_json=as_json)
        return
    configs: list[DictConfig] = []
    _hydra(configs.append, [*["-m"] * multirun, *flags, *(overrides or [])])
    for config in configs:  # none when the configuration was only shown
        _train(config, as_json=as_json)


def _hydra(task: Callable[[DictConfig], Any], arguments: list[str]) -> None:
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
    from fedprune_cli.report import sweep as reports

    asked = f"hydra.sweep.dir={sweep.sweep_dir([*flags, *overrides])}"
    given = [override.lstrip("+") for override in overrides if override.lstrip("+").startswith("hydra.sweep.dir=")]
    place = Path([asked, *given][-1].partition("=")[2])
    overrides = overrides if given else [*overrides, asked]
    for old in reports.ended(place):
        old.unlink()
    try:
        with counting("runs ended", lambda: len(reports.ended(place))):
            _hydra(sweep.run_combination, ["-m", *flags, *overrides])
    except KeyboardInterrupt:
        note("interrupted; every finished round is safe: the same command continues")
        raise SystemExit(INTERRUPTED) from None
    members = reports.read_combinations([place])
    failed = [member for member in members if member.error is not None]
    if len(failed) < len(members):
        _report_sweep([place], place / "report", as_json=as_json)
    if failed:
        error = FedpruneError(f"{len(failed)} of {len(members)} runs of the sweep failed, see above")
        error.exit_code = failed[0].exit_code
        raise error


def _report_sweep(folders: list[Path], out: Path, *, as_json: bool) -> None:
    from fedprune_cli.report import sweep as reports

    members = reports.read_combinations(folders)
    groups = reports.build_groups(members)
    with status("drawing the report"):
        page = reports.write_sweep(members, groups, out)
    if as_json:
        print(json.dumps(reports.sweep_json(members, groups, page)))
        return
    show(reports.sweep_table(groups))
    show(reports.sweep_headline(members, groups))
    say(f"again: {reports.best_of(groups).command}")
    say(f"report: {page}")


def _train(config: DictConfig, *, as_json: bool) -> None:
    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.round.all import create, prepare

    experiment = build_experiment(config)
    with status("loading data and building the world"):
        setup = prepare(experiment)
    create(setup, config, experiment.run_dir)
    _show(experiment.run_dir, _continue(setup, experiment.run_dir), as_json=as_json)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of a branch: rounds, deadline.* and out, its own folder."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue an interrupted run; it ends with the bytes of one that was never interrupted.

    With KEY=VALUE go on from where the run is as a branch, another run that says where it comes from; the first one stays as it is.
    """
    from fedprune_cli.round.all import branch, reopen

    with status("loading data and building the world"):
        setup = branch(run_dir, overrides) if overrides else reopen(run_dir)
    if overrides:
        run_dir = setup.experiment.run_dir
        note(f"a branch: {run_dir}")
    _show(run_dir, _continue(setup, run_dir), as_json=as_json)


def _continue(setup: Setup, run_dir: Path) -> Path:
    """Runs the remaining rounds under a progress display, then writes the report; returns its page."""
    from fedprune_cli.report.run import write_report
    from fedprune_cli.round.all import run

    try:
        with progress(setup.experiment.method.name, setup.experiment.rounds) as seen:
            for record in run(setup, run_dir):
                seen(record)
    except KeyboardInterrupt:
        note(f"interrupted; every finished round is safe: fedprune resume {run_dir}")
        raise SystemExit(INTERRUPTED) from None
    with status("drawing the report"):
        return write_report(run_dir)


def _show(run_dir: Path, page: Path, *, as_json: bool) -> None:
    """Prints a run's figures and where its report is."""
    from fedprune_cli.report.read import read_run
    from fedprune_cli.report.run import run_json, run_table

    run = read_run(run_dir)
    if as_json:
        print(json.dumps(run_json(run, page)))
        return
    show(run_table(run))
    say(f"report: {page}")


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="One run folder, several to compare, or folders of sweeps.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where it goes; default: report/ in a run or sweep, comparison/ beside the first of several runs."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the report of a run or of a sweep, or compare several runs."""
    from fedprune_cli.report.run import write_report
    from fedprune_cli.report.sweep import ended

    if any(ended(path) for path in run_dirs):
        _report_sweep(run_dirs, out or run_dirs[0] / "report", as_json=as_json)
    elif len(run_dirs) == 1:
        _show(run_dirs[0], write_report(run_dirs[0], out), as_json=as_json)
    else:
        _compare(run_dirs, out or run_dirs[0].parent / "comparison", as_json=as_json)


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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run several methods on the same data, devices and channel draws, and report what each gains.

    Finished runs are read and not run again; interrupted ones are continued. A run that fails is named, and the rest go on.
    """
    from omegaconf import OmegaConf

    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.config.compose import compose_config
    from fedprune_cli.many.side_by_side import Member

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
        note(f"{len(members) - len(unfinished)} of {len(members)} runs were finished before")
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
            as_json=as_json,
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
    from omegaconf import DictConfig, OmegaConf

    from fedprune_cli.many.side_by_side import Failure, run_members
    from fedprune_cli.round.all import begin_or_reopen
    from fedprune_cli.store.folder import read_summary

    def one_by_one() -> Iterator[tuple[Member, Failure | None]]:
        for member in members:
            try:
                config = OmegaConf.create(member.config)
                assert isinstance(config, DictConfig)
                with status("loading data and building the world"):
                    setup = begin_or_reopen(config)
                _continue(setup, member.run_dir)
                yield member, None
            except FedpruneError as error:
                yield member, Failure(member, error.exit_code, str(error))

    failures = []
    try:
        side_by_side = jobs > 1
        ended = run_members(members, jobs) if side_by_side else one_by_one()
        with status(f"{len(members)} runs, {jobs} at a time") if side_by_side else contextlib.nullcontext():
            for number, (member, failure) in enumerate(ended, start=1):
                if failure is None:
                    accuracy = 100 * (read_summary(member.run_dir) or {})["final_accuracy"]
                    note(f"{number}/{len(members)}  {member}: accuracy {accuracy:.2f} %, {member.run_dir}")
                else:
                    failures.append(failure)
                    print(f"error: {failure}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        note("interrupted; every finished round is safe: the same command continues")
        raise SystemExit(INTERRUPTED) from None
    return failures


def _arms(overrides: list[str], methods: str | None) -> dict[str, list[str]]:
    """Returns what to compare, name -> overrides: the methods named, else the experiment's arms, else the two of the headline."""
    from omegaconf import OmegaConf

    from fedprune_cli.config.compose import compose_config

    arms = OmegaConf.to_container(compose_config(overrides).arms or OmegaConf.create({}))
    if methods is not None or not arms:
        return {name: [f"method={name}"] for name in (methods or "proposed,personalized").split(",")}
    if not isinstance(arms, dict) or not all(isinstance(of, list) for of in arms.values()):
        raise ConfigError("arms: must map each name to a list of overrides, such as {tight: [deadline.fraction=0.3]}")
    return {str(name): [str(override) for override in of] for name, of in arms.items()}


@app.command()
def runs(
    root: Annotated[Path, typer.Argument(help="Where to look.")] = Path("outputs"),
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Show what can go: checkpoints of finished runs, and folders left half made."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --prune: remove it.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the runs of a folder, and free space.

    What is pruned is only what more rounds would need: records, configurations, summaries and reports stay.
    """
    from dataclasses import asdict

    from fedprune_cli.audit import listing

    if not prune:
        found = listing.find_runs(root)
        if as_json:
            print(json.dumps([asdict(run) for run in found]))
        else:
            show(listing.runs_table(found))
        return
    paths = listing.prunable(root)
    if yes:
        listing.prune(list(paths))
    if as_json:
        print(json.dumps({"removed": yes, "bytes": {str(path): size for path, size in paths.items()}}))
        return
    for path, size in paths.items():
        say(f"{size / 1e6:8.2f} MB  {path}")
    total = f"{sum(paths.values()) / 1e6:.2f} MB in {len(paths)} files and folders"
    say(f"{total} removed" if yes else f"{total} can go: add --yes to remove them")


@app.command()
def watch(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="FIGURE<=VALUE, kept in every round, or FIGURE>=VALUE[@ROUND], kept at the end or from a round on."
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once instead of until the run is finished.")] = False,
    price_per_gb: Annotated[float, typer.Option(help="What a gigabyte sent costs.")] = 0.0,
    price_per_kwh: Annotated[float, typer.Option(help="What a kilowatt-hour costs.")] = 0.0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a run's key figures live; exit code 9 as soon as one breaks its limit, 5 when nobody runs it any more."""
    from fedprune_cli.audit import watch as watching

    limits, prices = [watching.parse_limit(text) for text in limit or ()], watching.Prices(price_per_gb, price_per_kwh)
    with live() as update:
        for seen in watching.watch(run_dir, limits, prices, once=once):
            if as_json:
                last = seen.rows[-1] if seen.rows else {}
                print(json.dumps({"round": len(seen.rows), "finished": seen.finished, **last}), flush=True)
            else:
                update(seen.table(limits))


@app.command()
def completion() -> None:
    """Print what makes bash complete commands, groups, options and keys: eval "$(fedprune completion)" in ~/.bashrc.

    Other shells: fedprune --install-completion.
    """
    say(BASH)


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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose every device's pruning ratio and bandwidth for one round, without training."""
    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.config.compose import compose_config
    from fedprune_cli.errors import unknown
    from fedprune_cli.round.table import answer, frontier_rows, price_sentence, problem_from_config, problem_from_csv

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
        from fedprune_cli.report.allocation import write_allocation

        write_allocation(out, result, frontier_rows(problem))
    if as_json:
        print(json.dumps(result))
        return
    from fedprune_cli.report.allocation import allocation_table

    show(allocation_table(result))
    show(price_sentence(problem, result))
    if out:
        say(f"written: {out}/allocation.csv, allocation.json, frontier.csv, frontier.svg")


@app.command()
def ladder(
    overrides: Overrides = None,
    allocators: Annotated[
        str, typer.Option(help="Allocators, joined by commas.")
    ] = "kkt,minmax,equal,uniform,alternating",
    fractions: Annotated[
        str, typer.Option(help="Deadlines as fractions of the dense optimum.")
    ] = "0.4,0.5,0.6,0.7,0.8,0.9,1.0",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare allocators by deadline on one round: weighted mean and largest pruning ratio."""
    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.config.compose import compose_config
    from fedprune_cli.round.table import ladder as build_ladder
    from fedprune_cli.round.table import problem_from_config

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
    from fedprune_cli.report.allocation import ladder_table

    show(ladder_table(rows))


@app.command()
def verify(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    every: Annotated[int, typer.Option(help="Solve every Nth round again with cvxpy.")] = 10,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Audit a run: checksums, records against state and summary, the meter's figures, allocations and certificates, some by cvxpy."""
    from dataclasses import asdict

    from fedprune_cli.audit.verify import verify_run
    from fedprune_cli.errors import CertificateError
    from fedprune_cli.round.all import reopen

    with status("loading data and building the world"):
        setup = reopen(run_dir)
    findings = verify_run(setup, run_dir, every)
    if as_json:
        print(json.dumps(asdict(findings)))
    else:
        show(findings.table())
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
    as_json: Json = False,
    quiet: Quiet = False,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and github-action-benchmark's files.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="A bench.json to compare with; worse is exit code 3.")] = None,
    max_regression: Annotated[str, typer.Option(help="How much worse an exact figure may be.")] = "15%",
    max_wall_regression: Annotated[str, typer.Option(help="How much worse a measured ratio may be.")] = "100%",
) -> None:
    """Measure fedprune against bare references in the same run, and compare with an earlier measurement."""
    from fedprune_cli.bench import all as benches

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
        print(json.dumps(benches.to_json(measures, quick)))
    else:
        show(benches.table(measures))
    for line in notes:
        (note if as_json else say)(line)
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine's step time at several ratios against the latency model, and fit the model's constant."""
    from fedprune_cli.bench import calibrate as calibration
    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.config.compose import compose_config

    chosen = calibration.parse_ratios(ratios)
    if cpu_ghz is not None and not 1e-6 <= cpu_ghz <= 1e6:
        raise ConfigError(f"--cpu-ghz {cpu_ghz}: must be in [1e-06, 1e+06]")
    experiment = build_experiment(compose_config([*(overrides or []), "pruner.granularity=channel"]))
    clock = calibration.clock_hz() if cpu_ghz is None else cpu_ghz * 1e9
    with status("measuring steps"):
        result = calibration.calibrate(experiment, chosen, turns, clock)
    if out:
        calibration.write(out, result)
    if as_json:
        print(json.dumps(calibration.to_json(result)))
        return
    show(calibration.table(result))
    say(result.sentence())
    ghz, cycles = f"{result.cpu_hz / 1e9:.6g}", f"{result.cycles_per_flop:.6g}"
    say(
        f"devices like this machine: devices.min_cpu_ghz={ghz} devices.max_cpu_ghz={ghz} "
        f"devices.min_cycles_per_flop={cycles} devices.max_cycles_per_flop={cycles}"
    )
    if out:
        say(
            f"written: {out}/calibration.json, calibration.svg; use it with fedprune train --config-dir {out} devices=calibrated"
        )


def _compare(
    run_dirs: list[Path],
    out: Path,
    labels: list[str] | None = None,
    command: str | None = None,
    missing: Sequence[str] = (),
    *,
    as_json: bool,
) -> None:
    """Writes the comparison of finished runs and prints its table and its answer."""
    from fedprune_cli.report import comparison_page as reports
    from fedprune_cli.report.comparison import compare as compare_runs
    from fedprune_cli.report.comparison import headline
    from fedprune_cli.report.read import read_run

    comparison = compare_runs([read_run(path) for path in run_dirs], labels)
    with status("drawing the comparison"):
        page = reports.write_comparison(comparison, out, command, missing)
    if as_json:
        print(json.dumps(reports.comparison_json(comparison, page, missing)))
        return
    show(reports.comparison_table(comparison))
    show(headline(comparison))
    say(f"report: {page}")
