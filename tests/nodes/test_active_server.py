"""What a server may ask of a node under noise: each way around it that a hostile review found is refused, or paid for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from conftest import TINY, composed, fedprune, make_experiment, make_setup
from nodes.fleet import enrolled, places_of

from fedprune_cli.config.plain import plain
from fedprune_cli.errors import CheckpointError, ConfigError
from fedprune_cli.learn.client import Task, Update
from fedprune_cli.learn.kept import Whole
from fedprune_cli.learn.private import Noised, noised_mean
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.nodes import sum_member
from fedprune_cli.nodes.data import read_samples, write_samples
from fedprune_cli.nodes.limits import Limits, remembered
from fedprune_cli.nodes.node import Node
from fedprune_cli.nodes.orders import Order
from fedprune_cli.nodes.post import Post, node_for
from fedprune_cli.nodes.protocol import read_from_server
from fedprune_cli.nodes.spent import SPENT, Purse, SpentError
from fedprune_cli.privacy.accounting import Release
from fedprune_cli.privacy.fixed import FixedPoint
from fedprune_cli.privacy.secure import RefusedSumError, Secrets, Terms
from fedprune_cli.privacy.settings import Privacy
from fedprune_cli.rng import stream
from fedprune_cli.store.files import Plain
from fedprune_cli.store.lock import locked
from fedprune_cli.store.sealed import Sealed, unseal

COMMON = ("privacy.epsilon=50", "privacy.delta=1e-3", "privacy.public_scores=true", "weights=uniform", "rounds=3")
EXAMPLE = (
    *COMMON,
    "privacy.dp=example",
    "privacy.clip=1",
    "privacy.public_samples=true",
    "devices.count=3",
    "privacy.noise=30",
)
CLIENT = (*COMMON, "privacy.dp=client", "privacy.secure=true", "privacy.least=3", "privacy.clip=0.5", "devices.count=6")
RUN = "0123456789ab-s0"


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return enrolled(tmp_path_factory.mktemp("made"), make_setup("devices.count=3"))


@pytest.fixture
def place(pilot: Path, tmp_path: Path) -> Path:
    """Returns the folder of a node that has done nothing yet."""
    shutil.copytree(pilot / "device-0", tmp_path / "device-0")
    return tmp_path / "device-0"


def node_of(place: Path, overrides: Sequence[str], name: str = RUN, limits: Limits | None = None) -> Node:
    """Returns the node of a run whose configuration is whatever the server says."""
    return told(place, plain(composed(*TINY, *overrides), resolve=True), name, limits)


def told(place: Path, config: dict[str, Plain], name: str = RUN, limits: Limits | None = None) -> Node:
    post = Post("", place, replace(places_of(place.parent)[0], folder=place), False, lambda _: None, limits or Limits())
    return node_for(post, Sealed({"kind": "run", "run": name, "config": config}), None)


def order(node: Node, *schedule: LocalPhase, noise: float | None = 30.0, **more: object) -> Order:
    """Returns a task as the node reads it from the server's message."""
    work, attempt, base = more.pop("work", "train"), more.pop("attempt", None), more.pop("base", 0)
    u = more.pop("u", node.learner.parts.shared.numpy().copy())
    task = Task("training", 0, 0, np.asarray(u, np.float32), np.zeros(1, np.float32), Whole(), schedule)
    made = Order(str(work), replace(task, **more), int(str(base)), None if attempt is None else str(attempt))  # type: ignore[arg-type]
    message = unseal(made.encode(node.learner.layout, None)[0])
    read, _ = node.read(read_from_server(Sealed({**message.header, "noise": noise}, message.arrays).encode()), None)
    assert isinstance(read, Order)
    return read


def made_of(node: Node, task: Order) -> Update:
    result = node.answer("", task).result  # type: ignore[union-attr]
    assert isinstance(result, Update)
    return result


def paid(place: Path, run: str = RUN) -> int:
    return len(json.loads((place / run / SPENT).read_text())["tasks"])


def test_a_server_that_calls_itself_a_simulation_is_held_to_what_nodes_may_be_asked(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = [one for one in CLIENT if not one.startswith("privacy.secure")]
    with pytest.raises(ConfigError, match="the server's noise would follow from the seed"):
        node_of(place, clear)
    with pytest.raises(ConfigError, match="each node's test reaches the server by itself"):
        node_of(place, [*CLIENT, "privacy.public_scores=false"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"training\.device=cuda: not with privacy\.dp on nodes"):
        node_of(place, [*CLIENT, "training.device=cuda"])
    config = plain(composed(*TINY, *EXAMPLE), resolve=True)
    with pytest.raises(ConfigError, match="refers to something outside it"):
        told(place, config | {"name": "${oc.env:HOME}"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": [["both", 50, 10, 0], ["personal", -5, 1, 0]]},
        {"schedule": [["both", 50, 0, 0]]},
        {"schedule": [["both", 50, -10, 0]]},
        {"schedule": [["both", 50, 10, -1]]},
        {"round": -1},
        {"base": -1},
        {"bits": 3},
    ],
)
def test_no_step_is_taken_back_so_that_nobody_pays_for_it(place: Path, wrong: dict[str, Plain]) -> None:
    node = node_of(place, EXAMPLE)
    task = Task("training", 0, 0, node.learner.parts.shared.numpy(), np.zeros(1, np.float32), Whole(), ())
    message = unseal(Order("train", task, 0).encode(node.learner.layout, None)[0])
    with pytest.raises(ValueError, match="not a"):
        node.read(read_from_server(Sealed({**message.header, **wrong}, message.arrays).encode()), None)


@pytest.mark.parametrize("noise", [0.0, 1e-12, -1e-12, -30.0, 1e30])
def test_noise_that_is_none_is_not_trained_with(place: Path, noise: float) -> None:
    node = node_of(place, EXAMPLE)
    count = len(node.learner.train[0])
    with pytest.raises(SpentError, match="is nothing that it can reckon with"):
        node.answer("", order(node, LocalPhase("both", count, count), noise=noise))
    assert paid(place) == 0
    with pytest.raises(SpentError, match="is nothing that it can reckon with"):
        node.purse.spend(Release(float("nan"), 1.0, 1), "entry")


def test_noise_that_wraps_around_in_the_sum_is_refused(place: Path) -> None:
    node = node_of(place, CLIENT)
    terms = Terms((0, 1, 2, 3, 4, 5), (9,) * 6, 5, 3, b"")
    memory = sum_member.Memory(0, "a", terms, FixedPoint(0.5, 18), Secrets(b"", (), ()), noise=1e30)
    part = sum_member.Part(0, 0, "a", np.zeros(9), 10, node.purse)
    with pytest.raises(RefusedSumError, match="does not fit the sum's whole numbers"):
        sum_member._whole(memory, part)
    assert paid(place) == 0


def test_the_noise_of_a_sum_is_another_one_where_anything_about_it_is(place: Path) -> None:
    """Two sums of one round, with shares of the noise of another width, would otherwise tell the sum without noise."""
    node = node_of(place, CLIENT)
    terms, part = (
        Terms((0, 1, 2, 3, 4, 5), (9,) * 6, 5, 3, b""),
        sum_member.Part(0, 0, "a", np.full(9, 0.01), 10, node.purse),
    )
    memory = sum_member.Memory(0, "a", terms, FixedPoint(0.5, 18), Secrets(b"", (), ()), noise=4.0)
    first = sum_member._whole(memory, part)
    np.testing.assert_array_equal(sum_member._whole(memory, part), first)
    assert paid(place) == 1
    scale = [
        sum_member._whole(replace(memory, terms=replace(terms, **other)), part)
        for other in ({"least": 6}, {"threshold": 6, "least": 6})
    ]
    assert paid(place) == 3
    for other in scale:
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.99


def test_the_noise_of_steps_is_another_one_for_another_v(place: Path) -> None:
    """The round that v_k is of does not say what it is: a server can have the same round made twice."""
    node = node_of(place, (*EXAMPLE, "training.weight_decay=0"))
    count = len(node.learner.train[0])
    asked = order(node, LocalPhase("shared", count, count), base=1, round=1)
    updates = []
    for value in (0.0, 1.0):
        node.versions.write(1, np.full_like(node.versions.initial, value))
        updates.append([made_of(node, asked).shared for _ in range(2)])
    for once, again in updates:
        np.testing.assert_array_equal(once, again)
    assert paid(place) == 2
    change = [pair[0] - asked.task.shared for pair in updates]
    assert abs(np.corrcoef(change[0], change[1])[0, 1]) < 0.2


def test_a_run_keeps_the_configuration_and_the_samples_that_it_began_with(place: Path) -> None:
    node_of(place, EXAMPLE)
    node_of(place, (*EXAMPLE, "out=elsewhere"))  # where and how it is executed decides nothing
    for other in (
        (*EXAMPLE, "seed=7"),
        (*EXAMPLE, "privacy.epsilon=0.002"),
        (*EXAMPLE, "training.lr=0.3"),
        (*EXAMPLE, "privacy.clip=2"),
    ):
        with pytest.raises(CheckpointError, match="began with another configuration or other samples"):
            node_of(place, other)
    samples = read_samples(place)
    samples.inputs[0] = 0
    write_samples(place, samples)
    with pytest.raises(CheckpointError, match="began with another configuration or other samples"):
        node_of(place, EXAMPLE)
    node_of(place, EXAMPLE, "aaaaaaaaaaaa-s0")


def test_a_run_whose_ledger_is_gone_is_refused(place: Path) -> None:
    node = node_of(place, EXAMPLE)
    node.answer("", order(node, LocalPhase("both", 50, 10)))
    (place / RUN / SPENT).unlink()
    with pytest.raises(CheckpointError, match="without it the node forgets what it has spent"):
        node_of(place, EXAMPLE)
    shutil.rmtree(place / RUN)
    node_of(place, EXAMPLE)
    ledger = json.loads((place / RUN / SPENT).read_text())
    for bad in ({"epsilon": -5.0}, {"delta": 0.0}, {"more": 1}, {"release": {"noise": 1.0}}):
        (place / RUN / SPENT).write_text(json.dumps(ledger | bad))
        with pytest.raises(CheckpointError, match="damaged"):
            node_of(place, EXAMPLE)


def test_a_clip_is_one_in_float32_and_what_is_not_finite_counts_for_nothing() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.clip=1e-07: must be in \[1e-06, 1e\+06\]"):
        make_experiment(*EXAMPLE, "privacy.clip=1e-7")
    gradients = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32))
    bad = gradients.clone()
    bad[1, 0, 0], bad[2, 1, 1] = float("inf"), float("nan")
    noised = Noised(0.5, 1e-9)
    got = noised_mean([bad], 4, noised, stream(0, "privacy_noise"))[0]
    want = noised_mean([gradients[[0, 3]]], 4, noised, stream(0, "privacy_noise"))[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_nothing_tells_that_a_protected_device_diverged(place: Path) -> None:
    node = node_of(place, CLIENT)
    huge = order(
        node, LocalPhase("both", 50, 10), noise=None, attempt="", u=np.full(node.learner.parts.shared.numel(), 1e38)
    )
    answer = node.answer("", huge)
    assert answer.moved  # type: ignore[union-attr]
    assert answer.result.train_loss is None  # type: ignore[union-attr]
    np.testing.assert_array_equal(node.versions.read(1), node.versions.read(0))


def test_no_loss_is_told_where_nothing_is_paid_and_tests_are_counted(place: Path) -> None:
    node = node_of(place, CLIENT)
    assert made_of(node, order(node, LocalPhase("shared", 1, 1), noise=None, attempt="")).train_loss is None
    u = node.learner.parts.shared.numpy().copy()
    for _ in range(2):
        for number in range(13):  # of three rounds, and ten that are made again
            node.answer("", order(node, noise=None, work="test", u=u + number))
    for schedule in ((), (LocalPhase("personal", 50, 10),)):
        with pytest.raises(SpentError, match="has tested 13 models of a run of 3 rounds, and no more"):
            node.answer("", order(node, *schedule, noise=None, work="test", u=u + 99))
    with pytest.raises(RefusedSumError, match="is to train the shared part for a test"):
        node.answer("", order(node, LocalPhase("both", 50, 10), noise=None, work="test"))
    assert paid(place) == 0


def test_no_loss_of_a_protected_device_is_told_even_for_nothing_that_it_hands_in(place: Path) -> None:
    node = node_of(place, CLIENT)
    for schedule in ((LocalPhase("personal", 50, 10),), (LocalPhase("both", 50, 10),)):
        made = node.answer("", order(node, *schedule, noise=None, attempt=""))
        assert unseal(made.encode()).header["train_loss"] is None


def test_whether_a_node_answers_does_not_depend_on_its_data(place: Path, tmp_path: Path) -> None:
    """Else a server could ask until it does not, and learn of a gradient whether it is zero: two nodes of other samples say the same."""
    shutil.copytree(place, tmp_path / "other" / "device-0")
    samples = read_samples(place)
    write_samples(tmp_path / "other" / "device-0", replace(samples, inputs=np.zeros_like(samples.inputs)))
    nodes = [node_of(where, CLIENT) for where in (place, tmp_path / "other" / "device-0")]
    start = nodes[0].learner.parts.shared.numpy().copy()
    answers: list[list[str]] = [[], []]
    for told, node in zip(answers, nodes, strict=True):
        rng = np.random.default_rng(1)
        for number in range(60):
            u = start * (number % 7 if rng.random() < 0.7 else 0)
            if rng.random() < 0.5:
                asked = order(node, noise=None, work="test", u=u, base=int(number > 5), round=1)
            else:
                asked = order(node, LocalPhase("personal", 50, 10), noise=None, attempt="", u=u)
            told.append(str(unseal(node.respond("", asked)).header["kind"]))
    assert answers[0] == answers[1]
    assert {"score", "refused", "update"} == {*answers[0]}
    terms = Terms((0, 1, 2, 3, 4, 5), (9,) * 6, 5, 3, b"")
    memory = sum_member.Memory(0, "a", terms, FixedPoint(0.5, 18), Secrets(b"", (), ()), noise=4.0)
    spent = []
    for change, node in zip((np.zeros(9), np.ones(9)), nodes, strict=True):
        for asked_for in ("a", "b", "c", "a", "d"):
            part = sum_member.Part(0, 0, "a", change, 10, node.purse, asked_for)
            try:
                sum_member._whole(memory, part)
                spent.append("made")
            except SpentError:
                spent.append("refused")
    assert spent == ["made", "made", "made", "made", "refused"] * 2


def test_the_order_of_a_sum_is_part_of_what_is_paid_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a server could change the order of two entries until the noise is gone, or ask whether they are equal."""
    origins = []
    monkeypatch.setattr(
        sum_member, "masked_change", lambda _, part: origins.append(part.origin) or np.zeros(0, np.uint32)
    )
    node = node_of(place, CLIENT)
    plain_order = order(node, LocalPhase("both", 50, 10), noise=None, attempt="a")
    levels = np.zeros(plain_order.task.shared.size, np.uint8)
    other = np.arange(len(levels)).astype(np.uint16)
    for given in (None, levels, other, other[::-1].copy(), levels, None):
        node.answer("", replace(plain_order, levels=given))
    assert len({*origins}) == 4
    assert origins[0] == origins[-1]


def test_a_sum_with_other_devices_has_other_noise_and_is_paid_for(place: Path) -> None:
    """Else the others' noise could be averaged over many of one round."""
    node = node_of(place, CLIENT)
    terms, part = Terms((0, 1, 2), (9,) * 3, 3, 3, b""), sum_member.Part(0, 0, "a", np.full(9, 0.01), 10, node.purse)
    memory = sum_member.Memory(0, "a", terms, FixedPoint(0.5, 18), Secrets(b"", (), ()), noise=4.0)
    shares = [
        sum_member._whole(replace(memory, terms=replace(terms, devices=devices)), part)
        for devices in ((0, 1, 2), (0, 3, 4))
    ]
    assert paid(place) == 2
    assert abs(np.corrcoef(*shares)[0, 1]) < 0.99


def test_a_sum_that_is_not_the_runs_gets_nothing(place: Path) -> None:
    """What all have signed is what they were told: by fewer devices, without those that know theirs, or noised by some of them only."""
    node, plain_node = (
        node_of(place, (*CLIENT, "privacy.curious=1")),
        Purse(place / "other-s0", Privacy(secure=True, least=3), 3),
    )
    terms = Terms((0, 1, 2, 3, 4, 5), (9, 9, 9, 2**40, 9, 9), 5, 3, b"", 1)
    memory = sum_member.Memory(0, "a", terms, FixedPoint(0.5, 18), Secrets(b"", (), ()), noise=4.0)
    part = sum_member.Part(0, 0, "a", np.full(9, 0.01), 10, node.purse)
    for wrong in ({"threshold": 4}, {"least": 2}, {"curious": 0}, {"curious": 2}):
        with pytest.raises(RefusedSumError, match="a sum that is not its run's"):
            sum_member._whole(replace(memory, terms=replace(terms, **wrong)), part)  # type: ignore[arg-type]
    unprotected = replace(part, purse=plain_node)  # for the server told this one of another configuration
    for unequal, by in (
        (replace(memory, noise=None), part),
        (replace(memory, terms=replace(terms, curious=0)), unprotected),
    ):
        with pytest.raises(RefusedSumError, match="a sum that is not its run's"):
            sum_member._whole(unequal, by)
    assert paid(place) == 0
    assert len(sum_member._whole(memory, part)) == 9  # whatever the others' counts are
    assert paid(place) == 1


def test_a_run_that_began_with_noise_is_not_gone_on_with_without(place: Path) -> None:
    node_of(place, EXAMPLE)
    with pytest.raises(CheckpointError, match="began with another configuration"):
        node_of(place, ("devices.count=3",))


def test_what_went_wrong_is_no_answer_and_its_words_stay_here(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    node = node_of(place, CLIENT)
    wide = order(node, LocalPhase("both", 5000, 5000), noise=None, attempt="", work="block")
    message = unseal(node.respond("", wide)).header
    assert (message["kind"], message["why"]) == ("refused", "device 0: cannot do this task")
    assert "device-0: " in capfd.readouterr().err


def test_one_number_written_in_two_ways_is_one_configuration(place: Path) -> None:
    config = plain(composed(*TINY, *EXAMPLE), resolve=True)
    told(place, config | {"privacy": {**config["privacy"], "epsilon": 50}})  # type: ignore[dict-item]
    told(
        place,
        config
        | {"privacy": {**config["privacy"], "epsilon": 50.0}, "failsafe": {**config["failsafe"], "wait_factor": 3.0}},
    )  # type: ignore[dict-item]
    (place / RUN / SPENT).unlink()
    (place / RUN / ".spent.json.new").write_text("cut off")
    told(place, config)


def test_noised_gradients_lie_on_a_lattice_that_is_of_the_noise_alone() -> None:
    total = torch.linspace(-1e-3, 1e-3, 15).view(1, 3, 5)
    for noise in (24.0, 0.37):
        step = 2.0 ** (np.floor(np.log2(noise)) - 20)
        got = noised_mean([total], 1, Noised(1.0, noise), stream(0, "privacy_noise"))[0].double().numpy()
        np.testing.assert_array_equal(got, np.rint(got / step) * step)
        draws = stream(0, "privacy_noise").standard_normal((3, 5), np.float64)
        np.testing.assert_allclose(got, total[0].double().numpy() + noise * draws, atol=step)


def test_limits_are_told_once_and_only_narrowed(place: Path) -> None:
    assert remembered(place, Limits(epsilon=8.0, delta=0.01)) == Limits(epsilon=8.0, delta=0.01)
    assert remembered(place, Limits()) == Limits(epsilon=8.0, delta=0.01)
    assert remembered(place, Limits(True, 20.0, 0.002, 40)) == Limits(True, 8.0, 0.002, 40)
    again = remembered(place, Limits())
    with pytest.raises(ConfigError, match=r"has no privacy\.secure=true, and this node joined with --secure"):
        node_of(place, EXAMPLE, limits=again)
    small = (*CLIENT, "privacy.epsilon=2")
    node_of(place, small, "aaaaaaaaaaaa-s0", again)
    node_of(place, small, "bbbbbbbbbbbb-s0", again)
    with pytest.raises(
        ConfigError,
        match=r"may have delta 0\.001, and earlier runs 0\.002: together more than this node's --delta 0\.002",
    ):
        node_of(place, small, "cccccccccccc-s0", again)
    assert not (place / "cccccccccccc-s0" / SPENT).exists()  # what is refused spends nothing
    node_of(place, small, "aaaaaaaaaaaa-s0", again)
    with pytest.raises(
        ConfigError, match="may have tests 13, and earlier runs 26: together more than this node's --tests 30"
    ):
        node_of(place, small, "dddddddddddd-s0", Limits(tests=30))
    (place / "private" / "limits.json").write_text('{"secure": 1}')
    with pytest.raises(CheckpointError, match="not what a node asks of every run"):
        remembered(place, Limits())


def test_one_process_has_a_nodes_folder_and_an_epsilon_has_its_delta(place: Path) -> None:
    with locked(place):
        second = fedprune("join", str(place), "127.0.0.1:1")
    assert (second.returncode, second.stderr) == (5, f"error: {place}: another process is writing as this node\n")
    alone = fedprune("join", str(place), "127.0.0.1:1", "--epsilon", "8")
    assert alone.returncode == 2
    assert "--epsilon and --delta: give both or none" in alone.stderr
