"""A device's model out of a run, `export`; what it predicts, `predict`; and a run's figures as a table, `rounds`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedprune_cli.commands.options import Json, Plugins, Quiet
from fedprune_cli.errors import ConfigError, OutputError
from fedprune_cli.terminal import note, print_json, say, show, status

if TYPE_CHECKING:
    from fedprune_cli.take_home.formats import Format
    from fedprune_cli.take_home.take import Finished, Taken

Written = tuple[dict[str, object], str]  # a model's facts, and the same in a line


def export(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    device: Annotated[
        str | None, typer.Option(help="Whose model: a device's number or name, or shared for a newcomer's.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="The models of all devices that train, into a folder.")] = False,
    form: Annotated[str, typer.Option("--format", help="safetensors, torch.export or onnx.")] = "safetensors",
    out: Annotated[
        Path | None, typer.Option(help="The file, or with --all the folder; default: device-N.SUFFIX, or models, here.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --device shared: an .npz of labelled samples for the newcomer's own part.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a device's own model into a file: its kept part of u and its v, labels, normalisation, and which run it is from.

    Its accuracy on the device's test samples is that of the run's last test. Of whole channels the network really is smaller.
    """
    from fedprune_cli.config.words import parse_choice
    from fedprune_cli.take_home.formats import FORMATS, need_onnx
    from fedprune_cli.take_home.take import open_run

    parse_choice(form, "--format", FORMATS)
    if every == (device is not None):
        raise ConfigError("say whose model: --device N, --device shared or --all" + ", one of them" * every)
    if every and data is not None:
        raise ConfigError("--data: only a newcomer trains on it, with --device shared")
    if form == "onnx":
        need_onnx()
    if out is not None:
        _not_there(out)
    with status("loading data and building the world"):
        run = open_run(run_dir)
    if run.state.round < run.setup.experiment.rounds:
        note(f"{run_dir} is not finished: the model is of round {run.state.round} of {run.setup.experiment.rounds}")
    if run.setup.experiment.training.precision != "float32" and form != "safetensors":
        note(
            f"the run computed in {run.setup.experiment.training.precision}, the file computes in float32: a prediction may differ"
        )
    kind, models = FORMATS[form], out or Path("models")
    written = _export_all(run, models, kind) if every else _export_one(run, device or "", out, kind, data)
    if as_json:
        print_json([facts for facts, _ in written])
        return
    for _, said in written:
        say(said)


def _not_there(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists: choose another with --out, or remove it")


def _export_one(run: Finished, asked: str, out: Path | None, form: Format, data: Path | None) -> list[Written]:
    from fedprune_cli.take_home.samples import read_newcomers
    from fedprune_cli.take_home.take import take

    taken = take(run, asked, None if data is None else read_newcomers(data, run.setup))
    number = taken.description.device
    path = out or Path(f"{'shared' if number is None else f'device-{number}'}{form.suffix}")
    _not_there(path)
    return [_write(taken, path, form)]


def _export_all(run: Finished, out: Path, form: Format) -> list[Written]:
    from fedprune_cli.store.folder import writing
    from fedprune_cli.take_home.take import take_all

    _not_there(out)
    with writing(out):
        out.mkdir(parents=True)
    with status("writing the models"):
        return [_write(taken, out / f"device-{taken.description.device}{form.suffix}", form) for taken in take_all(run)]


def _write(taken: Taken, path: Path, form: Format) -> Written:
    """Writes a model; returns what is to be said of it, for programs and in words."""
    from dataclasses import asdict

    from fedprune_cli.store.folder import write_whole

    of, data = taken.description, form.encode(taken)
    write_whole(path, data)
    tested = "" if of.correct is None or not of.total else f", {of.correct} of {of.total} test samples right"
    smaller = "" if of.sizes.kept == of.sizes.dense else f" ({of.sizes.kept} of {of.sizes.dense} kept)"
    said = (
        f"{path}: {'a newcomer' if of.device is None else f'device {of.called}'}, round {of.run.round}{tested}, "
        f"{of.sizes.shared + of.sizes.personal} parameters{smaller}, {of.sizes.flops} FLOPs a sample, {len(data)} bytes"
    )
    facts: dict[str, object] = {
        "out": str(path), "device": of.device, "called": of.called, "kind": of.kind, "round": of.run.round,
        "rounds": of.run.rounds, "correct": of.correct, "total": of.total, "sizes": asdict(of.sizes), "bytes": len(data),
    }  # fmt: skip
    return facts, said


def predict(
    model: Annotated[Path, typer.Argument(help="A file that export wrote, of any format.")],
    file: Annotated[
        Path,
        typer.Argument(
            help="An .npz with inputs and perhaps labels, an image, a folder of images, or a .csv or .parquet."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="A CSV file for the predictions.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run an exported model on samples: what it predicts for each, and its accuracy where labels are given."""
    from fedprune_cli.store.folder import write_whole
    from fedprune_cli.take_home.formats import read_model
    from fedprune_cli.take_home.predict import predict as ask
    from fedprune_cli.take_home.samples import read_asked

    if out is not None:
        _not_there(out)
    with status("reading the model"):
        read = read_model(model)
    predictions = ask(read, read_asked(file, read.description.input, read.description.labels))
    if out is not None:
        write_whole(out, predictions.csv().encode())
    if as_json:
        print_json(predictions.as_json())
        return
    if out is None:
        show(predictions.table())
    say(predictions.sentence())
    if out is not None:
        say(f"written: {out}")


def rounds(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    form: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
    devices: Annotated[
        bool, typer.Option("--devices", help="A row a device and round instead of a row a round.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The file; of CSV default: stdout.")] = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Print a run's rounds as CSV, whole rows, or write them as Parquet: for shells, spreadsheets and notebooks."""
    from fedprune_cli.config.words import parse_choice
    from fedprune_cli.report.page import csv_text
    from fedprune_cli.report.read import read_run
    from fedprune_cli.report.tables import as_parquet, device_table, round_table
    from fedprune_cli.store.folder import write_whole

    parse_choice(form, "--format", ("csv", "parquet"))
    if form == "parquet" and out is None:
        raise ConfigError("--format parquet: needs --out FILE, a terminal cannot show it")
    if out is not None:
        _not_there(out)
    run = read_run(run_dir)
    table = device_table(run) if devices else round_table(run)
    if out is None:
        say(csv_text(*table).rstrip("\n"))
        return
    write_whole(out, as_parquet(*table) if form == "parquet" else csv_text(*table).encode())
    say(f"written: {out}")
