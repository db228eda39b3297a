"""The nodes of a pilot as `watch` shows them, from folders that are made up: in the terminal, on a page, for Prometheus, to a webhook."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import http.client
import itertools
import json
import os
import pty
import re
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import fedprune, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedprune_cli.audit import fleet, watch, window
from fedprune_cli.audit.watch import Look, Prices, parse_limit
from fedprune_cli.audit.window import Seen, Webhook, outward, parse_address
from fedprune_cli.errors import CheckpointError, ConfigError, LimitError
from fedprune_cli.nodes import board
from fedprune_cli.nodes.board import BOARD, STATES, Board, Posted, Standing, encode, read_board
from fedprune_cli.store import folder

FREE = Prices(0.0, 0.0)
HOSTILE = "<script>alert(1)</script>\"'\\\n\x1b[2J&"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run that is not finished, three rounds long, whose timings are those of nodes."""
    run_dir = tmp_path_factory.mktemp("ran") / "run"
    run_to_end(run_dir)
    (run_dir / folder.SUMMARY).unlink()
    modelled = {"compute_s": 1.0, "uplink_s": 2.0, "downlink_s": 0.5}
    rows = [
        {"device": 0, "compute_s": 1.5, "downlink_s": 0.25, "uplink_s": 2.0, "waiting_s": 9.0, "joules": 12.5, "joules_of": "rapl",
         "modelled": {**modelled, "joules": 0.25}},
        {"device": 1, "compute_s": 7.0, "carried_s": 1.0, "waiting_s": 0.0, "modelled": modelled},  # of an earlier version
    ]  # fmt: skip
    timings = [{"round": 1, "wall_s": 1.0, "nodes": rows}, {"round": 2, "wall_s": 1.0, "nodes": rows[:1]}]
    (run_dir / folder.TIMINGS).write_text("".join(json.dumps(one) + "\n" for one in timings))
    return run_dir


def nodes_now(*, machine: str = "x86_64", why: str = "for a reason") -> tuple[Standing, ...]:
    """Returns a node in each state, in which it has been for a minute."""
    then = time.time() - 60
    return tuple(
        Standing(device, state, then, device, "" if state == "up" else why, "0.1.0", "2.9.0", machine)
        for device, state in enumerate(STATES)
    )


def pilot(home: Path, run_dir: Path | None, nodes: tuple[Standing, ...], *, ago_s: float = 0.0) -> Path:
    """Makes a pilot's folder of what a server has posted."""
    posted = Posted("abc-s0" if run_dir else "", str(run_dir or ""), True, time.time() - ago_s, nodes)
    (home / "pilot").mkdir(exist_ok=True)
    (home / "pilot" / BOARD).write_bytes(encode(posted))
    return home / "pilot"


def shown(now: Look, limits: tuple[str, ...] = (), columns: int = 80) -> str:
    """Returns what a terminal of so many columns shows."""
    console = Console(width=columns, markup=False, emoji=False)
    with console.capture() as text:
        console.print(now.table([parse_limit(one) for one in limits]))
    return text.get()


# --- what the server posts ------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(st.builds(Standing, st.integers(0, 10**6), st.sampled_from(STATES), st.floats(0, 1e10), st.integers(0, 10**6),
                          st.text(), st.text(), st.text(), st.text())), st.text(), st.booleans())  # fmt: skip
def test_what_is_posted_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, nodes: list[Standing], run: str, serving: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / BOARD
    posted = Posted(run, "/somewhere", serving, 1.5, tuple(nodes))
    path.write_bytes(encode(posted))
    assert read_board(path) == posted


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run": 1}', encode(Posted("", "", True, 0.0, (Standing(-1),))).decode(),
                                     encode(Posted("", "", True, 0.0, (Standing(0, "off"),))).decode()])  # fmt: skip
def test_what_nobody_posted_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / BOARD).write_text(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_board(tmp_path / BOARD)


def test_news_are_what_changed_or_a_sign_of_life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    moment = [100.0]
    monkeypatch.setattr(board.time, "time", lambda: moment[0])
    here = Board(tmp_path / BOARD, lambda _: None)
    here.see(0, "away")
    assert here.news()
    assert not here.news()
    moment[0] += 1
    here.see(0, "away")
    assert not here.news()
    here.see(0, "up")
    here.write(here.news())
    assert read_board(tmp_path / BOARD).nodes == (Standing(0, "up", 101.0),)
    moment[0] += board.BEAT_S
    here.see(0, "up")
    here.write(here.news())
    posted = read_board(tmp_path / BOARD)
    assert (posted.nodes[0].since_s, posted.written_s) == (101.0, moment[0])
    assert posted.served(moment[0] + board.STALE_S - 1)
    assert not posted.served(moment[0] + board.STALE_S)
    here.write(here.news(serving=False))
    assert not read_board(tmp_path / BOARD).served(moment[0])


def test_a_server_that_cannot_post_says_so_once_and_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    here = Board(tmp_path / "nowhere" / BOARD, said.append)
    for state in ("away", "up"):
        here.see(0, state)
        here.write(here.news())
    assert len(said) == 1
    assert "cannot write" in said[0]
    assert "sees no news of the nodes" in said[0]


# --- in the terminal ------------------------------------------------------------------------------------------------------


def test_each_state_is_shown_with_its_seconds_in_eighty_columns(ran: Path, tmp_path: Path) -> None:
    now = watch.look(pilot(tmp_path, ran, nodes_now()), FREE)
    text = shown(now, ("nodes_late<=1", "accuracy>=0.1"))
    lines = [re.sub(r"[│┃ ]+", " ", line).split() for line in text.splitlines()]
    assert all(len(line) <= 80 for line in text.splitlines()), text
    assert "measured J, model J" in text  # which have no room
    rows = {line[0]: line[1:6] for line in lines if line and line[0].startswith("device-")}
    assert rows == {
        "device-0": ["up", "2", "3.75", "3.5", "0.1.0"],
        "device-1": ["late", "1", "8", "3.5", "0.1.0"],
        "device-2": ["silent", "2", "-", "-", "0.1.0"],
        "device-3": ["refused", "3", "-", "-", "0.1.0"],
        "device-4": ["away", "4", "-", "-", "0.1.0"],
    }
    flat = " ".join(text.split())
    assert "round 3 of 3, not running; accuracy" in flat
    assert "1 up, 1 late, 1 silent, 1 refused, 1 away" in flat
    assert "limits: nodes_late<=1, accuracy>=0.1" in flat


def test_joules_that_were_measured_stand_beside_those_of_the_model(ran: Path, tmp_path: Path) -> None:
    """Where nothing was measured it says so, in words, and in null for programs: no zero and no figure of the model's."""
    now = watch.look(pilot(tmp_path, ran, nodes_now()), FREE)
    lines = [re.sub(r"[│┃ ]+", " ", line).strip() for line in shown(now, columns=160).splitlines()]
    ends = {line.split()[0]: line for line in lines if line.startswith("device-")}
    assert ends["device-0"].endswith(" 12.5 rapl 0.25")
    assert ends["device-1"].endswith("for a reason not measured -")
    assert ends["device-2"].endswith("for a reason - -")
    assert now.fleet
    keys = ("measured_joules", "measured_joules_of", "modelled_joules")
    assert [tuple(node[key] for key in keys) for node in now.fleet.plain()[:2]] == [(12.5, "rapl", 0.25), (None,) * 3]
    found = metrics(Seen("pilot", now, []).metrics())
    assert found["fedprune_node_measured_joules"] == {(("node", "device-0"), ("of", "rapl")): 12.5}
    assert found["fedprune_node_modelled_joules"] == {(("node", "device-0"),): 0.25}
    assert "idling included" in Tags(Seen("pilot", now, []).page()).text


@pytest.mark.parametrize(
    "joules", [{"joules": -1.0, "joules_of": "rapl"}, {"joules": 1.0}, {"joules": "x", "joules_of": "rapl"},
               {"joules": 1.0, "joules_of": "guess"}, {"modelled": {"joules": "x"}}],
)  # fmt: skip
def test_joules_that_cannot_be_are_a_damaged_line(tmp_path: Path, joules: dict[str, object]) -> None:
    row = {"device": 0, "compute_s": 1.0, "modelled": {}, **joules}
    (tmp_path / folder.TIMINGS).write_text(json.dumps({"round": 1, "nodes": [row]}) + "\n")
    with pytest.raises(CheckpointError, match="damaged"):
        fleet.last_costs(tmp_path)


def test_where_there_is_no_terminal_each_change_is_a_line(ran: Path, tmp_path: Path) -> None:
    nodes = nodes_now()
    first = watch.look(pilot(tmp_path, ran, nodes), FREE)
    assert len(first.lines(None)) == 1 + len(STATES)
    assert first.lines(first) == []
    later = watch.look(pilot(tmp_path, ran, (*nodes[:4], dataclasses.replace(nodes[4], state="up", why=""))), FREE)
    summary, changed = later.lines(first)
    assert "2 up, 1 late, 1 silent, 1 refused" in summary
    assert re.fullmatch(r"device-4: up since \d\d:\d\d:\d\d", changed)


def test_before_there_is_a_run_the_pilot_says_who_is_missing(tmp_path: Path) -> None:
    now = watch.look(pilot(tmp_path, None, nodes_now()), FREE)
    assert now.words() == "no run yet: the server waits for its nodes; 1 up, 1 late, 1 silent, 1 refused, 1 away"
    assert now.held
    gone = watch.look(pilot(tmp_path, None, nodes_now(), ago_s=board.STALE_S + 1), FREE)
    assert not gone.held
    assert "nobody serves them now" in gone.words()


def test_timings_are_read_from_their_end(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {device: one.round for device, one in fleet.last_costs(ran).items()} == {0: 2, 1: 1}
    monkeypatch.setattr(fleet, "TAIL_BYTES", 300)  # in which the first line begins nowhere
    assert {device: one.round for device, one in fleet.last_costs(ran).items()} == {0: 2}
    assert fleet.last_costs(ran / "nowhere") == {}


# --- limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "broken"),
    [("nodes_late<=1", ""), ("nodes_late<=0", "nodes_late<=0 is broken after round 3: 1 (device-1 late: for a reason)"),
     ("nodes_silent<=0", "(device-2 silent: for a reason)"), ("nodes_up>=1", ""), ("nodes_up>=2@3", "device-4 away"),
     ("nodes_refused<=0", "device-3 refused"), ("nodes_away<=1", "")],
)  # fmt: skip
def test_limits_of_nodes(ran: Path, tmp_path: Path, limit: str, broken: str) -> None:
    place = pilot(tmp_path, ran, nodes_now())
    seen = watch.watch(place, [parse_limit(limit)], FREE, once=True)
    if not broken:
        assert len(list(seen)) == 1
        return
    with pytest.raises(LimitError) as error:
        list(seen)
    assert broken in str(error.value)


def test_a_node_that_is_back_at_once_breaks_no_limit(ran: Path, tmp_path: Path) -> None:
    away = Standing(0, "away", time.time() - 1, 1, "gone")
    place = pilot(tmp_path, ran, (away,))
    limits = [parse_limit("nodes_away<=0"), parse_limit("nodes_up>=1")]
    assert len(list(watch.watch(place, limits, FREE, once=True))) == 1
    pilot(tmp_path, ran, (dataclasses.replace(away, since_s=away.since_s - fleet.GRACE_S),))
    with pytest.raises(LimitError, match=r"nodes_away<=0 is broken.*nodes_up>=1 is broken"):
        list(watch.watch(place, limits, FREE, once=True))
    pilot(tmp_path, ran, (dataclasses.replace(away, since_s=1.0),), ago_s=60)  # nobody is there who would know
    assert len(list(watch.watch(place, limits, FREE, once=True))) == 1


def test_limits_of_nodes_need_nodes(ran: Path) -> None:
    with pytest.raises(ConfigError, match="has no nodes that are served"):
        list(watch.watch(ran, [parse_limit("nodes_late<=1")], FREE, once=True))
    with pytest.raises(ConfigError, match="Did you mean 'nodes_late'"):
        parse_limit("node_late<=1")


def test_a_pilot_that_nobody_serves_is_left(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    clock = itertools.count(1.0, 30.0)
    with pytest.raises(
        CheckpointError, match=r"interrupted after round 3; `fedprune serve .*pilot`, as it was called before"
    ):
        list(watch.watch(pilot(tmp_path, ran, nodes_now()), [], FREE, once=False, clock=lambda: next(clock)))
    with pytest.raises(CheckpointError, match="nobody serves this pilot"):
        list(watch.watch(pilot(tmp_path, None, (), ago_s=60), [], FREE, once=False, clock=lambda: next(clock)))


# --- the page, Prometheus, the webhook --------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Collects a page's tags, the addresses in them, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def metrics(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Returns the samples in Prometheus' text format by name and labels, read strictly."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    typed = ""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# "):
            _, kind, name, words = line.split(" ", 3)
            assert (kind, words) == ("TYPE", "gauge") or kind == "HELP"
            assert kind == "HELP" or name == typed
            assert name not in found or kind == "TYPE"
            typed, found[name] = name, {}
            continue
        parts = re.fullmatch(r'([a-z_0-9]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)', line)
        assert parts, line
        assert parts[1] == typed
        labels = re.findall(r'([a-z]+)="((?:[^"\\]|\\.)*)"', parts[2] or "")
        plain = tuple((key, re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value)) for key, value in labels)
        found[typed][plain] = float(parts[3])
    return found


def fetched(address: window.Address, path: str) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer, answer.read().decode()


def test_the_page_and_the_metrics_show_what_is_seen(ran: Path, tmp_path: Path) -> None:
    now = watch.look(pilot(tmp_path, ran, nodes_now()), FREE)
    limits = [parse_limit("nodes_late<=0"), parse_limit("accuracy>=0.1")]
    with window.window(parse_address("0")) as here:
        assert here.address.host == "127.0.0.1"
        assert fetched(here.address, "/")[0].status == 503
        here.seen = Seen("pilot", dataclasses.replace(now, broken=("nodes_late<=0 is broken",)), limits)
        answer, page = fetched(here.address, "/")
        assert answer.headers["Refresh"] == str(window.REFRESH_S)
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        answer, text = fetched(here.address, "/metrics?x=1")
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert fetched(here.address, "/etc/passwd")[0].status == 404
    seen = Tags(page)
    assert not {"script", "iframe", "form", "img"} & set(seen.tags)
    assert set(seen.addresses) == {"data:,"}
    for words in ("device-3", "refused", "for a reason", "3.75", "nodes_late<=0 is broken", "accuracy>=0.1"):
        assert words in seen.text
    found = metrics(text)
    last = now.rows[-1]
    assert found["fedprune_accuracy"][()] == last["accuracy"]
    assert found["fedprune_simulated_seconds"][()] == last["simulated_s"]
    assert found["fedprune_mean_ratio"][()] == last["mean_ratio"]
    assert found["fedprune_round"][()] == found["fedprune_rounds_planned"][()] == 3
    up = {labels: value for labels, value in found["fedprune_node_state"].items() if value}
    assert up == {(("node", f"device-{k}"), ("state", state)): 1.0 for k, state in enumerate(STATES)}
    assert found["fedprune_node_measured_seconds"] == {(("node", "device-0"),): 3.75, (("node", "device-1"),): 8.0}
    assert found["fedprune_node_modelled_seconds"][("node", "device-0"),] == 3.5
    assert found["fedprune_limit_broken"] == {(("limit", "nodes_late<=0"),): 1.0, (("limit", "accuracy>=0.1"),): 0.0}
    assert found["fedprune_served"][()] == 1


def test_what_nodes_say_of_themselves_is_escaped(ran: Path, tmp_path: Path) -> None:
    now = watch.look(pilot(tmp_path, ran, nodes_now(machine=HOSTILE, why=HOSTILE)), FREE)
    seen = Seen(HOSTILE, now, [])
    tags = Tags(seen.page())
    assert "script" not in tags.tags
    assert "<script>alert(1)" in tags.text
    infos = metrics(seen.metrics())["fedprune_node_info"]
    assert all(dict(labels)["machine"] == HOSTILE for labels in infos)
    assert "\x1b[2J" not in shown(now)
    ran_ = fedprune("watch", str(tmp_path / "pilot"), "--once")
    assert ran_.returncode == 0, ran_.stderr
    assert "\x1b" not in ran_.stdout
    assert ran_.stdout.count("\n") == 1 + len(STATES)


def test_a_simulation_has_a_page_too(ran: Path) -> None:
    seen = Seen("run", watch.look(ran, FREE), [])
    assert "device-0" not in seen.page()
    assert not any(name.startswith("fedprune_node") for name in metrics(seen.metrics()))


@pytest.mark.parametrize(("text", "host", "port"), [("9100", "127.0.0.1", 9100), (":9100", "127.0.0.1", 9100),
                                                    ("0.0.0.0:1", "0.0.0.0", 1), ("[::1]:80", "::1", 80), ("a.b:0", "a.b", 0)])  # fmt: skip
def test_where_a_page_is_served(text: str, host: str, port: int) -> None:
    assert parse_address(text) == window.Address(host, port)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "host:65536", "host:-1", "a b:80", "http://host:80", "::1:80", "host:80/x"]
)
def test_a_wrong_place_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST:PORT or PORT"):
        parse_address(text)


@contextlib.contextmanager
def listening(status: int) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Yields an address at which somebody answers with a status, and what was posted there."""
    came: list[dict[str, object]] = []

    class Ears(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Ears)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hooks/secret", came
    server.shutdown()
    server.server_close()


def test_a_broken_limit_is_told_once_and_watching_goes_on(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    place, limits = pilot(tmp_path, ran, nodes_now()), [parse_limit("nodes_late<=0")]
    clock = itertools.count(1.0)
    with listening(204) as (url, came):
        looks = watch.watch(place, limits, FREE, once=False, go_on=True, clock=lambda: next(clock))
        seen = outward(looks, "pilot", limits, None, url)
        next(seen)
        pilot(tmp_path, ran, nodes_now()[:2])
        assert next(seen).broken
        with pytest.raises(CheckpointError, match="interrupted"):  # and not the limit: that was long ago
            list(seen)
    (told,) = came
    assert told["watched"] == "pilot"
    assert told["broken"] == ["nodes_late<=0 is broken after round 3: 1 (device-1 late: for a reason)"]
    assert (told["round"], len(told["nodes"])) == (3, len(STATES))  # type: ignore[arg-type]


def test_a_webhook_that_fails_is_named_without_its_secret(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = watch.look(pilot(tmp_path, ran, nodes_now()), FREE)
    with listening(500) as (url, came):
        Webhook(url).tell("pilot", now, ["x"])
    Webhook(url).tell("pilot", now, ["x"])
    assert len(came) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "--webhook 127.0.0.1: Internal Server Error; watching goes on"
    assert second.endswith("Connection refused; watching goes on")
    assert "secret" not in first + second


@pytest.mark.parametrize(
    "url", ["", "ftp://host/x", "file:///etc/passwd", "https://", "http://host:x/", "http://ho st/", "http://h/\n"]
)
def test_a_wrong_webhook_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must be an address such as"):
        Webhook(url)


def test_mistakes_are_one_line(ran: Path, tmp_path: Path) -> None:
    place = str(pilot(tmp_path, ran, nodes_now()))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for words, code, text in (
            (("watch", place, "--serve", "nowhere"), 2, "--serve nowhere: must be HOST:PORT or PORT"),
            (("watch", place, "--serve", f"127.0.0.1:{taken.getsockname()[1]}"), 8, "Address already in use"),
            (("watch", "nowhere", "--serve", "0"), 5, "nowhere: No such file or directory"),
            (("watch", place, "--webhook", "http://127.0.0.1"), 2, "--webhook: needs a --limit"),
            (
                ("watch", place, "--webhook", "file:///etc/passwd", "--limit", "nodes_late<=1"),
                2,
                "--webhook: must be an address",
            ),
        ):
            result = fedprune(*words)
            assert (result.returncode, text in result.stderr) == (code, True), result.stderr
            assert result.stderr.count("\n") == 1 + ("served:" in result.stderr), result.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "ca.pem").touch()
    result = fedprune("watch", str(empty))
    assert (result.returncode, "nobody has served this pilot yet" in result.stderr) == (5, True), result.stderr


# --- a terminal that is none of rich's own -----------------------------------------------------------------------------------


def test_a_terminal_too_short_for_all_nodes_shows_those_in_trouble_and_renews_them(tmp_path: Path) -> None:
    """Of 40 nodes on 24 lines the last one alone is away: it stands first, and what changes is written over what was there."""

    def nodes(why: str) -> tuple[Standing, ...]:
        then = time.time() - 60
        return (*(Standing(k, "up", then, 1, "") for k in range(39)), Standing(39, "away", then, 1, why))

    place = pilot(tmp_path, None, nodes("unplugged"))
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {
        "TERM": "xterm-256color"
    }
    watching = subprocess.Popen(
        [sys.executable, "-m", "fedprune_cli", "watch", str(place)], stdin=its, stdout=its, stderr=its, env=env
    )
    os.close(its)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        ends_s = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < ends_s, seen
            if select.select([ours], [], [], 1.0)[0]:
                seen += os.read(ours, 65536)

    try:
        until(b"...")
        assert b"unplugged" in seen
        assert b"device-30" not in seen
        pilot(tmp_path, None, nodes("restarting"))
        seen = b""
        until(b"restarting")
        until(b"...")
        assert b"\x1b[1A" in seen  # back to the table's first line
        assert b"device-30" not in seen
    finally:
        watching.kill()
        watching.wait()
        os.close(ours)
