"""A device that is enrolled after a run began: it begins as the run's fresh devices do, and the run does not notice."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from nodes.fleet import begin, enrolled, free_port, simulate, stand

from fedprune_cli.nodes.board import BOARD, read_board
from fedprune_cli.nodes.pilot import Pilot
from fedprune_cli.runs import life
from fedprune_cli.store import folder

SMALL = ("devices.count=2", "rounds=4", "payload.bits=[8]")


def test_a_newcomer_begins_as_a_fresh_device_does_and_changes_no_byte(tmp_path: Path) -> None:
    """The simulator's fresh device and the newcomer have the same samples: as many of their tests are right after the last round."""
    fresh = simulate(tmp_path / "simulated", *SMALL, "devices.fresh=1")
    pilot, port, said = enrolled(tmp_path, fresh), free_port(), list[str]()
    roster = json.loads((pilot / "roster.json").read_text())
    (pilot / "roster.json").write_text(json.dumps({"devices": roster["devices"][:2]}))
    records = []
    for run, come in (("alone", None), ("joined", 1)):
        setup, config = begin(pilot, tmp_path / run, [*SMALL, "devices.fresh=0", f"out={tmp_path / run}"])
        site = Pilot(pilot, f"127.0.0.1:{port}", said.append, config)
        for device in range(2):
            threading.Thread(target=stand, args=(pilot / f"device-{device}", port), daemon=True).start()
        for record in life.run(setup, tmp_path / run, site=site):
            if record.round == come:
                threading.Thread(target=stand, args=(pilot / "device-2", port), daemon=True).start()
                until_s = time.monotonic() + 60
                while not any("device-2: here" in line for line in said) and time.monotonic() < until_s:
                    time.sleep(0.02)
        records.append([(tmp_path / run / name).read_bytes() for name in (folder.RECORDS, folder.STATE)])
    assert records[0] == records[1]
    simulated = folder.read_state(tmp_path / "simulated").state.shared
    assert np.array_equal(folder.read_state(tmp_path / "joined").state.shared, simulated)
    told = [line for line in said if "device-2: a newcomer" in line]
    assert "shared part of round 4" in told[-1]
    right, tested = map(int, re.findall(r"(\d+) of (\d+) test samples", told[-1])[0])
    assert right / tested == folder.read_records(tmp_path / "simulated")[-1].fresh_accuracy
    (part,) = (pilot / "device-2").glob("*-s*/personal-*")
    assert part.name == "personal-4.safetensors"
    assert [(node.device, node.round) for node in read_board(pilot / BOARD).nodes] == [(0, 4), (1, 4), (2, 4)]
