"""`compare`: methods, or an experiment's arms, on the same data, devices and channel draws."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedprune_cli.commands.look import print_comparison
from fedprune_cli.commands.options import ConfigDir, Json, Overrides, Plugins, Quiet
from fedprune_cli.errors import FedpruneError
from fedprune_cli.interrupt import NOTHING, SAME_COMMAND, safe
from fedprune_cli.terminal import note, status, tell_error

if TYPE_CHECKING:
    from fedprune_cli.many.side_by_side import Failure, Member


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
    config_dir: ConfigDir = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run several methods on the same data, devices and channel draws, and report what each gains.

    Finished runs are read and not run again; interrupted ones are continued. A run that fails is named, and the rest go on.
    Where the experiment says how, each arm first takes its best setting on a seed that is not reported.
    """
    from fedprune_cli.config.words import parse_seeds
    from fedprune_cli.many.compared import build_members, read_contest
    from fedprune_cli.many.tuning import read_tuning, tune

    contest, tuned = read_contest(overrides or [], config_dir, methods, parse_seeds(seeds)), None
    with status("checking what each arm may choose from") if contest.tune else contextlib.nullcontext():
        tuning = read_tuning(contest)
    if tuning is not None:
        with safe(lambda: SAME_COMMAND):
            contest, tuned = tune(contest, tuning, lambda members: _run_members(members, jobs))
        for arm, setting in tuned.chosen.items():
            note(f"{arm} takes {setting}")
    members = build_members(contest)
    with safe(lambda: SAME_COMMAND if any(member.run_dir.exists() for member in members) else NOTHING):
        failures = _run_members(members, jobs)
        failed = {failure.member.seed for failure in failures}
        complete = [member for member in members if member.seed not in failed]
        if complete:
            digest = hashlib.sha256(" ".join(str(member.run_dir) for member in members).encode()).hexdigest()[:8]
            print_comparison(
                [member.run_dir for member in complete],
                out or members[0].run_dir.parent / f"comparison-{digest}",
                [member.arm for member in complete],
                command=shlex.join(["fedprune", *sys.argv[1:]]),
                missing=[str(failure) for failure in failures],
                tuned=tuned,
                as_json=as_json,
            )
    if failures:
        left_out = f"; left out of the report: seed {', '.join(map(str, sorted(failed)))}" if complete else ""
        error = FedpruneError(f"{len(failures)} of {len(members)} runs failed, see above{left_out}")
        error.exit_code = failures[0].exit_code
        raise error


def _run_members(members: Sequence[Member], jobs: int | None) -> list[Failure]:
    """Takes those that are not finished to their ends, side by side or one by one; says of each how it ended, and returns the failures."""
    from fedprune_cli.execute import usable_cores
    from fedprune_cli.many.compared import unfinished
    from fedprune_cli.many.one import SHOWN
    from fedprune_cli.many.side_by_side import run_members, run_one_by_one
    from fedprune_cli.store.folder import read_summary

    left, failures = unfinished(members), list["Failure"]()
    if before := sum(member.finished for member in members):
        note(f"{before} of {len(members)} runs were finished before")
    at_once = min(jobs or usable_cores(), len(left))
    side_by_side = at_once > 1
    ended = run_members(left, at_once) if side_by_side else run_one_by_one(left, SHOWN)
    with status(f"{len(left)} runs, {at_once} at a time") if side_by_side else contextlib.nullcontext():
        for number, (member, failure) in enumerate(ended, start=1):
            if failure is None:
                accuracy = 100 * (read_summary(member.run_dir) or {})["final_accuracy"]
                note(f"{number}/{len(left)}  {member}: accuracy {accuracy:.2f} %, {member.run_dir}")
            else:
                failures.append(failure)
                tell_error(failure)
    return failures
