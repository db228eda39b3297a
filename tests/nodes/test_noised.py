"""Noise on nodes: the simulator's bytes but for who knows the draws, drawn once for each task, and never beyond the node's own budget."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")
pytest.importorskip("dp_accounting")

from nodes.fleet import InProcessSite, begin, enrolled, on_nodes, places_of, result, simulate

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.config.plain import plain
from fedprune_cli.errors import CheckpointError, ConfigError
from fedprune_cli.learn.private import Noised
from fedprune_cli.nodes import spent, sum_member
from fedprune_cli.nodes.limits import Limits
from fedprune_cli.nodes.node import Node, build_node
from fedprune_cli.nodes.orders import Order, read_order
from fedprune_cli.nodes.post import Post, node_for
from fedprune_cli.nodes.protocol import read_from_server
from fedprune_cli.nodes.spent import Purse, SpentError
from fedprune_cli.privacy.accounting import Release, epsilon
from fedprune_cli.privacy.secure import RefusedSumError
from fedprune_cli.privacy.settings import Privacy
from fedprune_cli.rng import SecretStream, stream
from fedprune_cli.round import protect
from fedprune_cli.runs import life
from fedprune_cli.serve.deliver import Arrival, Sent
from fedprune_cli.store import folder
from fedprune_cli.store.sealed import Sealed, unseal

BUDGET = ("privacy.delta=1e-3", "privacy.public_scores=true", "deadline.fraction=0.4", "weights=uniform")
CLIENT = (
    *BUDGET, "privacy.dp=client", "privacy.secure=true", "privacy.least=3", "privacy.epsilon=20", "privacy.clip=0.5", "devices.count=6",
)  # fmt: skip
EXAMPLE = (
    *BUDGET, "privacy.dp=example", "privacy.epsilon=8", "privacy.noise=0.362", "privacy.clip=1", "privacy.public_samples=true",
    "devices.count=3", "partition=iid",
)  # fmt: skip  # of as many samples each, whose accounting is the same


@dataclasses.dataclass(frozen=True)
class Made:
    """A simulation, and the pilot of the same devices."""

    home: Path
    overrides: tuple[str, ...]

    @property
    def devices(self) -> int:
        """How many train."""
        return 6 if "privacy.dp=client" in self.overrides else 3

    def start(self, name: str, *more: str) -> tuple[life.Setup, InProcessSite]:
        """Returns the setup of the same run on nodes, whose folder has this name, and its site."""
        setup, config = begin(self.home / "pilot", self.home / name, [*self.overrides, *more])
        return setup, InProcessSite(places_of(self.home / "pilot"), config)

    def run(self, name: str, *more: str) -> InProcessSite:
        """Makes the run on nodes to its end."""
        setup, site = self.start(name, *more)
        list(life.run(setup, self.home / name, site=site))
        return site

    def node(self, device: int) -> Node:
        """Returns a node of the run, which has done nothing but what is in its folder."""
        config = compose_config(on_nodes(self.home / "pilot", self.overrides))
        run = f"{build_experiment(config).config_hash}-s0"
        node = build_node(places_of(self.home / "pilot")[device], run, plain(config, resolve=True))
        node.purse.open()
        return node


@pytest.fixture(scope="module")
def firsts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Made]:
    found = {}
    for overrides in (CLIENT, EXAMPLE):
        home = tmp_path_factory.mktemp("made")
        enrolled(home, simulate(home / "simulated", *overrides))
        found[overrides] = Made(home, overrides)
    return found


def fresh(firsts: dict[tuple[str, ...], Made], overrides: tuple[str, ...], tmp_path: Path) -> Made:
    """Returns the same simulation and pilot, whose nodes have done nothing yet."""
    shutil.copytree(firsts[overrides].home, tmp_path / "home")
    return Made(tmp_path / "home", overrides)


def tell_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has nodes draw from the named streams of a simulation, which everybody knows."""

    def named(self: Purse, what: bytes) -> bytes:
        device = self.folder.parent.name.removeprefix("device-")
        return f"{what[4:-32].decode()} {device}".encode() if what.startswith(b"sum ") else what

    monkeypatch.setattr(Purse, "key", named)
    monkeypatch.setattr(sum_member, "SecretStream", lambda key: stream(0, "privacy_noise", *map(int, key.split())))
    draws = Noised.draws
    monkeypatch.setattr(Noised, "draws", lambda self, *of: draws(dataclasses.replace(self, key=None), *of))


def by_levels(rank_changes: Callable[..., protect.Ranked]) -> Callable[..., protect.Ranked]:
    """Has a simulation draw noise for entries in the order in which nodes have them: of one level by index, and not by rank."""

    def ranked(old: np.ndarray, sent: Sent, arrivals: Sequence[Arrival]) -> protect.Ranked:
        levels = sent.masks.levels(np.array([update.device for update in sent.updates]))
        place = np.argsort(np.argsort(levels, kind="stable"))
        return rank_changes(old, dataclasses.replace(sent, masks=dataclasses.replace(sent.masks, rank=place)), arrivals)

    return ranked


def known_to_all(run_dir: Path) -> tuple[list[dict[str, object]], bytes]:
    """Returns the records and u of a run; without losses, which nodes whose clients are protected do not tell."""
    records = [json.loads(line) for line in result(run_dir)[0].splitlines()]
    for record in records:
        record["train_loss"] = None
        record["devices"].pop("train_loss", None)
    return records, result(run_dir)[1]


@pytest.mark.parametrize("overrides", [CLIENT, EXAMPLE])
def test_but_for_the_draws_a_noised_run_on_nodes_has_the_simulators_bytes(
    firsts: dict[tuple[str, ...], Made], overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fresh(firsts, overrides, tmp_path)
    with monkeypatch.context() as patched:
        tell_the_draws(patched)
        made.run("told")
        patched.setattr(protect, "rank_changes", by_levels(protect.rank_changes))
        simulate(made.home / "by levels", *overrides)
    assert known_to_all(made.home / "told") == known_to_all(made.home / "by levels")
    shutil.rmtree(made.home / "pilot")
    shutil.copytree(firsts[overrides].home / "pilot", made.home / "pilot")
    site = made.run("secret")
    assert result(made.home / "secret")[1] != result(made.home / "simulated")[1]
    secrets = [path.read_bytes() for path in (made.home / "pilot").glob(f"device-*/{spent.PRIVATE}/{spent.SECRET}")]
    assert len({*secrets}) == made.devices
    assert not any(secret in message for secret in secrets for message in site.carrier.wire)
    records = [json.loads(line) for line in (made.home / "secret" / folder.RECORDS).read_text().splitlines()]
    assert records[-1]["privacy"]["epsilon"] > 0.8 * (20 if overrides is CLIENT else 8)


@pytest.mark.parametrize("overrides", [CLIENT, pytest.param(EXAMPLE, marks=pytest.mark.slow)])
def test_killed_or_asked_again_a_node_has_the_same_noise_and_spends_nothing_more(
    firsts: dict[tuple[str, ...], Made], overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """Also where a server lost its last round, or begins the whole run again."""
    made = fresh(firsts, overrides, tmp_path)
    setup, site = made.start("run")
    rounds = life.run(setup, made.home / "run", site=site)
    next(rounds)
    shutil.copytree(made.home / "run", made.home / "before")
    next(rounds)
    rounds.close()  # type: ignore[attr-defined]
    list(life.run(setup, made.home / "before", site=made.start("other")[1]))
    list(life.run(setup, made.home / "run", site=made.start("another")[1]))
    assert result(made.home / "run") == result(made.home / "before")
    ledgers = [json.loads(path.read_text()) for path in (made.home / "pilot").glob("device-*/*/spent.json")]
    spent_by_each = [len(ledger["tasks"]) for ledger in ledgers if ledger["tasks"]]
    assert spent_by_each == [3] * made.devices


def order_of(node: Node, site: InProcessSite, device: int) -> Order:
    """Returns the first training task of a device on the wire."""
    for message in site.carrier.wire:
        header = unseal(message).header
        if (
            header["kind"] == "task"
            and header["device"] == device
            and header["work"] != "test"
            and header["round"] == 0
        ):
            return read_order(read_from_server(message), node.learner.layout, None)[0]
    raise AssertionError("no task")


def test_a_node_trains_no_further_than_its_own_budget_whatever_it_is_told(
    firsts: dict[tuple[str, ...], Made], tmp_path: Path
) -> None:
    """Another u, another round, no noise or less: each is new noise and is paid for; the fourth of a budget of three rounds is refused."""
    made = fresh(firsts, EXAMPLE, tmp_path)
    order = order_of(made.node(0), made.run("run"), 0)
    shutil.rmtree(made.home / "pilot")
    shutil.copytree(firsts[EXAMPLE].home / "pilot", made.home / "pilot")
    node, task = made.node(0), order.task
    first, again = (node.answer("", order).result for _ in range(2))
    np.testing.assert_array_equal(first.shared, again.shared)  # type: ignore[union-attr]
    moved = dataclasses.replace(task, shared=task.shared * np.float32(1.5))
    for other in (
        dataclasses.replace(order, task=moved),
        dataclasses.replace(order, work="block", base=0, task=dataclasses.replace(moved, round=1)),
    ):
        assert not np.array_equal(node.answer("", other).result.shared, first.shared)  # type: ignore[union-attr]
    late = dataclasses.replace(order, task=dataclasses.replace(task, round=2))
    with pytest.raises(
        SpentError, match=r"epsilon 8 at delta 0.001 with noise [\d.]+, 5 draws .* allows 3 rounds of this run"
    ):
        node.answer("", late)
    with pytest.raises(SpentError, match="no sum is known of both"):
        node.answer("", dataclasses.replace(late, noise=100.0))
    with pytest.raises(RefusedSumError, match="is to train without noise"):
        node.answer("", dataclasses.replace(late, noise=None))
    node.answer("", order)  # what was paid for is done again
    with pytest.raises(RefusedSumError, match="is to train the shared part for a test"):  # without noise
        node.answer("", dataclasses.replace(order, work="test"))


def test_a_node_hands_in_no_change_that_its_noise_does_not_hide(
    firsts: dict[tuple[str, ...], Made], tmp_path: Path
) -> None:
    made = fresh(firsts, CLIENT, tmp_path)
    made.run("run")
    node = made.node(1)
    memory = sum_member.read_memory(node.versions.folder)
    assert memory is not None
    assert memory.noise is not None
    part = sum_member.Part(1, memory.number, memory.attempt, np.full(200, 0.01), 10, node.purse)
    new = dataclasses.replace(memory, masked="", helped=None)
    for wrong, told in (
        (dataclasses.replace(new, noise=None), "a sum that is not its run's"),
        (dataclasses.replace(new, point=dataclasses.replace(new.point, largest=5.0)), "of another clip"),
        (dataclasses.replace(new, point=dataclasses.replace(new.point, bits=2)), "below 4 steps"),
        (dataclasses.replace(new, noise=memory.noise / 2), "no sum is known of both"),
        (new, "allows 3 rounds of this run, and this is another"),
    ):
        with pytest.raises(RefusedSumError, match=told):
            sum_member._whole(wrong, part)


def test_the_devices_shares_add_up_to_the_noise_that_is_accounted(
    firsts: dict[tuple[str, ...], Made], tmp_path: Path
) -> None:
    """Where nobody's change is any: what is left in u is the sum's noise, over the number of devices."""
    quiet = ("allocator=dense", "training.lr=1e-9", "rounds=1", "model.hidden=[64]")
    made = Made(tmp_path, (*CLIENT, *quiet))
    enrolled(tmp_path, simulate(tmp_path / "simulated", *made.overrides))
    setup, site = made.start("run")
    list(life.run(setup, tmp_path / "run", site=site))
    assert setup.budget is not None
    change = folder.read_state(tmp_path / "run").state.shared.astype(float) - setup.initial.shared
    sure = 6 - (6 - setup.experiment.privacy.needed(6))
    want = setup.budget.one.noise * 0.5 * np.sqrt(6 / sure) / 6
    assert len(change) == 64 * 65
    assert abs(change.std() / want - 1) < 0.05
    assert abs(change.mean()) < 4 * want / np.sqrt(len(change))


def test_a_secret_stream_is_uniform_gaussian_and_of_its_key_alone() -> None:
    from scipy.stats import kstest

    draws = SecretStream(b"key")
    assert kstest(draws.random(50_000), "uniform").pvalue > 1e-3
    normal = draws.standard_normal((250, 200), np.float32)
    assert normal.dtype == np.float32
    assert kstest(normal.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(normal.ravel()[1:], normal.ravel()[:-1])[0, 1]) < 0.02
    np.testing.assert_array_equal(SecretStream(b"key").random(9), SecretStream(b"key").random(9))
    assert not (SecretStream(b"key").random(9) == SecretStream(b"yek").random(9)).any()


def test_what_is_spent_is_counted_once_for_each_key_and_kept(tmp_path: Path) -> None:
    place = tmp_path / "device-0" / "run"
    place.mkdir(parents=True)
    purse = Purse(place, Privacy(dp="client", epsilon=3.0, delta=1e-3, clip=1.0), 100)
    purse.open()
    one = Release(4.0, 1.0, 1)
    affordable = next(n for n in range(1, 100) if epsilon(Release(4.0, 1.0, n + 1), 1e-3) > 3.0)
    for number in range(affordable):
        for _ in range(2):
            purse.spend(one, f"{number}")
    with pytest.raises(SpentError, match=f"allows {affordable} rounds of this run"):
        purse.spend(one, "more")
    other = dataclasses.replace(purse, folder=place.parent / "other")
    assert len({purse.key(b"0"), purse.key(b"1"), other.key(b"0"), other.key(b"1")}) == 4
    (place / spent.SPENT).write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        purse.spend(one, "0")
    (place.parent / spent.PRIVATE / spent.SECRET).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="must be 32 bytes"):
        purse.key(b"0")


def test_all_runs_of_a_node_together_spend_no_more_than_it_says(
    firsts: dict[tuple[str, ...], Made], tmp_path: Path
) -> None:
    """With `join --epsilon`: a run that is noised too little, or one run too many, is refused before anything is trained."""
    made = fresh(firsts, CLIENT, tmp_path)
    site = made.run("run")
    place = site.places[0]

    def works_on(most: float, *more: str) -> Node:
        config = compose_config(on_nodes(made.home / "pilot", [*made.overrides, *more]))
        run = Sealed(
            {"kind": "run", "run": f"{build_experiment(config).config_hash}-s0", "config": plain(config, resolve=True)}
        )
        return node_for(
            Post("", place.folder, place, True, lambda _: None, limits=Limits(epsilon=most, delta=0.01)), run, None
        )

    works_on(20.0)  # the run that is there
    works_on(24.0, "privacy.epsilon=4")
    with pytest.raises(
        ConfigError, match="may have epsilon 4, and earlier runs 20: together more than this node's --epsilon 23"
    ):
        works_on(23.0, "privacy.epsilon=4")
    with pytest.raises(ConfigError, match=r"device-0: .* has no privacy\.dp, and this node joined with --epsilon 50"):
        works_on(50.0, "privacy.dp=null", "privacy.epsilon=null", "privacy.clip=null", "privacy.delta=null")
