"""What looks at runs that are there: `report`, `runs`, `watch`, `verify`; and how their figures are printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedprune_cli.commands.completion import BASH
from fedprune_cli.commands.options import Json, Plugins, Quiet
from fedprune_cli.errors import ConfigError
from fedprune_cli.terminal import live, print_json, say, show, status

if TYPE_CHECKING:
    from fedprune_cli.report.tuning import Tuned


def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="One run folder, several to compare, or folders of sweeps.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where it goes; default: report/ in a run or sweep, comparison/ beside the first of several runs."
        ),
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the report of a run or of a sweep, or compare several runs."""
    from fedprune_cli.report.run import write_report
    from fedprune_cli.report.sweep import ended

    if any(ended(path) for path in run_dirs):
        print_sweep(run_dirs, out or run_dirs[0] / "report", as_json=as_json)
    elif len(run_dirs) == 1:
        print_run(run_dirs[0], write_report(run_dirs[0], out), as_json=as_json)
    else:
        print_comparison(run_dirs, out or run_dirs[0].parent / "comparison", as_json=as_json)


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
            print_json([asdict(run) for run in found])
        else:
            show(listing.runs_table(found))
        return
    paths = listing.prunable(root)
    if yes:
        listing.prune(list(paths))
    if as_json:
        print_json({"removed": yes, "bytes": {str(path): size for path, size in paths.items()}})
        return
    for path, size in paths.items():
        say(f"{size / 1e6:8.2f} MB  {path}")
    total = f"{sum(paths.values()) / 1e6:.2f} MB in {len(paths)} files and folders"
    say(f"{total} removed" if yes else f"{total} can go: add --yes to remove them")


def watch(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|PILOT", help="The folder of a run, or of a pilot that is served.")
    ],
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="FIGURE<=VALUE, kept in every round, or FIGURE>=VALUE[@ROUND], kept at the end or from a round on; "
            "of nodes: nodes_late<=1."
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once instead of until the run is finished.")] = False,
    price_per_gb: Annotated[float, typer.Option(help="What a gigabyte sent costs.")] = 0.0,
    price_per_kwh: Annotated[float, typer.Option(help="What a kilowatt-hour costs.")] = 0.0,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT",
            help="Serve the same as a page, and at /metrics for Prometheus; to this machine unless HOST is given.",
        ),
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(metavar="URL", help="Post a JSON there when a limit is broken; needs --limit.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a run's key figures live, and the nodes of a pilot; exit code 9 when one breaks its limit, 5 when nobody runs it any more.

    A broken limit ends it at once; with --serve or --webhook it goes on to the run's end.
    """
    from fedprune_cli.audit import watch as watching

    limits, prices = [watching.parse_limit(text) for text in limit or ()], watching.Prices(price_per_gb, price_per_kwh)
    if webhook and not limits:
        raise ConfigError("--webhook: needs a --limit, of which it tells that it is broken")
    looks = watching.watch(run_dir, limits, prices, once=once, go_on=bool(serve or webhook))
    if serve or webhook:
        from fedprune_cli.audit.window import outward

        looks = outward(looks, str(run_dir), limits, serve, webhook)
    before = None
    with live() as update:
        for seen in looks:
            if as_json:
                print_json(seen.plain())
            else:
                update(seen.table(limits), None if seen.fleet is None else seen.lines(before))
            before = seen


def verify(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    every: Annotated[int, typer.Option(help="Solve every Nth round again with cvxpy.")] = 10,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Audit a run: checksums, records against state and summary, the meter's figures, allocations and certificates, some by cvxpy."""
    from dataclasses import asdict

    from fedprune_cli.audit.verify import verify_run
    from fedprune_cli.errors import CertificateError
    from fedprune_cli.runs.life import reopen

    with status("loading data and building the world"):
        setup = reopen(run_dir)
    findings = verify_run(setup, run_dir, every)
    if as_json:
        print_json(asdict(findings))
    else:
        show(findings.table())
    if findings.failures:
        raise CertificateError(
            f"{run_dir}: {findings.failures[0]}"
            + (f" (and {len(findings.failures) - 1} more)" if findings.failures[1:] else "")
        )


def completion() -> None:
    """Print what makes bash complete commands, groups, options and keys: eval "$(fedprune completion)" in ~/.bashrc.

    Other shells: fedprune --install-completion.
    """
    say(BASH)


def print_run(run_dir: Path, page: Path, *, as_json: bool) -> None:
    """Prints a run's figures and where its report is."""
    from fedprune_cli.report.read import read_run
    from fedprune_cli.report.run import run_json, run_table

    run = read_run(run_dir)
    if as_json:
        print_json(run_json(run, page))
        return
    show(run_table(run))
    say(f"report: {page}")


def print_sweep(folders: list[Path], out: Path, *, as_json: bool) -> None:
    """Writes the report of sweeps, and prints its table, its answer and what runs the best again."""
    from fedprune_cli.report import sweep

    members = sweep.read_combinations(folders)
    groups = sweep.build_groups(members)
    with status("drawing the report"):
        page = sweep.write_sweep(members, groups, out)
    if as_json:
        print_json(sweep.sweep_json(members, groups, page))
        return
    show(sweep.sweep_table(groups))
    show(sweep.sweep_headline(members, groups))
    say(f"again: {sweep.best_of(groups).command}")
    say(f"report: {page}")


def print_comparison(
    run_dirs: list[Path],
    out: Path,
    labels: list[str] | None = None,
    command: str | None = None,
    missing: Sequence[str] = (),
    tuned: Tuned | None = None,
    *,
    as_json: bool,
) -> None:
    """Writes the comparison of finished runs and prints its table and its answer, and before them how its arms were tuned."""
    from fedprune_cli.report import comparison_page as reports
    from fedprune_cli.report.comparison import compare, headline
    from fedprune_cli.report.presence import left_out
    from fedprune_cli.report.read import read_run
    from fedprune_cli.report.tuning import tuning_table

    comparison = compare([read_run(path) for path in run_dirs], labels)
    with status("drawing the comparison"):
        page = reports.write_comparison(comparison, out, command, missing, tuned)
    if as_json:
        print_json(reports.comparison_json(comparison, page, missing, tuned))
        return
    if tuned is not None:
        show(tuning_table(tuned))
    show(reports.comparison_table(comparison))
    show(headline(comparison))
    for arm, runs in comparison.runs.items():
        if found := left_out(runs):
            say(f"left out for good by {arm}: {found}")
    say(f"report: {page}")
