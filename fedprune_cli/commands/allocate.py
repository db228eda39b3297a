"""One round's allocation without training: `allocate`, and allocators by deadline: `ladder`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from fedprune_cli.commands.options import ConfigDir, Json, Overrides, Plugins, Quiet
from fedprune_cli.terminal import print_json, say, show


def allocate(
    overrides: Overrides = None,
    devices: Annotated[
        Path | None, typer.Option(help="A CSV table of devices, physical columns or the problem's own.")
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="p1 (least mean ratio), p2 (least deadline), minmax (least largest ratio), proportional (largest mean of ln x), "
            "energy (fewest joules) or weighted (least sum of time and joules)."
        ),
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
    config_dir: ConfigDir = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose every device's pruning ratio and bandwidth for one round, without training."""
    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.config.compose import compose_config
    from fedprune_cli.config.words import parse_choice
    from fedprune_cli.report.allocation import allocation_table, answer, frontier_rows, price_sentence, write_allocation
    from fedprune_cli.round.first import allocate_first_round

    allocators = {"p1": "kkt", "p2": "minlatency"} | {of: of for of in ("minmax", "proportional", "energy", "weighted")}
    parse_choice(objective, "objective", allocators)
    chosen = [*(overrides or [])]
    if not any(override.split("=")[0] == "allocator" for override in chosen):
        chosen.append(f"allocator={allocators[objective]}")
    options = {"channel.bandwidth_mhz": bandwidth_mhz, "deadline.seconds": deadline_s, "deadline.fraction": deadline_fraction,
               "pruner.max_ratio": max_ratio, "allocator.mean_ratio": mean_ratio}  # fmt: skip
    chosen += [f"{key}={value}" for key, value in options.items() if value is not None]
    experiment = build_experiment(compose_config(chosen, config_dir))
    first = allocate_first_round(experiment, devices)
    problem, result = first.problem, answer(first, of_several=len(experiment.payload.bits) > 1)
    if out:
        write_allocation(out, result, frontier_rows(problem))
    if as_json:
        print_json(result)
        return
    show(allocation_table(result))
    show(price_sentence(experiment.allocator.name, problem, result["price_per_hz"]))
    if out:
        say(f"written: {out}/allocation.csv, allocation.json, frontier.csv, frontier.svg")


def ladder(
    overrides: Overrides = None,
    allocators: Annotated[
        str, typer.Option(help="Allocators, joined by commas.")
    ] = "kkt,minmax,equal,uniform,alternating",
    fractions: Annotated[
        str, typer.Option(help="Deadlines as fractions of the dense optimum.")
    ] = "0.4,0.5,0.6,0.7,0.8,0.9,1.0",
    config_dir: ConfigDir = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare allocators by deadline on one round: weighted mean and largest pruning ratio."""
    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.config.compose import compose_config
    from fedprune_cli.config.words import parse_names, parse_numbers
    from fedprune_cli.report.allocation import ladder as build_ladder
    from fedprune_cli.report.allocation import ladder_table
    from fedprune_cli.round.first import ask

    wanted = parse_numbers(fractions, "--fractions", lambda fraction: 0 < fraction < math.inf, "above 0")
    chosen = {
        name: build_experiment(compose_config([*(overrides or []), f"allocator={name}"], config_dir))
        for name in parse_names(allocators, "--allocators")
    }
    problem = ask(next(iter(chosen.values()))).problem
    rungs = build_ladder(problem, {name: experiment.allocator for name, experiment in chosen.items()}, wanted)
    if as_json:
        print_json([rung.as_json() for rung in rungs])
        return
    show(ladder_table(rungs))
