"""`fedprune verify` finds every figure that was changed, also by somebody who writes all checksums anew."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Line, composed, forge, make_setup, read_lines, run_to_end, steps_of
from typer.testing import CliRunner

from fedprune_cli.audit.metering import code_bytes
from fedprune_cli.audit.verify import Findings, audit_round, state_failures, verify_run
from fedprune_cli.commands.app import app
from fedprune_cli.errors import CertificateError, CheckpointError
from fedprune_cli.round.plan import plan_round
from fedprune_cli.round.roster import choose_roster
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.store.record import parse_record

OPTIONS = {
    "plain": (),
    "masks sent": ("pruner=taylor", "rounds=4"),
    "few bits": ("payload.bits=[4,8]",),
    "channels": ("pruner.granularity=channel",),
    "outages": ("channel.outage_enter=0.4", "channel.outage_leave=0.5", "rounds=8", "devices.count=2"),
    "frozen": ("rounds=8", "participation.freeze_below=0.3", "participation.freeze_window=1", "training.lr=0.02"),
    "frozen, masks sent": ("rounds=6", "participation.freeze_below=0.3", "participation.freeze_window=1", "pruner=taylor"),
    "weights": ("weights=pruning_error", "devices.per_round=3"),
    "paper's meter": ("meter=paper", "method=personalized"),
    "epochs": ("training.epochs=1", "allocator=equal"),
    "idle": (
        "devices=measured", "meter.idle=true", "rounds=6", "faults.die=0.3", "participation.freeze_below=0.3",
        "participation.freeze_window=1", "training.lr=0.02",
    ),
    "copies": ("meter.unicast=true", "channel.outage_enter=0.2", "channel.outage_leave=0.5"),
    "copies, frozen": (
        "meter.unicast=true", "rounds=8", "participation.freeze_below=0.3", "participation.freeze_window=1", "training.lr=0.02",
    ),
    "copies, secure": ("meter.unicast=true", "privacy.secure=true", "devices.count=7"),
    "copies, channels": ("meter.unicast=true", "pruner.granularity=channel"),
    "copies, a draw": ("meter.unicast=true", "devices.per_round=2"),
}  # fmt: skip


def audit(run_dir: Path) -> Findings:
    return verify_run(life.reopen(run_dir), run_dir, every=0)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_kind_of_run_is_sound_and_metered_to_the_last_digit(tmp_path: Path, name: str) -> None:
    records = run_to_end(tmp_path / "run", *OPTIONS[name])
    findings = audit(tmp_path / "run")
    assert findings.failures == ()
    assert findings.finished
    assert findings.metered == sum(len(record["devices"]["id"]) for record in records) > 0
    assert findings.bounded == (findings.metered if name.endswith("channels") else 0)


@pytest.mark.parametrize("overrides", [(), ("meter.unicast=true",)])
def test_each_changed_figure_is_found(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Of a run with every checksum written anew: each figure of a record and of its devices that can be known without training."""
    whole, changed = tmp_path / "run", tmp_path / "changed"
    run_to_end(whole, *overrides)
    records = read_lines(whole)
    found = {}

    def keys(record: Line) -> list[tuple[str, ...]]:
        columns = [key for key in record["devices"] if key not in ("pruning_error", "train_loss", "accuracy")]
        known = ("simulated_s", "latency_s", "bytes_up", "bytes_down", "joules", "flops")
        return [*((key,) for key in known), *(("devices", key) for key in columns)]

    for path in keys(records[1]):
        forged = copy.deepcopy(records)
        at = forged[1][path[0]] if len(path) == 1 else forged[1]["devices"][path[1]]
        if len(path) == 1:
            forged[1][path[0]] = at * 1.001 if isinstance(at, float) else at + 4
        else:
            at[0] = at[0] * 1.001 if isinstance(at[0], float) else at[0] + 4
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(whole, changed)
        forge(changed, records=forged)
        found[path] = audit(changed).failures
        assert found[path], path
    assert found["devices", "id"][0] == "round 2: device 4 is none of the 4 that train"
    assert "round 2: device 0: compute_s is" in "".join(found["devices", "compute_s"])
    assert "round 2: device 0 sent" in "".join(found["devices", "bytes_up"])


RICH = (
    "rounds=8", "payload.bits=[4,8]", "failsafe.safe_ratio=true", "failsafe.quarantine_after=2", "faults.die=0.3", "training.lr=0.02",
    "participation.freeze_below=0.3", "participation.freeze_window=1", "weights=pruning_error", "faults.clock_error=0.3",
)  # fmt: skip
STRANGE = (0, -1, 2**62, 10**9, 1e300, -1e300, 0.5, None, [0], [3, 3], [2**40])


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_record_that_no_round_can_have_written_is_a_finding_and_no_crash(every: int) -> None:
    """Whatever stands in the place of any figure of a round: verify says what is wrong, and computes nothing without an end.

    every: so many changes apart, of which there are eleven of each figure: in the place of each stand five or six of them.
    """
    setup = make_setup(*RICH)
    step = next(step for step in steps_of(setup, 8) if step.record.rounding_error and step.before.slots["frozen"].any())
    line, found = step.record.as_json(), set()
    assert audit_round(setup, step.before.slots, step.record, solve=False)[0].failures == ()
    paths = [(key,) for key in line if key != "round"] + [(of, key) for of in ("devices", "faults") for key in line[of]]
    for path, strange in itertools.islice(itertools.product(paths, STRANGE), 0, None, every):
        changed = copy.deepcopy(line)
        holder = changed if len(path) == 1 else changed[path[0]]
        of_all = isinstance(holder[path[-1]], list) and path[0] == "devices" and not isinstance(strange, list)
        holder[path[-1]] = [strange] * len(line["devices"]["id"]) if of_all else strange
        record = parse_record(changed)
        if record is None or record == step.record:
            continue
        audit, after = audit_round(setup, step.before.slots, record, solve=False)
        state_failures(step.after, [record], after)
        plan_round(setup, choose_roster(setup, 3, after), after)  # the next round's audit has something to go on
        found |= {path} if audit.failures else set()
    assert {("bits",), ("rounding_error",), ("price_per_hz",), ("devices", "id"), ("faults", "died")} <= found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, round=2), "state"),
        (lambda s: replace(s, slots={**s.slots, "simulated_s": s.slots["simulated_s"] + 1e-6}), "simulated_s is not"),
        (lambda s: replace(s, slots={**s.slots, "prune_ratio": s.slots["prune_ratio"][::-1].copy()}), "prune_ratio is not"),
        (lambda s: replace(s, personal=replace(s.personal, place=np.full(4, -1))), "personal parts are not those"),
    ],
)  # fmt: skip
def test_a_state_that_the_records_do_not_lead_to_is_found(tmp_path: Path, change: Callable, message: str) -> None:
    run_to_end(tmp_path / "run")
    records = read_lines(tmp_path / "run")
    forge(tmp_path / "run", state=change(folder.read_state(tmp_path / "run").state), records=records)
    try:
        failures = audit(tmp_path / "run").failures
    except CheckpointError as error:
        failures = (str(error),)
    assert message in "".join(failures)


def test_a_summary_that_flatters_is_found(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    forge(tmp_path / "run", summary=summary | {"final_accuracy": 0.99})
    assert audit(tmp_path / "run").failures == ("summary.json is not what the records and the state give",)


def test_the_command_says_what_it_checked_and_an_unfinished_run_is_named(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "run"), "--every", "0"], catch_exceptions=False)
    assert result.exit_code == 0
    for word in ("checksums", "state and summary", "metered again", "certificate", "sound"):
        assert word in result.output
    setup = make_setup("rounds=5")
    life.create(setup, composed("rounds=5"), tmp_path / "half")
    records = life.run(setup, tmp_path / "half")
    next(records), next(records)
    records.close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()}
    half = CliRunner().invoke(app, ["verify", str(tmp_path / "half"), "--every", "0"], catch_exceptions=False)
    assert (half.exit_code, "NOT FINISHED" in half.output.replace("\n", " "), "2 of 5" in half.output) == (
        0,
        True,
        True,
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()} == before
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    forge(tmp_path / "run", summary=summary | {"joules": 0.0})
    with pytest.raises(CertificateError, match="summary"):
        CliRunner().invoke(app, ["verify", str(tmp_path / "run"), "--every", "0"], catch_exceptions=False)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 1025, 5000])
def test_the_length_of_a_code_is_known_beforehand(bits: int, size: int) -> None:
    from fedprune_cli.wire.quantize import quantize

    code = quantize(np.ones(size, np.float32), bits, np.random.default_rng(0))
    assert len(code) == code_bytes(np.array([size]), bits)[0]


def test_verify_finds_a_sound_run_sound_and_a_changed_one_not(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    findings = verify_run(life.reopen(tmp_path / "run"), tmp_path / "run", every=1)
    assert findings.failures == ()
    assert findings.certified == findings.rounds == 3
    assert findings.solved_again + findings.unsolved == 3
    assert findings.residual <= 1e-9
    records = read_lines(tmp_path / "run")
    records[1]["devices"]["bandwidth_hz"][0] *= 1.001
    forge(tmp_path / "run", records=records)
    changed = verify_run(life.reopen(tmp_path / "run"), tmp_path / "run", every=0)
    assert changed.failures == ("round 2: the recorded allocation is not what the configuration gives",)


def test_a_short_run_is_solved_again_at_least_once(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run")
    assert verify_run(make_setup(), tmp_path / "run", 10).solved_again == 1
    assert verify_run(make_setup(), tmp_path / "run", 0).solved_again == 0
