"""A model that was taken home is the one that the run tested: on the device's samples it is right exactly as often."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, composed, configured, fedprune, make_setup, run_to_end
from PIL import Image

from fedprune_cli.config.build import build_experiment
from fedprune_cli.errors import CheckpointError, ConfigError, DataError
from fedprune_cli.learn.client import Score
from fedprune_cli.meter import accuracies
from fedprune_cli.round.setup import prepare
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.take_home.description import parse_description
from fedprune_cli.take_home.formats import FORMATS, Model, read_model
from fedprune_cli.take_home.predict import predict
from fedprune_cli.take_home.samples import Asked, read_asked
from fedprune_cli.take_home.take import Finished, Samples, Taken, find_device, open_run, take, take_all

CNN = ("model=cnn", "model.channels=[4,6]", "model.hidden=12", "model.padding=2")
CHANNEL = ("pruner.granularity=channel", "model.hidden=[16,12]")
KINDS = {
    "mask": (),
    "channel": CHANNEL,
    "taylor cnn channel": (*CNN, "pruner=taylor", "pruner.granularity=channel", "rounds=2"),
    "random, few bits": ("pruner=random", "payload.bits=[4]", "deadline.fraction=0.3"),
    "fedavg": ("method=fedavg",),
    "pruned": ("method=pruned",),
    "local": ("method=local",),
    "middle": ("model.hidden=[16,12]", "method.personal_part=fc2", "devices.per_round=2"),
    "bfloat16": ("training.precision=bfloat16", "training.block=1"),
    "resting": ("participation.freeze_below=0.9", "participation.freeze_window=1", "weights=pruning_error", "rounds=6"),
}


def finished(run_dir: Path, *overrides: str) -> Finished:
    """Returns a tiny run to its end, opened for taking models out of it."""
    run_to_end(run_dir, *overrides)
    return open_run(run_dir)


def through(taken: Taken, kind: str, place: Path) -> Model:
    """Returns a model after it was written into a file and read back."""
    (path := place / f"model{FORMATS[kind].suffix}").write_bytes(FORMATS[kind].encode(taken))
    return read_model(path)


def own_samples(run: Finished, device: int) -> Asked:
    """Returns a device's test samples."""
    data, own = run.setup.scenario.dataset, run.setup.scenario.partition.test[device]
    return Asked(data.inputs[own], data.labels[own], tuple(map(str, own)))


ALWAYS = ("channel", "random, few bits")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ALWAYS)) for kind in KINDS]
)
def test_its_accuracy_is_the_last_records_to_the_last_sample(kind: str, tmp_path: Path) -> None:
    lines = run_to_end(tmp_path / "run", *KINDS[kind])
    run = open_run(tmp_path / "run")
    scores = {}
    fresh = [
        take(run, str(device))
        for device in range(run.setup.scenario.num_devices, len(run.setup.scenario.partition.test))
    ]
    for taken in [*take_all(run), *fresh]:
        device = taken.description.device
        assert device is not None
        said = predict(through(taken, "safetensors", tmp_path), own_samples(run, device))
        scores[device] = Score(device, said.correct, said.total)
        assert (said.correct, said.total) == (taken.description.correct, taken.description.total)
    last, count = lines[-1], run.setup.scenario.num_devices
    own = {device: score for device, score in scores.items() if device < count}
    figures = accuracies(own, run.setup.scenario.partition.train.sizes)
    assert {key: last[key] for key in figures} == figures
    rows = zip(last["devices"]["id"], last["devices"].get("accuracy") or [], strict=False)
    assert all(scores[device].correct / scores[device].total == accuracy for device, accuracy in rows)
    assert last["fresh_accuracy"] == np.mean([scores[d].correct / scores[d].total for d in scores if d >= count])


def test_the_law_would_see_the_masks_of_another_round(tmp_path: Path) -> None:
    """What the next round would keep of u is not what the last one tested: the masks have to be remembered."""
    run = finished(tmp_path / "run", "deadline.fraction=0.15")
    nothing = replace(run, masks=replace(run.masks, kept=np.zeros_like(run.masks.kept)))
    assert [one.description.correct for one in take_all(run)] != [one.description.correct for one in take_all(nothing)]


@pytest.mark.parametrize(
    "overrides", [(), CHANNEL, pytest.param((*CNN, "pruner.granularity=channel"), marks=pytest.mark.slow)]
)
def test_every_format_computes_the_same(overrides: tuple[str, ...], tmp_path: Path) -> None:
    run = finished(tmp_path / "run", *overrides)
    taken, asked = take(run, "3"), own_samples(run, 3)
    plain = through(taken, "safetensors", tmp_path)
    program = through(taken, "torch.export", tmp_path)
    assert plain.description == program.description == taken.description
    assert np.array_equal(plain.logits(asked.inputs), taken.network(torch.from_numpy(asked.inputs)).numpy())
    for size in (1, 2, 7, len(asked.inputs)):
        np.testing.assert_allclose(program.logits(asked.inputs[:size]), plain.logits(asked.inputs[:size]), atol=1e-5)


ON_ONNX = {
    "mlp": ("model.hidden=[16]",),
    "mlp channel": CHANNEL,
    "cnn": CNN,
    "cnn channel": (*CNN, "pruner.granularity=channel"),
    "resnet18": ("model=resnet18", "rounds=1", "devices.count=2", "data.limit=100"),
    "mobilenet": ("model=mobilenet", "model.width=0.25", "rounds=1", "devices.count=2", "data.limit=100"),
    "mobilenet channel": (
        "model=mobilenet",
        "model.width=0.25",
        "rounds=1",
        "devices.count=2",
        "data.limit=100",
        CHANNEL[0],
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "mlp channel")) for name in ON_ONNX]
)
def test_onnx_runtime_agrees_with_pytorch(name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    tiny = [one for one in TINY if "hidden" not in one or "net" not in name]
    config = configured(*tiny, *ON_ONNX[name])
    setup = prepare(build_experiment(config))
    life.create(setup, config, tmp_path / "run")
    for _ in life.run(setup, tmp_path / "run"):
        pass
    run = open_run(tmp_path / "run")
    taken, asked = take(run, "0"), own_samples(run, 0)
    model = through(taken, "onnx", tmp_path)
    assert model.description == taken.description
    plain = through(taken, "safetensors", tmp_path)
    exact = copy.deepcopy(taken.network).double()
    for size in (1, 2, len(asked.inputs)):
        inputs = asked.inputs[:size]
        there, here = model.logits(inputs), plain.logits(inputs)
        assert np.array_equal(there.argmax(1), here.argmax(1))
        # over a few values that are nearly alike PyTorch's GroupNorm loses digits; ONNX Runtime's is near the one of float64
        np.testing.assert_allclose(there, here, atol=5e-4 if "net" in name else 1e-5)
        if size > 1:
            x = (torch.from_numpy(inputs).double() / exact.scale - exact.mean) / exact.std
            np.testing.assert_allclose(there, exact.model(x).numpy(), atol=1e-5)
    data = (tmp_path / "model.onnx").read_bytes()
    assert data == FORMATS["onnx"].encode(taken)
    assert str(Path(torch.__file__).parent).encode() not in data
    changed(tmp_path / "model.onnx", random.Random(1), 20)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["weight", "channel"])
@pytest.mark.parametrize(
    "model", [("model=cnn1d", "model.channels=[4,6]", "model.hidden=8"), ("model=gru", "model.hidden=[6,5]")]
)
def test_sequences_are_taken_home_in_every_format(model: tuple[str, ...], granularity: str, tmp_path: Path) -> None:
    series = np.random.default_rng(0).normal(size=(80, 2, 16)).astype(np.float32)
    np.savez("x.npz", inputs=series, labels=np.arange(80) % 2)
    tiny = [one for one in TINY if "hidden" not in one]
    data = ("data=arrays", "data.file=x.npz", "data.layout=series")
    config = configured(*tiny, *data, *model, f"pruner.granularity={granularity}")
    setup = prepare(build_experiment(config))
    life.create(setup, config, tmp_path / "run")
    assert len(list(life.run(setup, tmp_path / "run"))) == 3
    run = open_run(tmp_path / "run")
    taken, asked = take(run, "1"), own_samples(run, 1)
    plain = through(taken, "safetensors", tmp_path)
    assert predict(plain, asked).correct == taken.description.correct
    kinds = ["torch.export", *(["onnx"] if importlib.util.find_spec("onnxruntime") else [])]
    for kind in kinds:
        other = through(taken, kind, tmp_path)
        for size in (1, len(asked.inputs)):
            np.testing.assert_allclose(other.logits(asked.inputs[:size]), plain.logits(asked.inputs[:size]), atol=1e-5)


def test_a_slice_really_is_smaller_and_a_mask_is_not(tmp_path: Path) -> None:
    sliced = finished(tmp_path / "sliced", *CHANNEL, "devices=sampled", "deadline.fraction=0.3")
    for taken in take_all(sliced):
        sizes, own = taken.description.sizes, sliced.masks.kept_units(taken.description.device or 0)
        shapes = sliced.setup.blueprint.layout.masks(own)[2]
        assert sizes.shared + sizes.personal == sizes.kept == sum(int(np.prod(shape)) for shape in shapes) < sizes.dense
        layers = [layer for layer in taken.network.modules() if isinstance(layer, torch.nn.Linear)]
        assert sizes.flops == sum(2 * layer.in_features * layer.out_features for layer in layers)
    masked = finished(tmp_path / "masked", "devices=sampled", "deadline.fraction=0.3")
    for taken in take_all(masked):
        sizes, size = taken.description.sizes, len(masked.state.shared)
        ratio = masked.state.slots["prune_ratio"][taken.description.device]
        assert sizes.kept == np.rint((1 - ratio) * size) + sizes.personal < sizes.dense == sizes.shared + sizes.personal


def test_a_newcomer_trains_its_own_part_on_samples_and_needs_none_without_one(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "evaluation.fresh_steps=30")
    data, own = run.setup.scenario.dataset, run.setup.scenario.partition
    device = run.setup.scenario.num_devices
    samples = Samples(data.inputs[own.train[device]], data.labels[own.train[device]])
    taken = take(run, "shared", samples)
    asked = own_samples(run, device)
    said = predict(through(taken, "safetensors", tmp_path), asked)
    untrained = predict(Model(taken.description, lambda x: np.zeros((len(x), 10))), asked)
    assert said.correct > untrained.correct
    assert taken.description.device is None
    with pytest.raises(ConfigError, match="--data FILE"):
        take(run, "shared")
    with pytest.raises(ConfigError, match="only a newcomer"):
        take(run, "0", samples)
    average = finished(tmp_path / "average", "method=fedavg")
    shared, fresh = take(average, "shared"), take(average, str(device))
    assert all(torch.equal(a, b) for a, b in zip(shared.network.parameters(), fresh.network.parameters(), strict=True))
    with pytest.raises(ConfigError, match="nothing to train"):
        take(average, "shared", samples)
    with pytest.raises(ConfigError, match="nothing is shared"):
        take(finished(tmp_path / "local", "method=local"), "shared", samples)


def test_an_unfinished_run_gives_the_models_of_its_last_round(tmp_path: Path) -> None:
    setup = make_setup("rounds=5")
    life.create(setup, composed("rounds=5"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="no round is finished"):
        open_run(tmp_path / "run")
    rounds = life.run(setup, tmp_path / "run")
    next(rounds)
    record = next(rounds)
    rounds.close()
    run = open_run(tmp_path / "run")
    assert record.devices.accuracy is not None
    taken = take(run, "1")
    assert (taken.description.run.round, taken.description.run.rounds) == (2, 5)
    at = list(record.devices.id).index(1)
    assert taken.description.correct == round((record.devices.accuracy[at] or 0) * (taken.description.total or 0))
    (masks,) = (tmp_path / "run").glob("masks-*")
    other = masks.read_bytes()
    masks.unlink()
    with pytest.raises(CheckpointError, match="an older fedprune"):
        open_run(tmp_path / "run")
    masks.write_bytes(other[:-1] + bytes([other[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"masks-2\.safetensors: damaged"):
        open_run(tmp_path / "run")
    masks.write_bytes(other)
    folder.load(tmp_path / "run", setup.experiment.config_hash)
    assert [path.name for path in (tmp_path / "run").glob("masks-*")] == ["masks-2.safetensors"]


def test_devices_are_found_by_name_and_by_number(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    scenario = run.setup.scenario
    fleet = replace(scenario.fleet, names=("ada", "bob", "3", "dan"))
    named = replace(run, setup=replace(run.setup, scenario=replace(scenario, fleet=fleet)))
    assert [find_device(named, asked) for asked in ("ada", "3", "1", "4")] == [0, 2, 1, 4]
    with pytest.raises(ConfigError, match=r"Did you mean 'bob'\?.*0\.\.4 \(4 never trained\), or a name such as 'ada'"):
        find_device(named, "bib")
    for bad in ("5", "-1", "1.0", "", "²", "9" * 30):
        with pytest.raises(ConfigError, match="there is no such device"):
            find_device(run, bad)


# --- bad files ------------------------------------------------------------------------------------------------------


def changed(path: Path, rng: random.Random, times: int) -> None:
    """Turns single bits and cuts a model's file: each time it is refused in one line, or nothing that it says has changed."""
    good, model = path.read_bytes(), read_model(path)
    probe = np.zeros((2, *model.description.input.shape), dtype=model.description.input.dtype)
    for number in range(times):
        at = rng.randrange(len(good))
        bad = good[:at] if number % 4 == 0 else good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
        path.write_bytes(bad)
        try:
            found = read_model(path)
        except DataError:  # whose text is of one line, as of all such errors
            continue
        assert found.description == model.description
        assert np.array_equal(found.logits(probe), model.logits(probe))
    path.write_bytes(good)


def test_a_damaged_model_is_refused_or_says_the_same(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", *CHANNEL)
    taken = take(run, "2")
    for kind, times in (("safetensors", 60), ("torch.export", 25)):
        through(taken, kind, tmp_path)
        changed(tmp_path / f"model{FORMATS[kind].suffix}", random.Random(0), times)


def test_a_program_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    through(take(run, "0"), "torch.export", tmp_path)
    data = (tmp_path / "model.pt2").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for one in old.infolist():
            new.writestr(one.filename, old.read(one))
        new.writestr("archive/data/constants/opaque_obj_0", b"cos\nsystem\n")
    with pytest.raises(DataError, match="pickled objects"):
        read_model(tmp_path / "bad.pt2")


def test_what_is_no_model_of_ours_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    description = take(run, "0").description
    text = json.loads(description.as_json())
    assert parse_description(json.dumps(text), "x") == description
    wrong: list[tuple[Any, str]] = [
        ({**text, "version": 2}, "of version 2, this fedprune reads version 1"),
        ({key: text[key] for key in text if key != "version"}, "has no version"),
        ({**text, "labels": []}, "cannot be"), ({**text, "more": 1}, "cannot be"), ([], "has no version"),
        ({**text, "input": {**text["input"], "shape": [1, 8]}}, "cannot be"),
        ({**text, "input": {**text["input"], "std": [0.0]}}, "cannot be"),
        ({**text, "run": {}}, "cannot be"),
    ]  # fmt: skip
    for value, message in wrong:
        with pytest.raises(DataError, match=message):
            parse_description(json.dumps(value), "x")
    for name, content in (
        ("a", b""),
        ("b", b"PK\3\4"),
        ("c", b"\x08\x07"),
        ("d", b"\2\0\0\0\0\0\0\0{}"),
        ("e", b"hello"),
    ):
        (tmp_path / name).write_bytes(content)
        if name != "c":
            with pytest.raises(DataError):
                read_model(tmp_path / name)
    with pytest.raises(DataError, match="no model that `fedprune export` wrote"):
        read_model(tmp_path / "run" / "state.safetensors")


def test_what_is_asked_of_a_model_must_be_what_it_takes(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    of = take(run, "0").description
    images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8) % 17

    def asked(**arrays: Any) -> Asked:
        np.savez(tmp_path / "x.npz", **arrays)
        return read_asked(tmp_path / "x.npz", of.input, of.labels)

    good = asked(inputs=images, labels=np.array(["1", "0", "9"]))
    assert np.array_equal(good.inputs[:, 0], images)
    assert good.labels.tolist() == [1, 0, 9]
    assert np.array_equal(asked(inputs=images.astype(float)[:, None]).inputs, good.inputs)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"inputs": images[:, :7]}, r"shape \[3, 7, 8\], the model takes \[samples, 1, 8, 8\]"),
        ({"inputs": images / 16}, "raw and not normalised"), ({"inputs": images - 1.0}, "raw and not normalised"),
        ({"inputs": np.full((2, 8, 8), np.nan)}, "sample 0 holds a value that is not finite"),
        ({"inputs": images.astype(str)}, "must be numbers"), ({"x": images}, "no array 'inputs'"),
        ({"inputs": np.array([None] * 3)}, "no arrays of numbers"),
        ({"inputs": images, "labels": [1, 2]}, r"shape \[2\], must be \[3\]"), ({"inputs": images, "labels": [1, 2, 10]}, r"0\.\.9"),
        ({"inputs": images, "labels": np.array(["1", "2", "cat"])}, "unknown label 'cat'"), ({"inputs": images[:0]}, "no samples"),
        ({"inputs": np.float64(3)}, "shape"),
    ]  # fmt: skip
    for arrays, message in wrong:
        with pytest.raises(DataError, match=message):
            asked(**arrays)
    for name, content in (("y.npz", b"PK"), ("y.png", b"no"), ("y.txt", b""), ("y.csv", b"a,b\n1,2\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_asked(tmp_path / name, of.input, of.labels)
    pictures = tmp_path / "pictures"
    for label in ("3", "unknown"):
        (pictures / label).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 255, np.uint8)).save(pictures / label / "a.png")
    found = read_asked(pictures, of.input, of.labels)
    assert found.labels.tolist() == [3, -1]
    assert (found.inputs == 16).all()  # this dataset has 17 levels of grey
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(pictures / "b.png")
    with pytest.raises(DataError, match="8x9 pixels, the model takes 8x8"):
        read_asked(pictures, of.input, of.labels)


def test_the_commands_say_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    run_to_end(Path("run"))
    first = fedprune("export", "run", "--device", "1", "--json")
    assert first.returncode == 0, first.stderr
    (one,) = json.loads(first.stdout)
    assert (one["out"], one["device"]) == ("device-1.safetensors", 1)
    np.savez("x.npz", inputs=np.zeros((2, 8, 8), np.uint8), labels=[3, 4])
    answer = json.loads(fedprune("predict", "device-1.safetensors", "x.npz", "--json").stdout)
    assert answer["total"] == 2
    assert answer["accuracy"] == answer["correct"] / 2
    for code, *arguments in (
        (8, "export", "run", "--device", "1"),
        (2, "export", "run", "--device", "8", "--out", "other"),
        (6, "predict", "x.npz", "x.npz"),
    ):
        done = fedprune(*map(str, arguments))
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    shown = fedprune("rounds", "run").stdout.splitlines()
    assert len(shown) == 4
    assert shown[0].startswith("round,simulated_s,")
