"""Secure sums over nodes: the simulator's bytes, what the server has of them, who is lost on the way, and what a node refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from conftest import make_experiment
from nodes.fleet import InProcessSite, begin, enrolled, free_port, places_of, result, simulate, stand

from fedprune_cli.audit.verify import verify_run
from fedprune_cli.errors import CheckpointError, ConfigError, DeviceError
from fedprune_cli.nodes import certificates, sum_member
from fedprune_cli.nodes.executor import Reply, Request
from fedprune_cli.nodes.limits import Limits
from fedprune_cli.nodes.pilot import Pilot
from fedprune_cli.nodes.post import Post, node_for
from fedprune_cli.nodes.protocol import read_from_server
from fedprune_cli.nodes.spent import Purse
from fedprune_cli.nodes.sum_keys import sign_keys
from fedprune_cli.nodes.sum_messages import KEYS, Question, read_question
from fedprune_cli.privacy.secure import RefusedSumError
from fedprune_cli.privacy.settings import Privacy
from fedprune_cli.runs import life
from fedprune_cli.store import folder
from fedprune_cli.store.files import Plain
from fedprune_cli.store.sealed import Sealed, unseal

SECURE = (
    "privacy.secure=true",
    "privacy.least=3",
    "privacy.public_scores=true",
    "devices.count=6",
    "deadline.fraction=0.4",
)


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@dataclasses.dataclass(frozen=True)
class Made:
    """A simulation, and the pilot of the same devices."""

    home: Path
    overrides: tuple[str, ...]

    def start(self, name: str, *more: str) -> tuple[life.Setup, InProcessSite]:
        """Returns the setup of the same run on nodes, whose folder has this name, and its site."""
        setup, config = begin(self.home / "pilot", self.home / name, [*self.overrides, *more])
        return setup, InProcessSite(places_of(self.home / "pilot"), config)


def make(home: Path, *more: str) -> Made:
    enrolled(home, simulate(home / "simulated", *SECURE, *more))
    return Made(home, (*SECURE, *more))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def made(first: Made, tmp_path: Path) -> Made:
    """Returns the same simulation and pilot, whose nodes have done nothing yet."""
    shutil.copytree(first.home, tmp_path / "home")
    return Made(tmp_path / "home", first.overrides)


@pytest.mark.parametrize(
    "more",
    [
        ("training.block=10",),
        pytest.param(
            ("training.block=1", "pruner.granularity=channel", "faults.die=0.1", "rounds=5"), marks=pytest.mark.slow
        ),
        pytest.param(("pruner=taylor", "failsafe.late=drop"), marks=pytest.mark.slow),
        pytest.param(("allocator=dense",), marks=pytest.mark.slow),
        pytest.param(("participation.rate=0.5", "rounds=6"), marks=pytest.mark.slow),  # too few in some rounds
        pytest.param(("method=local",), marks=pytest.mark.slow),  # nothing to sum
    ],
)
def test_a_secure_run_on_nodes_has_the_simulators_bytes(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Whatever is pruned, and by whom it is ranked: nodes draw their keys from their systems, and a sum is exact whoever masks it."""
    made = make(tmp_path, *more)
    setup, site = made.start("run")
    list(life.run(setup, made.home / "run", site=site))
    assert result(made.home / "run") == result(made.home / "simulated")
    records = [json.loads(line) for line in (made.home / "run" / folder.RECORDS).read_text().splitlines()]
    if "method=local" not in more:
        assert max(record["privacy"]["devices"] or 0 for record in records) >= 5
        assert records[0]["mean_ratio"] > 0 or "allocator=dense" in more
        timings = [json.loads(line) for line in (made.home / "run" / folder.TIMINGS).read_text().splitlines()]
        summed = [node["sum_s"] for one in timings for node in one["nodes"] if "sum_s" in node]
        lost = {10.0} if "faults.die=0.1" in more else set()  # of whom nobody asks who is left
        assert set(summed) == {15.0} | lost  # three exchanges of five seconds each, as the carrier says


@pytest.mark.slow
def test_over_grpc_too_and_a_node_that_wants_no_other_run_says_so(made: Made) -> None:
    """As threads of this process, each with a stream of its own and keys of its own; --secure is the node's own word."""
    setup, config = begin(made.home / "pilot", made.home / "run", [*made.overrides, "execution.kind=nodes"])
    port, said = free_port(), list[str]()
    site = Pilot(made.home / "pilot", f"127.0.0.1:{port}", said.append, config)
    for place in sorted((made.home / "pilot").glob("device-*")):
        threading.Thread(target=stand, args=(place, port), daemon=True).start()
    list(life.run(setup, made.home / "run", site=site))
    assert result(made.home / "run") == result(made.home / "simulated")
    places = places_of(made.home / "pilot")
    post = Post("", places[0].folder, places[0], True, said.append, Limits(secure=True))
    for override, told in (("privacy.secure=true", ""), ("privacy.secure=false", "this node joined with --secure")):
        _, other = begin(made.home / "pilot", made.home / override, [*made.overrides, override])
        with pytest.raises(ConfigError, match=told) if told else contextlib.nullcontext():
            node_for(post, Sealed({"kind": "run", "run": f"{setup.experiment.config_hash}-s0", "config": other}), None)


def open_purse(run: Path) -> Purse:
    """Returns what a node of a run without noise has to spend."""
    return Purse(run, Privacy(secure=True, least=3), 3)


def updates_on(wire: list[bytes]) -> Iterator[np.ndarray]:
    for message in map(unseal, wire):
        if message.header["kind"] == "update":
            yield message.arrays["values"]


def test_what_the_server_receives_is_uniform_and_tells_of_no_device(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what each device really put under its masks; and the whole of what is on the wire has none of it, and no seed."""
    put: list[bytes] = []
    seeds: list[bytes] = []
    mask_values, draw_secrets = sum_member.mask_values, sum_member.draw_secrets

    def masking(member: sum_member.Member, values: np.ndarray) -> np.ndarray:
        put.append(values.astype(np.int64).astype(np.uint32).tobytes())
        return mask_values(member, values)

    def drawing(threshold: int, draw: sum_member.Draw) -> sum_member.Secrets:
        drawn = draw_secrets(threshold, draw)
        seeds.extend([drawn.sealing, *(one.to_bytes(32, "little") for one in (*drawn.masking, *drawn.own))])
        return drawn

    monkeypatch.setattr(sum_member, "mask_values", masking)
    monkeypatch.setattr(sum_member, "draw_secrets", drawing)
    setup, site = made.start("run")
    list(life.run(setup, made.home / "run", site=site))
    assert len(put) == 6 * 3
    assert len(seeds) == 18 * (1 + 2 * 5)
    wire = b"\0".join(site.carrier.wire)
    for values in put:
        pieces = {values[at : at + 16] for at in range(0, len(values) - 16, 16)} - {bytes(16)}
        assert pieces
        assert not any(piece in wire for piece in pieces)
    assert not any(seed in wire for seed in seeds)
    words = np.concatenate([*updates_on(site.carrier.wire)])
    assert words.dtype == np.uint32
    counts = np.bincount(words >> 28, minlength=16)
    assert (
        (counts - len(words) / 16) ** 2 / (len(words) / 16)
    ).sum() < 50  # chi squared of 15 degrees of freedom: 1 in 10^5


def step_of(request: Request) -> str:
    """Returns what a device is asked: a step of the sum, or the work of a task."""
    header = unseal(request.write(None)[0]).header
    return str(header.get("step", header.get("work")))


class Lossy:
    """A carrier whose devices are away for some messages: `lost` names the device and the step, a training's being `task`."""

    def __init__(self, site: InProcessSite, lost: Mapping[tuple[int, str], int]) -> None:
        self.site, self.exchange_, self.left = site, site.carrier.exchange, dict(lost)

    def exchange(self, requests: Mapping[int, Request]) -> Mapping[int, Reply]:
        away = set()
        for device, request in requests.items():
            key = device, step_of(request)
            if self.left.get(key, 0):
                self.left[key] -= 1
                away.add(device)
        self.site.carrier.away = away
        return self.exchange_(requests)


@pytest.mark.parametrize("step", [SLOW("keys"), "shares", SLOW("block"), "unmask"])
def test_a_device_that_is_lost_at_any_step_is_one_that_died(made: Made, step: str) -> None:
    """In the first round, before or after the others have its shares; who is lost once it has handed in is still in the sum."""
    setup, site = made.start("run")
    lossy = Lossy(site, {(4, step): 1})
    site.carrier.exchange = lossy.exchange  # type: ignore[method-assign]
    records = list(life.run(setup, made.home / "run", site=site))
    assert lossy.left == {(4, step): 0}
    gone = step != "unmask"
    assert (records[0].faults.died if records[0].faults else []) == ([4] if gone else [])
    assert records[0].privacy
    assert records[0].privacy.devices == 6 - gone
    assert records[0].privacy.refused == ""
    if not gone:
        assert result(made.home / "run") == result(made.home / "simulated")
    else:
        assert records[1].faults is None


@pytest.mark.parametrize("step", ["keys", SLOW("unmask")])
def test_too_few_leave_u_as_it_was(made: Made, step: str) -> None:
    setup, site = made.start("run")
    lossy = Lossy(site, {(device, step): 1 for device in (0, 1)})
    site.carrier.exchange = lossy.exchange  # type: ignore[method-assign]
    rounds = life.run(setup, made.home / "run", site=site)
    before = folder.read_state(made.home / "run").state.shared
    record = next(rounds)
    assert record.privacy
    assert record.privacy.devices == 0
    assert record.privacy.refused.startswith(
        "4 of 6 devices are left, the threshold is 5"
        if step == "keys"
        else "4 of 6 devices answered, the threshold is 5"
    )
    assert folder.read_state(made.home / "run").state.shared.tobytes() == before.tobytes()
    assert next(rounds).privacy.devices == 6  # type: ignore[union-attr]
    assert verify_run(life.reopen(made.home / "run"), made.home / "run", 2).failures == ()


def stop_after(made: Made, setup: life.Setup, site: InProcessSite, step: str) -> InProcessSite:
    """Ends the server of a run in its next round, once its nodes have answered to this step; returns the site of its successor."""
    exchange = site.carrier.exchange

    def stopped(requests: Mapping[int, Request]) -> Mapping[int, Reply]:
        replies = exchange(requests)
        if step_of(next(iter(requests.values()))) == step:
            raise InterruptedError
        return replies

    site.carrier.exchange = stopped  # type: ignore[method-assign]
    with pytest.raises(InterruptedError):
        next(life.run(setup, made.home / "run", site=site))
    return InProcessSite(places_of(made.home / "pilot"), site.config)


@pytest.mark.slow
def test_killed_at_any_point_of_a_round_it_ends_with_the_same_bytes(made: Made) -> None:
    """The server forgets the sum that it was at, and nodes begin another one of the same round, or the same one again."""
    setup, site = made.start("run")
    for step in ("keys", "shares", "block", "unmask"):
        site = stop_after(made, setup, site, step)
    list(life.run(setup, made.home / "run", site=site))
    assert result(made.home / "run") == result(made.home / "simulated")


def test_a_sum_that_was_unmasked_is_not_made_again_without_one_of_its_devices(made: Made) -> None:
    """The server was killed before it had written the round down, and device 4 is gone since: the difference would be its change."""
    setup, site = made.start("run")
    site = stop_after(made, setup, site, "unmask")
    site.carrier.exchange = Lossy(site, {(4, "keys"): 1}).exchange  # type: ignore[method-assign]
    records = list(life.run(setup, made.home / "run", site=site))
    refused = [record.privacy.refused for record in records if record.privacy]
    assert refused == ["device 0: has helped with a sum of other devices of round 1 already", "", ""]


def asked_of_device_2(site: InProcessSite, kind: str) -> Sealed:
    """Returns the last message of a kind that the server sent to device 2."""
    messages = [message for message in map(unseal, site.carrier.wire) if message.header["kind"] == kind]
    return [message for message in messages if message.header.get("device") == 2][-1]


def begun(made: Made, step: str) -> tuple[Path, Question]:
    """Returns the folder of device 2 of a run that stopped after this step of its first round, and what it was asked last."""
    setup, site = made.start("run")
    stop_after(made, setup, site, step)
    run = f"{setup.experiment.config_hash}-s0"
    return made.home / "pilot" / "device-2" / run, read_question(asked_of_device_2(site, "sum"), run)


def test_a_node_helps_with_one_set_of_survivors_a_round_whatever_it_is_told(made: Made) -> None:
    """Not with another in the same sum, nor in a new one of the same round; the same once more is what it said before."""
    place, question = begun(made, "unmask")
    told = sum_member.answer(place, question)
    assert sum_member.answer(place, question) == told
    fewer = dataclasses.replace(question, survivors=question.survivors[:-1])
    with pytest.raises(RefusedSumError, match="has answered for other survivors of round 1 already"):
        sum_member.answer(place, fewer)
    again = dataclasses.replace(
        question, step="keys", attempt="another", terms=dataclasses.replace(question.terms, context=b"another")
    )
    sum_member.answer(place, again)
    memory = sum_member.read_memory(place)
    assert memory
    assert memory.helped
    assert memory.helped.survivors == question.survivors
    for devices in ((0, 1, 2, 3, 4), (1, 2, 3)):  # a sum of fewer beside that of all
        few = dataclasses.replace(again.terms, devices=devices, counts=(9,) * len(devices), threshold=3)
        with pytest.raises(RefusedSumError, match="has helped with a sum of other devices of round 1 already"):
            sum_member.answer(place, dataclasses.replace(again, attempt="third", terms=few))
    part = sum_member.Part(2, 0, "another", np.zeros(memory.terms.count(2)), 1, open_purse(place))
    keyed = dict.fromkeys(memory.terms.devices, bytes(64))
    sum_member.write_memory(place, dataclasses.replace(memory, keys=keyed))
    with pytest.raises(RefusedSumError, match="other values of round 1 than before"):
        sum_member.masked_change(place, part)
    back = dataclasses.replace(again, number=0)
    sum_member.write_memory(place, dataclasses.replace(memory, number=3))
    with pytest.raises(RefusedSumError, match="has taken part in round 4 of this run, and does not go back to 1"):
        sum_member.answer(place, back)


def test_a_node_never_puts_two_changes_under_the_same_masks(made: Made) -> None:
    place, question = begun(made, "block")
    memory = sum_member.read_memory(place)
    assert memory
    count = memory.terms.count(2)
    part = sum_member.Part(2, 0, memory.attempt, np.full(count, 0.5), 1, open_purse(place))
    with pytest.raises(RefusedSumError, match="other values of round 1 than before"):
        sum_member.masked_change(place, part)
    for other in ({"attempt": ""}, {"attempt": "another"}, {"number": 1}):
        with pytest.raises(RefusedSumError, match="for a sum that it has not begun"):
            sum_member.masked_change(place, dataclasses.replace(part, **other))  # type: ignore[arg-type]
    assert (place / "sum").stat().st_mode & 0o077 == 0
    with pytest.raises(RefusedSumError, match="asked for the unmask of a sum that it has not begun"):
        sum_member.answer(place, dataclasses.replace(question, step="unmask", number=1))
    (place / "sum" / sum_member.FILE).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"secrets\.safetensors: damaged"):
        sum_member.read_memory(place)


def test_a_task_that_wants_more_than_masked_values_gets_none(made: Made) -> None:
    """Rounded values have a code of their own, a task of another round has other samples, and one without steps adds nothing."""
    setup, site = made.start("run")
    stop_after(made, setup, site, "block")
    node, sealed = site.carrier.nodes[2], asked_of_device_2(site, "task")
    reversed_ = {"levels": sealed.arrays["levels"][::-1]}

    def told(header: Mapping[str, Plain], arrays: Mapping[str, np.ndarray]) -> Sealed:
        message = Sealed({**sealed.header, **header}, {**sealed.arrays, **arrays})
        return unseal(node.respond("x", node.read(read_from_server(message.encode()), None)[0]))

    wrong: tuple[tuple[dict[str, Plain], str], ...] = (
        ({"bits": 16}, "without masks"), ({"attempt": None}, "without masks"), ({"attempt": "another"}, "has not begun"),
        ({"round": 1, "base": 0}, "has not begun"),
    )  # fmt: skip
    for header, why in wrong:
        answer = told(header, {})
        assert answer.header["kind"] == "refused"
        assert why in str(answer.header["why"])
        assert not answer.arrays
    assert told({"attempt": ""}, {}).arrays["values"].size == 0
    right = told({}, {})
    assert right.header["kind"] == "update"
    assert right.arrays.keys() == {"values"}
    assert told({}, {}).arrays["values"].tobytes() == right.arrays["values"].tobytes()
    assert "other values of round 1 than before" in str(told({"schedule": []}, {}).header["why"])
    assert "other values of round 1 than before" in str(told({}, reversed_).header["why"])
    levels = sealed.arrays["levels"]
    for arrays, why in (
        # of which each row would be under the same masks
        ({"levels": np.stack([levels] * len(levels))}, "levels of another number"),
        ({"values": sealed.arrays["values"] * np.float32(np.inf)}, "of a u that is not finite"),
    ):
        with pytest.raises(ValueError, match=why):
            told({}, arrays)


def test_a_node_hands_in_nothing_else_in_a_round_also_in_another_of_its_sums(made: Made) -> None:
    """Which it need not have helped to unmask: with the others' values as they were, the difference would be its own."""
    place, question = begun(made, "block")
    for attempt in ("another", "third"):
        terms = dataclasses.replace(question.terms, context=attempt.encode())
        sum_member.answer(place, dataclasses.replace(question, step="keys", attempt=attempt, terms=terms, parcels={}))
        memory = sum_member.read_memory(place)
        assert memory
        assert (memory.masked, bool(memory.earlier), memory.helped) == ("", True, None)
        sum_member.write_memory(place, dataclasses.replace(memory, keys=dict.fromkeys(memory.terms.devices, bytes(64))))
        part = sum_member.Part(2, 0, attempt, np.full(memory.terms.count(2), 0.5), 1, open_purse(place))
        with pytest.raises(RefusedSumError, match="other values of round 1 than before"):
            sum_member.masked_change(place, part)


def test_a_node_that_lost_its_secrets_is_out_of_the_sum_and_nobody_else(made: Made) -> None:
    setup, site = made.start("run")
    exchange = site.carrier.exchange

    def forgetting(requests: Mapping[int, Request]) -> Mapping[int, Reply]:
        replies = exchange(requests)
        if requests and step_of(requests[0]) == "keys" and len(requests) == 6:
            for path in (made.home / "pilot" / "device-2").glob("*/sum/*"):
                path.unlink()
        return replies

    site.carrier.exchange = forgetting  # type: ignore[method-assign]
    record = next(life.run(setup, made.home / "run", site=site))
    assert record.faults
    assert record.faults.died == [2]
    assert record.privacy
    assert (record.privacy.devices, record.privacy.refused) == (5, "")


def test_a_second_run_of_one_seed_makes_no_sums_on_the_same_pilot(made: Made) -> None:
    said, pilot = list[str](), made.home / "pilot"
    site = Pilot(pilot, "", said.append)
    for run, seed in (("a-s0", 0), ("a-s0", 0), ("a-s1", 1)):
        site._keep_apart(run, seed)
    assert "pilot/ca.key is here: whoever has it can sign as any device" in said[0]
    with pytest.raises(ConfigError, match="seed=0: a-s0 of this pilot has made secure sums with it"):
        site._keep_apart("b-s0", 0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"least": 2}, "hides nobody"),
        ({"threshold": 3}, "hides nobody"),
        ({"devices": (2, 3, 4), "counts": (5, 5, 9), "threshold": 3}, "an entry would be the sum of 1 devices"),
    ],
)
def test_a_node_begins_no_sum_that_hides_nobody(made: Made, change: dict[str, object], told: str) -> None:
    place, question = begun(made, "keys")
    terms = dataclasses.replace(question.terms, context=b"another", **change)  # type: ignore[arg-type]
    with pytest.raises(RefusedSumError, match=told):
        sum_member.answer(place, dataclasses.replace(question, terms=terms))


def test_keys_that_the_server_made_up_stop_the_run_by_name(made: Made) -> None:
    """With the certificate of another pilot, to stand between devices 1 and the others."""
    certificates.begin(made.home / "strange", ["localhost"], 1)
    strange = certificates.read_identity(certificates.enroll(made.home / "strange", 1, 1))
    setup, site = made.start("run")
    exchange = site.carrier.exchange

    def forging(requests: Mapping[int, Request]) -> Mapping[int, Reply]:
        replies = dict(exchange(requests))
        if requests and step_of(requests[1]) == "keys":
            question = read_question(read_from_server(requests[1].write(None)[0]), f"{setup.experiment.config_hash}-s0")
            signed = sign_keys(strange, question.terms, bytes(range(64)))
            parcels = {name: getattr(signed, name) for name in KEYS}
            replies[1] = dataclasses.replace(replies[1], result=parcels)
        return replies

    site.carrier.exchange = forging  # type: ignore[method-assign]
    with pytest.raises(
        DeviceError, match="the keys of device-1 are not its own: no certificate of this pilot signed them"
    ):
        list(life.run(setup, made.home / "run", site=site))


def test_a_question_of_another_form_is_refused(made: Made) -> None:
    _, question = begun(made, "keys")
    header = dict(unseal(question.encode()).header)
    for bad in (
        {"step": "all"},
        {"bits": 40},
        {"largest": 0.0},
        {"counts": [1]},
        {"devices": [-1, 0, 1, 2, 3, 4]},
        {"attempt": "a" * 65},
        {"curious": -1},
        {"curious": 2**40},
        {"lengths": [1]},
        {"lengths": [1, -1]},
        {"lengths": [0, 0]},
        {"step": "unmask", "devices": [0, 0], "counts": [1, 1], "device": 1, "lengths": [0, 0]},
    ):
        with pytest.raises(ValueError, match="of a secure sum"):
            read_question(
                read_from_server(Sealed({**header, **bad}, {"parcels": np.zeros(0, np.uint8)}).encode()), "run"
            )
    with pytest.raises(ValueError, match="not a message"):
        read_from_server(Sealed({**header, "survivors": ["1"]}).encode())


def test_a_servers_noise_and_hidden_scores_are_refused_on_nodes() -> None:
    nodes = ("execution.kind=nodes", "privacy.secure=true", "devices.count=8")
    with pytest.raises(
        ConfigError,
        match=r"execution\.kind=nodes: not with privacy\.secure=true: each node's test reaches the server by itself",
    ):
        make_experiment(*nodes)
    with pytest.raises(
        ConfigError, match=r"execution\.kind=nodes: not with privacy\.dp=client: the server's noise would follow"
    ):
        make_experiment(
            nodes[0], "privacy.dp=client", "privacy.epsilon=3", "privacy.delta=1e-3", "privacy.clip=1", "weights=uniform",
            "privacy.public_scores=true",
        )  # fmt: skip
    make_experiment(*nodes, "privacy.public_scores=true")
