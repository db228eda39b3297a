"""The command line as a user meets it: real processes, exit codes, one-line errors, nothing written by a mistake."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, fedprune


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def test_help_names_every_command_and_exit_code() -> None:
    text = fedprune("--help").stdout
    for word in ("train", "resume", "compare", "report", "130 interrupted"):
        assert word in text
    assert fedprune("--version").stdout.startswith("fedprune ")


def test_train_ends_with_a_table_and_a_report(tmp_path: Path) -> None:
    result = fedprune("train", *TINY, "out=here")
    assert result.returncode == 0, result.stderr
    assert "report: here/report/index.html" in result.stdout
    assert "ETA" in result.stderr
    rounds = [json.loads(line) for line in Path("here/rounds.jsonl").read_text().splitlines()]
    assert {"round", "simulated_s", "latency_s", "accuracy", "accuracy_p10", "mean_ratio", "bytes_up"} <= set(rounds[0])
    summary = json.loads(Path("here/summary.json").read_text())
    assert {"method", "seed", "rounds", "final_accuracy", "final_accuracy_p10", "fresh_accuracy", "simulated_s", "time_to_target_s",
            "bytes_up", "joules", "state_sha256"} == set(summary)  # fmt: skip
    assert "wall_s" not in Path("here/rounds.jsonl").read_text()
    assert files()[0] == "here"  # Hydra leaves nothing beside the run

    again = fedprune("train", *TINY, "out=here")
    assert (again.returncode, again.stdout) == (5, "")
    assert (
        again.stderr == "error: here exists: continue it with `fedprune resume here`, or choose another with out=DIR\n"
    )


def test_hydra_shows_and_sweeps() -> None:
    shown = fedprune("train", "--cfg", "job", "-p", "training")
    assert "shared_steps: 10" in shown.stdout
    assert "data:" in fedprune("train", "--info", "defaults-tree").stdout
    assert files() == []
    swept = fedprune("train", "-m", *TINY, "seed=0,1", "name=sweep")
    assert swept.returncode == 0, swept.stderr
    assert len(list(Path("outputs/sweep").glob("*-s[01]/summary.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "data=fmnst"), 2, "error: unknown data option 'fmnst'. Did you mean 'fmnist'?"),
        (("train", "partition.alpha=-1"), 2, "error: partition.alpha=-1: must be"),
        (("train", "rounds=1e400"), 2, "error: rounds"),
        (("train", "devices.count=5000"), 2, "error: "),
        (("train", "data=mnist", "data.root=/nonexistent"), 6, "error: "),
        (("train", "devices=table", "devices.file=missing.csv"), 6, "error: missing.csv"),
        (
            (
                "train",
                "deadline.seconds=1e-9",
                "allocator.on_infeasible=fail",
                "execution.kind=serial",
                "out=infeasible",
            ),
            3,
            "error: ",
        ),
        (("train", "out=/proc/nothing"), 8, "error: cannot write"),
        (("resume", "nowhere"), 5, "error: nowhere"),
        (("report", "nowhere"), 5, "error: nowhere"),
        (("compare", "--seeds", "a"), 2, "error: --seeds a"),
        (("train", "payload.bits=8"), 2, "error: payload.bits=8: must be a list"),
        (("compare", "seed=3"), 2, "error: compare chooses"),
        (("compare", "--methods", "proposed,nope"), 2, "error: unknown method option 'nope'"),
        (("compare", "arms={a: 1}"), 2, "error: arms: must map each name to a list of overrides"),
        (("compare", 'arms={a: ["rounds=x"]}'), 2, "error: rounds"),
        (("trian",), 2, "error: No such command 'trian'. Did you mean 'train'? See `fedprune --help`."),
        (
            ("compare", "--sed", "1"),
            2,
            "error: No such option: --sed (Possible options: --seeds). See `fedprune compare --help`.",
        ),
        (("train", "--quite"), 2, "error: No such option: --quite (Possible options: --quiet). See"),
        (
            ("train", "-m", "seed=0,1", "hydra/launcher=coers"),
            2,
            "error: unknown hydra/launcher option 'coers'. Did you mean 'cores'?",
        ),
        (
            ("train", "-m", "seed=0,1", "hydra/launcher=cores"),
            2,
            "error: launcher joblib needs an extra: pip install 'fedprune[joblib]'",
        ),
        (("train", "-m", "seed=range(2", "rounds=1"), 2, "error: "),
        (("runs", "nowhere"), 5, "error: nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_its_own_exit_code(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = fedprune(*arguments)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    if "out=infeasible" not in arguments:
        assert files() == []


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
def test_ctrl_c_leaves_a_resumable_run(signals: list[signal.Signals]) -> None:
    command = [
        sys.executable,
        "-m",
        "fedprune_cli",
        "train",
        *TINY,
        "rounds=2000",
        "execution.kind=processes",
        "execution.workers=2",
        "out=run",
    ]
    for sign in signals:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background job ignores it
        )  # fmt: skip
        before = len(Path("run/rounds.jsonl").read_text().splitlines()) if Path("run").exists() else 0
        until = time.monotonic() + 60
        while time.monotonic() < until and process.poll() is None:
            if (
                Path("run/rounds.jsonl").exists()
                and len(Path("run/rounds.jsonl").read_text().splitlines()) > before + 2
            ):
                break
            time.sleep(0.05)
        process.send_signal(sign)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + sign, errors
        assert errors.splitlines()[-1] == "interrupted; every finished round is safe: fedprune resume run"
        assert "Traceback" not in errors
        command = [sys.executable, "-m", "fedprune_cli", "resume", "run"]


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_a_resumable_run(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the same refusal by the system, at the first write too large."""

    result = fedprune("train", *TINY, "rounds=40", "out=run", before=limit_file_size)
    assert result.returncode == 8, result.stderr
    assert "error: cannot write run/rounds.jsonl: File too large" in result.stderr
    assert "Traceback" not in result.stderr
    resumed = fedprune("resume", "run")
    assert resumed.returncode == 0, resumed.stderr
    assert fedprune("train", *TINY, "rounds=40", "out=whole").returncode == 0
    assert Path("run/state.safetensors").read_bytes() == Path("whole/state.safetensors").read_bytes()
    assert Path("run/rounds.jsonl").read_bytes() == Path("whole/rounds.jsonl").read_bytes()


def test_compare_runs_pairs_and_a_second_call_only_reads() -> None:
    first = fedprune("compare", *TINY, "--seeds", "0,1", "--out", "cmp", "--jobs", "1")
    assert first.returncode == 0, first.stderr
    assert "report: cmp/index.html" in first.stdout
    page = Path("cmp/table.csv").read_bytes()
    second = fedprune("compare", *TINY, "--seeds", "0,1", "--out", "cmp", "--jobs", "1")
    assert "4 of 4 runs were finished before" in second.stderr
    assert "ETA" not in second.stderr
    assert Path("cmp/table.csv").read_bytes() == page


def test_the_installed_command_is_on_the_path() -> None:
    script = Path(sys.executable).with_name("fedprune")
    assert script.exists(), "make install puts it there"
    assert subprocess.run([script, "--version"], capture_output=True, env={**os.environ}, check=False).returncode == 0


def test_compare_takes_the_arms_of_an_experiment() -> None:
    arms = 'arms={tight: ["method=proposed", "deadline.fraction=0.4"], dense: ["method=personalized"]}'
    result = fedprune("compare", *TINY, arms, "--out", "cmp", "--jobs", "1")
    assert result.returncode == 0, result.stderr
    header = Path("cmp/table.csv").read_text().splitlines()[0]
    assert header.split(",")[1::3] == ["tight mean", "dense mean", "dense (equal bandwidth) mean"]
    assert "tight takes" in result.stdout


def test_json_is_all_that_stdout_holds_and_quiet_leaves_nothing() -> None:
    trained = fedprune("train", *TINY, "out=run", "--json")
    answer = json.loads(trained.stdout)
    assert answer["summary"] == json.loads(Path("run/summary.json").read_text())
    assert Path(answer["report"]).exists()
    compared = json.loads(fedprune("compare", *TINY, "--json", "-q", "--jobs", "1").stdout)
    assert compared["reference"] == "personalized"
    assert compared["figures"]["personalized"]["time_reduction"]["mean"] == 0
    assert json.loads(fedprune("verify", "run", "--json").stdout)["failures"] == []
    for command in (("report", "run"), ("resume", "run"), ("verify", "run")):
        quiet = fedprune(*command, "--quiet")
        assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", ""), command


def test_what_is_not_a_terminal_gets_no_colours() -> None:
    fedprune("train", *TINY, "out=run")
    assert "\x1b" not in fedprune("report", "run").stdout


def test_no_color_is_heeded_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pseudo-terminal, where colours and a moving bar would be drawn."""
    import pty

    def at_a_terminal(**environment: str) -> str:
        main, side = pty.openpty()
        command = [
            sys.executable,
            "-c",
            "from fedprune_cli import terminal; from rich.text import Text; terminal.show(Text('text', style='red'))",
        ]
        with subprocess.Popen(command, stdout=side, env={**os.environ, "TERM": "xterm", **environment}) as process:
            process.wait(timeout=60)
        os.close(side)
        return os.read(main, 1000).decode()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31m" in at_a_terminal()
    assert "\x1b[31m" not in at_a_terminal(NO_COLOR="1")
