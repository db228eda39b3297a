"""What an update gives away, measured: `leak`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedprune_cli.commands.options import Json, Plugins, Quiet
from fedprune_cli.terminal import counting, note, print_json, say, show, status

MOST_SAMPLES, MOST_STEPS = 256, 100


def leak(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    device: Annotated[str, typer.Option(help="Whose update: a device's number or name.")] = "0",
    samples: Annotated[str, typer.Option(help="How many samples an update is of, joined by commas.")] = "1,4,8",
    steps: Annotated[str, typer.Option(help="How many local steps are taken on them, joined by commas.")] = "1",
    trials: Annotated[int, typer.Option(help="Over how many draws a figure is a mean.", min=1, max=1000)] = 3,
    seed: Annotated[int, typer.Option(help="Decides every draw of the attacks.", min=0, max=2**63 - 1)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for leakage.html and leakage.csv; default: the run's report/.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack a device's next update as the server sees it: pruned, rounded, summed or with noise, beside the guess of the mean image.

    The device's own round, with all of its steps and batches, is always among what is attacked.
    """
    from fedprune_cli.config.words import parse_numbers

    def whole(text: str, option: str, most: int) -> tuple[int, ...]:
        allowed = f"that is whole, in 1..{most}"
        return tuple(
            map(int, parse_numbers(text, option, lambda value: 1 <= value <= most and value % 1 == 0, allowed))
        )

    sizes, lengths = whole(samples, "--samples", MOST_SAMPLES), whole(steps, "--steps", MOST_STEPS)

    import torch

    from fedprune_cli.audit.leak import Cell, attack_all, cases_of, membership
    from fedprune_cli.audit.leak_page import Leakage, sentence, tables, write
    from fedprune_cli.audit.leak_page import as_json as facts
    from fedprune_cli.audit.leak_views import Scene, find_trained, views_of
    from fedprune_cli.store import folder
    from fedprune_cli.take_home.take import open_run

    torch.set_num_threads(1)  # two threads sum in another order and give other bits
    with status("loading data and building the world"):
        run = open_run(run_dir)
    if run.state.round < run.setup.experiment.rounds:
        note(f"{run_dir} is not finished: attacked is the round after round {run.state.round}")
    rounded = [record.bits for record in folder.read_records(run_dir) if record.bits]
    bits = rounded[-1] if rounded else run.setup.experiment.payload.bits[0]
    scene = Scene(run.setup, run.state, bits, find_trained(run.setup, device), seed)
    views, cases, cells = views_of(scene), cases_of(sizes, lengths), list[Cell]()
    with counting(f"of {len(views) * len(cases)} kinds of update attacked", lambda: len(cells)):
        cells += attack_all(scene, views, cases, trials)
        found = Leakage(scene, trials, tuple(cells), membership(scene))
    page = write(found, out or run_dir / "report")
    if as_json:
        print_json(facts(found, page))
        return
    for table in tables(found):
        show(table)
    say(sentence(found))
    say(f"report: {page}")
