"""Rows, arrays and images of one's own, asked of a model in the form in which the run read them: the record's accuracy again."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import own
import pytest
from omegaconf import OmegaConf

from fedprune_cli.config.build import build_experiment
from fedprune_cli.errors import DataError
from fedprune_cli.round.setup import prepare
from fedprune_cli.runs import life
from fedprune_cli.take_home.formats import FORMATS, Model, read_model
from fedprune_cli.take_home.predict import predict
from fedprune_cli.take_home.samples import read_asked, read_newcomers
from fedprune_cli.take_home.take import Finished, open_run, take, take_all


def finished(kind: str, **values: object) -> Finished:
    """Returns a tiny run on a dataset of one's own whose devices are the data's, opened."""
    config = own.config_of(kind, "natural", **values)
    for key, value in (("devices.count", 4), ("devices.fresh", 0), ("rounds", 2)):
        OmegaConf.update(config, key, value)
    setup = prepare(build_experiment(config))
    life.create(setup, config, Path("run"))
    assert len(list(life.run(setup, Path("run")))) == 2
    return open_run(Path("run"))


def models(run: Finished) -> list[Model]:
    """Returns the devices' models, each after it was a file."""
    found = []
    for taken in take_all(run):
        Path("model").write_bytes(FORMATS["safetensors"].encode(taken))
        found.append(read_model(Path("model")))
    return found


def test_rows_of_a_table_give_the_records_accuracy() -> None:
    sheet = own.table(random.Random(3))
    for row in (2, 9, 30, 55):  # missing in training and in test rows
        sheet.put(row, "vibration", "")
    sheet.put(5, "mode", "")
    sheet.write()
    run = finished("table", device="machine", split="part", drop=["batch"], missing="indicator")
    assert run.names == tuple(sorted(own.MACHINES))
    for model in models(run):
        of = model.description
        rows = run.setup.scenario.partition.test[of.device or 0]
        assert {sheet.column("machine")[row] for row in rows} == {of.called}
        own.Sheet(sheet.header, [sheet.rows[row] for row in rows]).write("own.csv")
        said = predict(model, read_asked(Path("own.csv"), of.input, of.labels))
        assert (said.correct, said.total) == (of.correct, of.total)
        unlabelled = [at for at, name in enumerate(sheet.header) if name != "state"]
        own.Sheet(
            [sheet.header[at] for at in unlabelled], [[sheet.rows[row][at] for at in unlabelled] for row in rows]
        ).write("b.csv")
        blind = predict(model, read_asked(Path("b.csv"), of.input, of.labels))
        assert (blind.predicted, blind.total) == (said.predicted, 0)
    sheet.write("all.csv")
    assert take(run, "m7").description.called == "m7"
    assert take(run, "shared", read_newcomers(Path("all.csv"), run.setup)).description.kind == "shared"
    sheet.put(4, "mode", "walking")
    sheet.write("strange.csv")
    with pytest.raises(DataError, match=r"strange\.csv.*line 6.*mode='walking' is none of the levels"):
        read_asked(Path("strange.csv"), of.input, of.labels)
    own.Sheet(sheet.header[:3], [row[:3] for row in sheet.rows]).write("narrow.csv")
    with pytest.raises(DataError, match="mode"):
        read_asked(Path("narrow.csv"), of.input, of.labels)
    broken = replace(of.input, encoding={"kind": "table"})
    with pytest.raises(DataError, match="encoding of rows is damaged"):
        read_asked(Path("all.csv"), broken, of.labels)


def test_arrays_and_series_give_it_too() -> None:
    arrays = own.arrays(np.random.default_rng(1))
    arrays["labels"] = arrays["labels"] + 3  # names, and not places
    np.savez("x.npz", **arrays)
    run = finished("arrays")
    for model in models(run):
        of = model.description
        rows = run.setup.scenario.partition.test[of.device or 0]
        np.savez("own.npz", inputs=arrays["inputs"][rows], labels=arrays["labels"][rows])
        said = predict(model, read_asked(Path("own.npz"), of.input, of.labels))
        assert (said.correct, said.total) == (of.correct, of.total)
    np.savez("bad.npz", inputs=arrays["inputs"], labels=arrays["labels"] - 3)
    with pytest.raises(DataError, match="unknown label '0'"):
        read_asked(Path("bad.npz"), of.input, of.labels)


def test_series_are_cut_into_windows() -> None:
    own.series(random.Random(0)).write()
    run = finished("windows", device="who", series="rec", time="t", length=16, stride=8)
    model = models(run)[0]
    of = model.description
    asked = read_asked(Path("x.csv"), of.input, of.labels)
    assert asked.inputs.shape[1:] == of.input.shape
    assert {*asked.labels.tolist()} == {0, 1}
    assert predict(model, asked).total == len(asked.inputs) >= len(run.setup.scenario.dataset.labels)


def test_images_in_class_folders_give_it_too() -> None:
    own.folder(np.random.default_rng(2), Path("x"), devices=True, split=True)
    run = finished("folder", devices=True)
    model = models(run)[1]
    of = model.description
    for at in range(4):
        if f"d{at}" == of.called:
            said = predict(model, read_asked(Path(f"x/test/d{at}"), of.input, of.labels))
            assert (said.correct, said.total) == (of.correct, of.total)
