"""A run is known by the content of what it reads: edit one byte of any of it, and nothing stale is used."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import own
import pytest
from conftest import TINY, composed, configured, fedprune, read_lines

from fedprune_cli.audit.listing import find_runs
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.config.inputs import MAX_KEPT, _stamp
from fedprune_cli.errors import CheckpointError, DataError
from fedprune_cli.report.read import read_run
from fedprune_cli.runs import life
from fedprune_cli.store import folder

FLEET = "cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db\n" + "1,1,23,-100\n" * 4
TRACE = "round,device,gain_db\n" + "".join(f"{r},{d},-{100 + d + r}\n" for r in range(3) for d in range(4))
SMALL = tuple(override for override in TINY if not override.startswith("devices."))


def write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes((0, 0, 8, values.ndim)) + b"".join(int(size).to_bytes(4, "big") for size in values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + values.astype(np.uint8).tobytes())


def write_mnist(root: Path) -> None:
    """Writes a small dataset in MNIST's files, one of them packed."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 80), ("t10k", 40)):
        write_idx(root / f"{part}-images-idx3-ubyte", rng.integers(0, 255, (count, 8, 8)))
        write_idx(root / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    plain = root / "t10k-images-idx3-ubyte"
    with gzip.open(plain.with_name(plain.name + ".gz"), "wb") as packed:
        packed.write(plain.read_bytes())
    plain.unlink()


def edit_table(path: Path) -> None:
    """Changes one byte and keeps the size."""
    path.write_text(path.read_text().replace("-100", "-101", 1))


def edit_pixel(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit_packed_pixel(path: Path) -> None:
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(data)))


@dataclass(frozen=True)
class Source:
    """A file that a run reads, the overrides that name it, and how one byte of it is edited."""

    file: str
    overrides: tuple[str, ...]
    edit: Callable[[Path], None]


FLEET_SOURCE = Source("fleet.csv", ("devices=table", "devices.file=fleet.csv"), edit_table)
TRACE_SOURCE = Source(
    "trace.csv", ("devices.count=3", "devices.fresh=1", "channel=trace", "channel.file=trace.csv"), edit_table
)
MNIST = ("data=mnist", "model=mlp", "data.root=data", "devices.count=3", "devices.fresh=1", "partition=iid")
OWN = "size,weight,kind,kept\n" + "".join(
    f"{at % 7},{at % 5 - 100},{'ab'[at % 2]},{'yes' if at % 3 else 'no'}\n" for at in range(60)
)
OWN_SOURCE = Source(
    "own.csv",
    ("data=table", "data.file=own.csv", "data.label=kept", "devices.count=3", "devices.fresh=1", "partition=iid"),
    edit_table,
)
SOURCES = {
    "own": OWN_SOURCE,
    "fleet": FLEET_SOURCE,
    "trace": TRACE_SOURCE,
    "images": Source("data/train-images-idx3-ubyte", MNIST, edit_pixel),
    "labels": Source("data/t10k-labels-idx1-ubyte", MNIST, edit_pixel),
    "packed": Source("data/t10k-images-idx3-ubyte.gz", MNIST, edit_packed_pixel),
}


OF_A_KIND = ("labels", "packed")  # read and looked at as `images` are


@pytest.fixture(
    params=[pytest.param(one, marks=[pytest.mark.slow] * (one in OF_A_KIND)) for one in SOURCES], name="source"
)
def _source(request: pytest.FixtureRequest) -> Source:
    Path("fleet.csv").write_text(FLEET)
    Path("trace.csv").write_text(TRACE)
    Path("own.csv").write_text(OWN)
    write_mnist(Path("data"))
    return SOURCES[request.param]


def asked(source: Source) -> Experiment:
    """Returns the experiment that a command line asks for now."""
    return build_experiment(configured(*SMALL, *source.overrides))


def run(source: Source) -> Path:
    """Takes the run that is asked for to its end, unless it is there; returns its folder."""
    setup = life.begin_or_reopen(configured(*SMALL, *source.overrides))
    for _ in life.run(setup, setup.experiment.run_dir):
        pass
    return setup.experiment.run_dir


def test_an_edited_byte_is_another_run(source: Source) -> None:
    before = run(source)
    assert life.is_done(asked(source))
    source.edit(Path(source.file))
    assert not life.is_done(asked(source))
    after = run(source)
    assert after != before
    assert {Path(found.path) for found in find_runs(Path("outputs"))} == {before, after}
    assert read_lines(before) != read_lines(after) or "idx" in source.file  # a pixel need not show in any figure


def test_an_edited_byte_is_refused_with_the_file_and_both_hashes(source: Source) -> None:
    run_dir = run(source)
    source.edit(Path(source.file))
    tries: dict[str, Callable[[], object]] = {
        "resume": lambda: life.reopen(run_dir),
        "branch": lambda: life.branch(run_dir, ["rounds=9"]),
        "report": lambda: read_run(run_dir),
    }
    for name, attempt in tries.items():
        with pytest.raises(
            CheckpointError, match=r"edited since the run was made: SHA-256 \w{64} now, \w{64} then"
        ) as seen:
            attempt()
        assert Path(source.file).name in str(seen.value) or str(Path(source.file).parent) in str(seen.value), name


def test_the_same_bytes_elsewhere_are_the_same_run(source: Source) -> None:
    identity = asked(source).config_hash
    Path("away").mkdir()
    for name in ("fleet.csv", "trace.csv", "own.csv", "data"):
        shutil.move(name, Path("away") / name)
    moved = [override.replace("file=", "file=away/").replace("root=", "root=away/") for override in source.overrides]
    assert build_experiment(configured(*SMALL, *moved)).config_hash == identity


@pytest.mark.parametrize(
    "source",
    [FLEET_SOURCE, TRACE_SOURCE, pytest.param(OWN_SOURCE, marks=pytest.mark.slow)],
    ids=["fleet", "trace", "own"],
)
def test_a_run_goes_on_from_anywhere_when_its_table_is_gone(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("fleet.csv").write_text(FLEET)
    Path("trace.csv").write_text(TRACE)
    Path("own.csv").write_text(OWN)
    whole = run(source)
    lines = read_lines(whole)
    setup = life.begin_or_reopen(configured(*SMALL, *source.overrides, "out=half"))
    next(life.run(setup, Path("half")))
    Path(source.file).unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    half = tmp_path / "half"
    reopened = life.reopen(half)
    assert len(list(life.run(reopened, half))) == 2
    assert read_lines(half) == lines
    assert not verify_run(life.reopen(half), half, 0).failures
    shutil.move(half, tmp_path / "moved")
    assert not verify_run(life.reopen(tmp_path / "moved"), tmp_path / "moved", 0).failures
    further = life.branch(tmp_path / "moved", ["rounds=4", f"out={tmp_path / 'branch'}"])
    assert len(list(life.run(further, tmp_path / "branch"))) == 1


def test_a_copy_that_was_changed_is_not_used() -> None:
    Path("fleet.csv").write_text(FLEET)
    run_dir = run(FLEET_SOURCE)
    Path("fleet.csv").unlink()
    edit_table(run_dir / folder.INPUTS / "devices.file.csv")
    with pytest.raises(CheckpointError, match=r"devices\.file\.csv: damaged"):
        life.reopen(run_dir)


def test_a_table_too_large_to_keep_is_named_when_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedprune_cli.config.inputs.MAX_KEPT", 10)
    assert len(FLEET) < MAX_KEPT
    Path("fleet.csv").write_text(FLEET)
    run_dir = run(FLEET_SOURCE)
    assert not (run_dir / folder.INPUTS).exists()
    Path("fleet.csv").unlink()
    with pytest.raises(CheckpointError, match=r"fleet\.csv: No such file or directory; it was too large"):
        life.reopen(run_dir)


def test_a_summary_that_the_run_did_not_write_does_not_make_it_finished() -> None:
    config = [*TINY, "out=run"]
    setup = life.begin_or_reopen(compose_config(config))
    next(life.run(setup, Path("run")))
    Path("run/summary.json").write_text('{"final_accuracy": 1.0}')
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        life.is_done(setup.experiment)
    Path("run/summary.json").unlink()
    assert not life.is_done(setup.experiment)
    for _ in life.run(setup, Path("run")):
        pass
    assert life.is_done(setup.experiment)


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "--seeds", "0", "--jobs", "1"],
        pytest.param(["train", "-m", "seed=0,1"], marks=pytest.mark.slow),
    ],
)
def test_compare_and_a_sweep_answer_from_the_table_that_is_there_now(command: list[str]) -> None:
    Path("fleet.csv").write_text(FLEET)
    arguments = [*SMALL, *FLEET_SOURCE.overrides, "devices.fresh=1", "rounds=2"]

    def latency(words: list[str]) -> float:
        ran = fedprune(*words, "--json")
        assert ran.returncode == 0, ran.stderr
        answer = json.loads(ran.stdout)
        found = json.dumps(answer)
        at = found.index('"latency_s": {"mean": ') + len('"latency_s": {"mean": ')
        return float(found[at:].split(",")[0])

    asked = [*command, *arguments]
    first = latency(asked)
    Path("fleet.csv").write_text(FLEET.replace("1,1,23", "0.1,1,23"))
    second = latency(asked)
    Path("fleet.csv").write_text(FLEET)
    assert second > 2 * first
    assert latency(asked) == first


def test_an_edited_configuration_file_is_another_run() -> None:
    Path("own/deadline").mkdir(parents=True)
    Path("own/experiment").mkdir()
    file = Path("own/experiment/mine.yaml")
    file.write_text("# @package _global_\ndeadline:\n  fraction: 0.5\n")
    hashes = set()
    for fraction in ("0.5", "0.4"):
        file.write_text(f"# @package _global_\ndeadline:\n  fraction: {fraction}\n")
        hashes.add(build_experiment(compose_config([*TINY, "experiment=mine"], Path("own"))).config_hash)
    assert len(hashes) == 2


def test_a_folder_of_another_run_is_not_said_to_be_continued() -> None:
    life.begin_or_reopen(composed("out=run"))
    config = composed("out=run", "training.epochs=2")
    with pytest.raises(CheckpointError, match="holds another run"):
        life.create(life.prepare(build_experiment(config)), config, Path("run"))


def test_a_dataset_in_its_usual_place_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPRUNE_DATA", str(Path("usual").absolute()))
    write_mnist(Path("usual/MNIST/raw"))
    usual = Source("usual/MNIST/raw/train-images-idx3-ubyte", tuple(o for o in MNIST if "root" not in o), edit_pixel)
    run_dir = run(usual)
    read_run(run_dir)
    edit_pixel(Path(usual.file))
    with pytest.raises(CheckpointError, match="edited since the run was made"):
        read_run(run_dir)


def test_a_folder_of_images_is_known_by_its_content() -> None:
    images = ("data=folder", "data.root=images", "model=mlp", "devices.count=3", "devices.fresh=1", "partition=iid")
    own.folder(np.random.default_rng(0), Path("images"))
    one = Path("images/ok/000.png")
    source = Source(str(one), images, lambda path: path.write_bytes(Path("images/ok/003.png").read_bytes()))
    run_dir = run(source)
    shutil.copytree("images", "copy")
    moved = [override.replace("=images", "=copy") for override in images]
    assert build_experiment(configured(*SMALL, *moved)).config_hash == asked(source).config_hash
    before = one.read_bytes()
    source.edit(one)
    with pytest.raises(CheckpointError, match=r"images: folder: edited since the run was made: SHA-256 \w{64} now"):
        life.reopen(run_dir)
    one.write_bytes(before)
    life.reopen(run_dir)
    shutil.rmtree("images")
    with pytest.raises(DataError, match="images: No such file or directory"):
        life.reopen(run_dir)


def test_a_data_folder_that_another_process_fills_is_read_at_each_look() -> None:
    """A file that is listed and then gone, as one that is moved at that moment: here a link to nowhere."""
    write_mnist(Path("data/MNIST/raw"))
    assert _stamp(Path("data")) == _stamp(Path("data"))
    Path("data/MNIST/raw/.incoming").symlink_to("nowhere")
    assert _stamp(Path("data")) != _stamp(Path("data"))
    assert build_experiment(configured(*MNIST)).identity["data"]["sha256"]


def test_keys_that_are_younger_than_a_configuration_leave_its_hash_alone() -> None:
    """Where they are not used: runs of before are found again."""
    for method in ("personalized", "proposed"):
        plain = build_experiment(composed(f"method={method}"))
        assert "rotation" not in plain.identity["participation"]
        turns = build_experiment(composed(f"method={method}", "participation.rotation=true"))
        assert turns.config_hash != plain.config_hash
    for allocator in ("dense", "fixed"):
        plain = build_experiment(composed(f"allocator={allocator}"))
        assert "on_infeasible" not in plain.identity["allocator"]
        drops = build_experiment(composed(f"allocator={allocator}", "allocator.on_infeasible=drop"))
        assert drops.identity["allocator"]["on_infeasible"] == "drop"
