"""`enroll`, `serve` and `join` as they are typed: what they write, and each mistake in one line."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from conftest import fedprune

pytest.importorskip("grpc")
pytest.importorskip("cryptography")


def test_enroll_makes_folders_whose_keys_only_their_owner_reads(tmp_path: Path) -> None:
    result = fedprune("enroll", "pilot", "0", "1", "--host", "10.0.0.1", "--host", "pilot.example")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in Path("pilot").iterdir()) == [
        "ca.key",
        "ca.pem",
        "device-0",
        "device-1",
        "server",
    ]
    for key in ("ca.key", "server/own.key", "device-0/own.key"):
        assert stat.S_IMODE((Path("pilot") / key).stat().st_mode) == 0o600
    assert not list(Path("pilot").glob("device-*/ca.key"))
    again = fedprune("enroll", "pilot", "1")
    assert (again.returncode, again.stderr) == (
        5,
        "error: pilot/device-1: is enrolled; --revoke 1 first, to give it a new certificate\n",
    )
    assert fedprune("enroll", "pilot", "1", "--revoke").returncode == 0
    assert fedprune("enroll", "pilot", "1").returncode == 0


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("enroll pilot 0", 2, "--host: missing"),
        ("enroll pilot 0 --host bad/name", 2, "neither a host's name nor an address"),
        ("join nowhere 127.0.0.1:1", 5, "nowhere/own.pem: No such file"),
        ("serve nowhere", 5, "nowhere: no device is enrolled here; fedprune enroll nowhere DEVICE... does it"),
        ("train data=nodes data.file=nowhere.json", 6, "nowhere.json: No such file"),
    ],
)
def test_mistakes_are_one_line(line: str, code: int, text: str) -> None:
    result = fedprune(*line.split())
    assert result.returncode == code, result.stderr
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
