"""Whatever is damaged, mistyped or made to deceive is refused in one line, in time, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import composed, forge, make_experiment, make_setup, read_lines, resign, run_to_end
from omegaconf import DictConfig, OmegaConf

from fedprune_cli import CONF, terminal
from fedprune_cli.audit.verify import verify_run
from fedprune_cli.commands import app as cli
from fedprune_cli.config.build import GROUPS, build_experiment
from fedprune_cli.config.compose import check_config_dir, compose_config
from fedprune_cli.errors import CheckpointError, ConfigError, DataError, FedpruneError, one_line
from fedprune_cli.report import page
from fedprune_cli.report.comparison import compare
from fedprune_cli.report.comparison_page import comparison_table, write_comparison
from fedprune_cli.report.read import read_run
from fedprune_cli.report.run import write_report
from fedprune_cli.round.first import ask
from fedprune_cli.runs import life
from fedprune_cli.store import files, folder
from fedprune_cli.world.channel import Trace

CPU_LIMIT_S = 5

# --- bit flips and truncations --------------------------------------------------------------------------------------


def resume(run_dir: Path) -> None:
    """Reads a run back as `fedprune resume` does, without building its world."""
    folder.check(run_dir, folder.CONFIG, folder.MANIFEST)
    folder.load(run_dir, make_setup().experiment.config_hash)


def audit(run_dir: Path) -> None:
    """Reads a run back as `fedprune verify` does."""
    folder.check(run_dir)
    folder.read_whole_state(run_dir)
    folder.read_records(run_dir)


READERS: dict[str, Callable[[Path], object]] = {"resume": resume, "verify": audit, "report": read_run}
PERSONAL = "personal-0.f32"
READ_BY_REPORT = (folder.STATE, folder.RECORDS, folder.MANIFEST, folder.SUMMARY)


def damage(rng: random.Random, data: bytes) -> bytes:
    """Returns the data with one bit turned, or cut off anywhere."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def flip(tmp_path: Path, count: int) -> None:
    """Damages every file of a finished and of a killed run in turn; whoever reads it must refuse it, and change nothing."""
    run_to_end(tmp_path / "finished")
    setup, rng = make_setup(), random.Random(0)
    life.create(setup, composed(), tmp_path / "killed")
    records = life.run(setup, tmp_path / "killed")
    next(records), next(records)
    records.close()
    assert (tmp_path / "killed" / PERSONAL).exists()
    for number in range(count):
        base = tmp_path / ("finished", "killed")[number % 2]
        names = [path.name for path in sorted(base.iterdir()) if base.name == "finished" or path.name != folder.TIMINGS]
        name = names[number // 2 % len(names)]
        damaged = tmp_path / "damaged"
        shutil.copytree(base, damaged)
        good = (damaged / name).read_bytes()
        (damaged / name).write_bytes(bad := damage(rng, good))
        for reader, read in READERS.items():
            if reader != "report" or name in READ_BY_REPORT:
                with pytest.raises(CheckpointError):
                    read(damaged)
        assert {path.name: path.read_bytes() for path in damaged.iterdir()} == {
            path.name: path.read_bytes() if path.name != name else bad for path in base.iterdir()
        }
        (damaged / name).write_bytes(good)
        resume(damaged)
        shutil.rmtree(damaged)


def test_a_turned_bit_and_a_cut_is_detected_in_every_file(tmp_path: Path) -> None:
    flip(tmp_path, 100)


@pytest.mark.slow
def test_a_thousand_turned_bits_and_cuts_are_detected(tmp_path: Path) -> None:
    flip(tmp_path, 2000)


# --- bad configurations, overrides and tables -----------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 10**12, -(10**12), 2**63, 10**400, 0.5, -0.0, 1e308, -1e308, 1e-308, float("nan"), float("inf"),
    float("-inf"), "", " ", "0", "1e400", "nan", "null", "none", "../../etc/passwd", "/etc/passwd", "/dev/zero", "a" * 5000, "\0",
    "\x1b[2J",     "\ud800", "é\u202e", "${seed}", "${oc.env:HOME}", "${oc.env:NOPE}", "${nope}", "${training}", "???", "{{7*7}}",
    "__import__('os')",
    "'; DROP TABLE", "%s%n", [], [[]], [0], [1, "a"], [1e308] * 3, {}, {"a": {"b": 1}}, {"_target_": "os.system", "command": "touch x"},
    {"_target_": "builtins.eval"}, [[[[[[[[[[1]]]]]]]]]], "serial", "head", "last_99999999999999999999", "last_0", [10**9, 10**9],
    "cpu", "cuda", "kkt", "rayleigh", 1e-300, 4096, 2**31,
)  # fmt: skip


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends what takes more than five seconds of this process's time."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {CPU_LIMIT_S} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(call: Callable[[], object]) -> str:
    """Returns the error's class, or `sound`; anything but one line of FedpruneError is raised."""
    with limited():
        try:
            call()
            return "sound"
        except FedpruneError as error:
            text, name = str(error), type(error).__name__
    assert text
    assert text == one_line(text)
    return name


def small_world(config: DictConfig) -> None:
    """Checks a configuration, and where it is sound draws its devices and their channel too."""
    experiment = build_experiment(config)
    if (
        getattr(experiment.devices, "count", 0) <= 1000
        and experiment.devices.fresh <= 1000
        and experiment.rounds <= 1000
    ):
        fleet = experiment.devices.draw(experiment.seed)
        experiment.channel.available(experiment.seed, experiment.rounds, len(fleet.cpu_hz))
        experiment.channel.gain(experiment.seed, 0, fleet)


def good_configs() -> list[dict[str, Any]]:
    """Returns one configuration for each choice of each group."""
    choices = [f"{group}={name}" for group, table in GROUPS.items() for name in table]
    files = {"channel=trace": "trace.csv", "channel=uplink": "uplink.csv", "devices=table": "fleet.csv"}
    extra = {choice: [f"{choice.split('=')[0]}.file={file}"] for choice, file in files.items()}
    return [OmegaConf.to_container(compose_config([choice, *extra.get(choice, [])])) for choice in choices]  # type: ignore[misc]


def mutate(rng: random.Random, values: Any, depth: int = 0) -> Any:
    """Returns a configuration with something changed, taken out, put in or turned into something else, somewhere."""
    if not isinstance(values, dict) or not values or (depth and rng.random() < 0.2):
        return rng.choice(VALUES)
    changed, key = dict(values), rng.choice(list(values))
    kind = rng.random()
    if kind < 0.08:
        del changed[key]
    elif kind < 0.16:
        changed[rng.choice(["_target_", "foo", "", "\0", "a.b", "name", "a" * 3000, "é"])] = rng.choice(VALUES)
    else:
        changed[key] = mutate(rng, values[key], depth + 1)
    return changed


def scramble(rng: random.Random, text: bytes) -> bytes:
    """Returns the text with bytes changed, repeated, taken out or put in."""
    data = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(len(data) + 1)
        piece = rng.choice(PIECES)
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + rng.randrange(20)] = piece
        elif kind == 1:
            data[at:at] = piece * rng.choice((1, 1, 3, 200))
        elif kind == 2:
            data[at:at] = data[: rng.randrange(200)]
        elif data:
            data[at % len(data)] = rng.randrange(256)
    return bytes(data)


PIECES = (
    b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"\r", b",", b'"', b"'", b"[", b"{", b"}", b"]", b"&a ", b"*a ", b"<<: *a",
    b"!!python/object:os.system",
    b"!!python/object/apply:os.system ['touch hacked']", b": ", b"- ", b"# ", b"---\n", b"nan", b"inf", b"-1", b"1e308", b"1e999",
    b"9" * 50,
    b"9" * 5000,
    b"=cmd|' /C calc'!A0", b"\x1b[31m", b"${seed}", b"\t", b"\xe2\x80\xa8", b"0x10", b"1_0", b"\xd9\xa1", b"|", b">", b"%", b"@", b"`",
)  # fmt: skip

FLEET = b"cpu_ghz,cycles_per_flop,tx_power_dbm,samples,gain_db,energy_budget_j\n1,1,23,100,-90,1\n2,0.5,20,50,-100,2\n0.5,2,23,10,-80,5\n"
PLACES = b"cpu_ghz,cycles_per_flop,tx_power_dbm,samples,distance_km\n1,1,23,100,0.1\n2,0.5,20,50,0.5\n"
OWN = b"shared_compute_s,payload_bits,fixed_s,snr_hz,weight,max_ratio\n1,1e7,0.1,1e7,1,0.9\n0.5,1e7,0.1,1e6,2,0.5\n"
TRACE = b"round,device,gain_db,available\n0,0,-90,1\n0,1,-100,0\n1,0,-80,1\n1,1,-85,1\n"
CELLS = ("", "-1", "0", "1e308", "1e-308", "nan", "inf", "-inf", "1e12", "1e18", "1e30", "-400", "100", "0x1", "1_0", "=1+1", "a", "\0",
         "é", "9" * 400,
         "../../etc/passwd", "1e-13", "1e-6", "1e6", "0.5", "9999999", "10000000")  # fmt: skip


def bad_table(rng: random.Random, text: bytes) -> bytes:
    """Returns a table with cells, columns or lines changed, or scrambled as a whole."""
    if rng.random() < 0.4:
        return scramble(rng, text)
    rows = [line.split(",") for line in text.decode().splitlines()]
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind, row = rng.randrange(6), rng.choice(rows)
        if kind <= 2 and row:
            row[rng.randrange(len(row))] = rng.choice(CELLS)
        elif kind == 3:
            rows.insert(rng.randrange(len(rows) + 1), list(row))
        elif kind == 4 and len(rows) > 1:
            rows.remove(row)
        elif kind == 5:
            row.insert(rng.randrange(len(row) + 1), rng.choice(CELLS))
    return "\n".join(map(",".join, rows)).encode()


def read_bad_table(path: Path, kind: bytes) -> None:
    if kind is TRACE:
        trace = Trace("trace", 20e6, 1e-20, 40.0, 0.0, 0.5, str(path))
        trace.available(0, 3, 2)
        trace.gain(0, 1, make_setup().scenario.fleet.take(np.arange(2)))
        return
    experiment = make_setup().experiment
    problem = ask(experiment, path).problem
    experiment.allocator.solve(problem, 0, 0)


def fuzz(overrides: int, configs: int, texts: int, tables: int, commands: int, capsys: Any) -> dict[str, int]:
    """Returns how many of the generated cases ended how."""
    rng, counts, good = random.Random(1), dict[str, int](), good_configs()
    keys = sorted({key for config in good for key in _dotted(config)})

    def count(kind: str, call: Callable[[], object], case: object) -> None:
        try:
            ended = f"{kind}: {outcome(call)}"
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{kind}: {case!r:.2000}") from error
        counts[ended] = counts.get(ended, 0) + 1

    for _ in range(overrides):
        value = rng.choice(VALUES)
        text = (
            value
            if isinstance(value, str)
            else json.dumps(value).replace('"', "")
            if rng.random() < 0.5
            else repr(value)
        )
        chosen = [f"{rng.choice(['', '', '', '+', '~', '++'])}{rng.choice(keys)}={text}"]
        chosen = (
            [scramble(rng, chosen[0].encode(errors="replace")).decode(errors="surrogateescape")]
            if rng.random() < 0.3
            else chosen
        )
        count("overrides", lambda chosen=chosen: small_world(compose_config(chosen)), chosen)
    for _ in range(configs):
        values = mutate(rng, rng.choice(good))
        count("configuration", lambda values=values: small_world(as_config(values)), values)
    for _ in range(texts):
        Path("config.yaml").write_bytes(
            text := scramble(rng, OmegaConf.to_yaml(OmegaConf.create(rng.choice(good))).encode())
        )
        count(
            "configuration file",
            lambda: small_world(as_config(files.read_yaml(Path("config.yaml"), CheckpointError))),
            text,
        )
    for _ in range(tables):
        kind = rng.choice((FLEET, PLACES, OWN, TRACE))
        Path("table.csv").write_bytes(text := bad_table(rng, kind))
        count("table", lambda kind=kind: read_bad_table(Path("table.csv"), kind), text)
    for _ in range(commands):
        Path("table.csv").write_bytes(bad_table(rng, rng.choice((FLEET, PLACES, OWN))))
        value = rng.choice([v for v in VALUES if isinstance(v, str) and "\0" not in v])
        arguments = rng.choice((
            ["allocate", "--devices", "table.csv", "--json"], ["train", f"{rng.choice(keys)}={value}", "devices.count=1000000000000"],
            ["train", f"+foo={value}"], ["ladder", f"--fractions={value}x"], ["resume", f"nowhere{value[:50]}"], ["report", "table.csv"],
            ["verify", "/dev/null"], ["compare", f"name={value}", "rounds=0"], ["bench", "--baseline", "table.csv"],
            ["train", "--config-dir", f"nowhere{value[:50]}"], ["calibrate", "--ratios", f"{value},x"], [value or "x"],
        ))  # fmt: skip
        count("command", lambda arguments=arguments: command(arguments, capsys), arguments)
    Path("table.csv").unlink(missing_ok=True)
    Path("config.yaml").unlink(missing_ok=True)
    assert list(Path().iterdir()) == []
    return counts


def as_config(values: Any) -> DictConfig:
    """As `life.reopen`: whatever OmegaConf makes of it is one line."""
    try:
        return DictConfig(OmegaConf.create(values))
    except Exception as error:
        raise ConfigError(str(error)) from None


def command(arguments: list[str], capsys: Any) -> None:
    """Runs the real command line in this process; it ends with 0, or with one line and a code of its own."""
    argv, sys.argv = sys.argv, ["fedprune", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = argv
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    if code != 0:
        assert code in range(2, 9)
        lines = output.err.splitlines()
        assert lines[0].startswith(("error: ", "Usage: "))
        assert len(lines) == 1 or lines[0].startswith("Usage: ")


def _dotted(values: dict[str, Any], prefix: str = "") -> list[str]:
    nested = [_dotted(value, f"{prefix}{key}.") for key, value in values.items() if isinstance(value, dict)]
    return [f"{prefix}{key}" for key in values] + [key for keys in nested for key in keys]


@pytest.mark.slow
def test_some_bad_inputs_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    counts = fuzz(2, 15, 5, 30, 2, capsys)
    assert sum(counts.values()) == 54


@pytest.mark.slow
def test_ten_thousand_bad_inputs_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    counts = fuzz(600, 5800, 500, 4600, 150, capsys)
    assert sum(number for ended, number in counts.items() if not ended.endswith("sound")) >= 10_000
    with capsys.disabled():
        print(json.dumps(counts, indent=1))


# --- files that were made to deceive --------------------------------------------------------------------------------


BOMB = "a: &a [1, 1, 1, 1]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("devices/x.yaml", "hydra: {callbacks: {x: {_target_: os.system}}}", "nothing that is run"),
        ("devices/x.yaml", "# @package hydra.callbacks.x\ncommand: touch hacked", "nothing that is run"),
        ("devices/x.yaml", "defaults: [/evil@hydra.callbacks.x]", "nothing that is run"),
        ("devices/x.yaml", "defaults: [{override hydra/job_logging: evil}]", "nothing that is run"),
        ("hydra/callbacks/x.yaml", "command: touch hacked", "nothing that is run"),
        ("devices/x.yaml", 'a: [[{"\\x5ftarget_": os.system}]]', "nothing that is run"),
        ("devices/x.yaml", "!!python/object/apply:os.system ['touch hacked']", "could not determine a constructor"),
        ("devices/x.yaml", "a: " + "[" * 100_000, "nested more than 50 levels"),
        ("devices/x.yaml", BOMB, "more than 20000 values"),
        ("devices/x.yaml", "a: &a [*a]", "stands for nothing"),
        ("devices/x.yaml", "a: " + "x" * 300_000, "more than the 200000 bytes"),
        ("devices/x.yaml", "a: \0", "not YAML"),
    ],
)  # fmt: skip
def test_a_config_dir_chooses_values_and_runs_nothing(name: str, text: str, message: str) -> None:
    path = Path("mine") / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with limited(), pytest.raises(ConfigError, match=message):
        check_config_dir(Path("mine"))
    assert not Path("hacked").exists()


def test_our_own_configuration_would_be_accepted_as_a_config_dir(tmp_path: Path) -> None:
    """All but conf/hydra, which names launchers."""
    shutil.copytree(CONF, tmp_path / "conf", ignore=shutil.ignore_patterns("hydra"))
    check_config_dir(tmp_path / "conf")


@pytest.mark.parametrize(
    "override", ["hydra.searchpath=[file://evil]", "-cd", "--config-di=evil", "out=\udcff", "a" * 20_000]
)
def test_overrides_that_lead_elsewhere_or_are_no_text_are_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        compose_config([override])


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a": NaN}', b'{"a": 1e999}', b"{" + b'"a":{' * 5000, b"9" * 5000, b"\xff", b""]
)
def test_json_without_end_or_beyond_numbers_is_refused(content: bytes) -> None:
    Path("x.json").write_bytes(content)
    with limited(), pytest.raises(CheckpointError, match="damaged"):
        files.read_json(Path("x.json"), CheckpointError)


def test_links_and_devices_in_a_run_folder_are_neither_read_nor_written(tmp_path: Path) -> None:
    """Whoever gets a folder from somebody else appends to no file outside of it."""
    run_to_end(tmp_path / "run")
    outside = tmp_path / "outside"
    for name in (folder.RECORDS, folder.STATE, folder.SUMS, PERSONAL, f".{folder.STATE}.new", "report"):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        outside.write_bytes((tmp_path / "run" / name).read_bytes() if (tmp_path / "run" / name).exists() else b"mine")
        before = outside.read_bytes()
        (tmp_path / "copy" / name).unlink(missing_ok=True)
        (tmp_path / "copy" / name).symlink_to(outside)
        for read in (resume, audit, read_run, write_report):
            with pytest.raises(CheckpointError, match="a link or a device"):
                read(tmp_path / "copy")
        assert outside.read_bytes() == before
    with pytest.raises(DataError, match="not a plain file"):
        ask(make_experiment(), Path("/dev/zero"))


@pytest.mark.parametrize(
    "forged",
    [
        {"personal": ["../../../etc/passwd", 1, ""]}, {"personal": ["/dev/zero", 1, ""]},
        {"personal": ["personal-0.f32", 10**15, ""]},
        {"personal": ["personal-0.f32", -1, ""]}, {"personal": [5, 1, ""]}, {"round": -1}, {"round": 10**30}, {"round": "3"},
        {"records": 1},
    ],
)  # fmt: skip
def test_a_forged_checkpoint_with_a_right_checksum_is_refused(tmp_path: Path, forged: dict[str, Any]) -> None:
    from hashlib import sha256

    from safetensors.numpy import load, save

    run_to_end(tmp_path / "run")
    data = (tmp_path / "run" / folder.STATE).read_bytes()
    tensors, header = load(data), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    meta = json.loads(header["__metadata__"]["fedprune"]) | forged
    del meta["sha256"]
    digest = sha256(json.dumps(meta).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tensors[name].shape}".encode() + tensors[name].tobytes())
    meta["sha256"] = digest.hexdigest()
    (tmp_path / "run" / folder.STATE).write_bytes(save(tensors, {"fedprune": json.dumps(meta)}))
    resign(tmp_path / "run")
    for read in (resume, audit):
        with limited(), pytest.raises(CheckpointError):
            read(tmp_path / "run")


def test_a_header_of_ten_gigabytes_is_refused() -> None:
    from fedprune_cli.store.state import decode

    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        decode((10 * 2**30).to_bytes(8, "little") + b"{}", "x")


@pytest.mark.parametrize(
    "change",
    [
        {"simulated_s": "1"}, {"simulated_s": 10**400}, {"accuracy": []}, {"status": None}, {"devices": []}, {"devices": {"id": [-1]}},
        {"devices": {"id": [0]}}, {"devices": {"id": [0, 1], "latency_s": [1.0]}}, {"devices": {"id": ["a"]}},
    ],
)  # fmt: skip
def test_a_record_that_is_none_is_refused_by_all_who_read_it(tmp_path: Path, change: dict[str, Any]) -> None:
    run_to_end(tmp_path / "run")
    records = read_lines(tmp_path / "run")
    forge(tmp_path / "run", records=[records[0], records[1] | change, records[2]])
    for read in (read_run, lambda path: verify_run(make_setup(), path, every=0)):
        with pytest.raises(CheckpointError, match="line 2 is damaged"):
            read(tmp_path / "run")


@pytest.mark.parametrize(
    "change", [{"method": 1}, {"histogram": [[1, "a"]]}, {"config": {}}, {"dataset": {"num_classes": 10**9}}]
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    run_to_end(tmp_path / "run")
    path = tmp_path / "run" / folder.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    resign(tmp_path / "run")
    with pytest.raises(CheckpointError, match="not the manifest of a run"):
        read_run(tmp_path / "run")
    with pytest.raises(CheckpointError):
        life.reopen(tmp_path / "run")


NASTY = r"<script>[/red]$\frac{a}_^~#&%|=1" + "\n\x1b[2J`"


def test_what_users_named_is_escaped_in_every_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("personalized", "proposed"):
        run_to_end(tmp_path / method, f"method={method}")
    runs = [read_run(tmp_path / method) for method in ("personalized", "proposed")]
    comparison = compare(runs, ["base", NASTY])
    out = write_comparison(comparison, tmp_path / "out", command=NASTY, missing=[NASTY]).parent
    text = (out / "index.html").read_text()
    assert "<script" not in text
    tex = (out / "table.tex").read_text()
    assert (
        r"\textless{}script\textgreater{}[/red]\$\textbackslash{}frac\{a\}\_\textasciicircum{}\textasciitilde{}\#\&\%|=1"
        in tex
    )
    assert "<script" not in (out / "table.md").read_text()
    assert len({line.replace("\\|", "").count("|") for line in (out / "table.md").read_text().splitlines()}) == 1
    terminal.show(comparison_table(comparison))
    assert "\x1b[2J" not in capsys.readouterr().out
    assert page.csv_text(["a"], [["\t=1"], ["\r=1"]]).count("'") == 2
