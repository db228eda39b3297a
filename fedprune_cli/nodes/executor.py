"""The executor that hands tasks to nodes, whatever carries them: one task a device, and what a lost one counts as."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import numpy as np

from fedprune_cli.errors import DeviceError
from fedprune_cli.learn.batched import train_some
from fedprune_cli.learn.client import Score, Task, Update, evaluate
from fedprune_cli.learn.kept import Whole
from fedprune_cli.learn.schedule import LocalPhase
from fedprune_cli.learn.structured import Layout
from fedprune_cli.nodes.energy import Spent, as_plain, read_spent
from fedprune_cli.nodes.orders import Heard, Order, code_bytes, read_result, sent_mask
from fedprune_cli.nodes.sum_messages import Question, read_answer
from fedprune_cli.privacy.secure import RefusedSumError
from fedprune_cli.round.summed import SumOrder, TotalOf
from fedprune_cli.store.record import RoundRecord
from fedprune_cli.store.sealed import Sealed
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets.roster import Card

if TYPE_CHECKING:
    from fedprune_cli.nodes.summing import Agreed

Context = TypeVar("Context")
OneTask = TypeVar("OneTask")
Result = TypeVar("Result")
Made = Update | Score | Mapping[str, bytes]  # of a task, or what is answered of a secure sum
Taken = Mapping[str, float | str | None]  # what a training took on its node: seconds, joules, and of what they are


@dataclass(frozen=True)
class Request:
    """What is asked of a node, and how its answer is read: what is wrong with it is a ValueError.

    write: from what the node has heard of u to the message and what it has heard then; within_s: after which nobody waits for the
    answer any longer, None: as long as it takes. due_s: after which it is late, None: never; round, what: of which round it is, and what
    it asks for, for whoever watches.
    """

    write: Callable[[Heard | None], tuple[bytes, Heard | None]]
    read: Callable[[Sealed], Made]
    within_s: float | None = None
    due_s: float | None = None
    round: int = 0
    what: str = "its task"


@dataclass(frozen=True)
class Reply:
    """What came back, and when by the server's clock: sent, there (the node said so), and answered. failure: why there is no result.

    refusal: why a node has no part in a secure sum, which is no reason for the others to stop.
    got_s: None where the carrier does not say; compute_s: how long the node worked, by its own clock; spent: what it drew
    meanwhile, None where it did not measure.
    """

    result: Made | None
    sent_s: float
    got_s: float | None
    done_s: float
    compute_s: float = 0.0
    failure: str = ""
    refusal: str = ""
    spent: Spent | None = None


def reply_in(message: Sealed, request: Request, sent_s: float, got_s: float | None, done_s: float) -> Reply:
    """Returns the reply in what a node answered with; raises ValueError for what cannot be an answer to the request."""
    header = message.header
    if header["kind"] == "failed":
        return Reply(None, sent_s, got_s, done_s, failure=str(header["why"]))
    if header["kind"] == "refused":
        return Reply(None, sent_s, got_s, done_s, refusal=str(header["why"]))
    compute_s, spent = float(str(header["compute_s"])), read_spent(header)
    return Reply(request.read(message), sent_s, got_s, done_s, compute_s, spent=spent)


# from the number and the card of a newcomer, who is no device of the run's, to what is asked of it
Invite = Callable[[int, Card], Request]


class Carrier(Protocol):
    """Carries messages to nodes and their answers back."""

    def welcome(self, invite: Invite) -> None:
        """Asks it of every newcomer that is here, and of those that come later; the run neither waits for them nor hears of them."""

    def exchange(self, requests: Mapping[int, Request]) -> Mapping[int, Reply]:
        """Returns the replies by device; one that is away for longer than may be waited for, or is not within its time, has none."""


class Host(Carrier, Protocol):
    """A carrier as a pilot has it."""

    def gather(self) -> list[Card]:
        """Returns the cards of all devices once all of them have come."""

    def end(self) -> None:
        """Tells every node that is here that the run has had its last round."""


@dataclass(frozen=True)
class NodeExecutor:
    """Maps the functions of a device's work over nodes. drops: whether the update of who is late counts for nothing.

    done: the last round's training, by device, until somebody takes it. fresh: the steps that a newcomer with so many training samples
    takes on v, None: newcomers are asked nothing. sums: the secure sum of the last round, None where too few agreed on one. say: told in
    one line why a node has no part in a sum.
    """

    carrier: Carrier
    layout: Layout
    drops: bool = False
    done: dict[int, Taken] = field(default_factory=dict)
    fresh: Callable[[int], tuple[LocalPhase, ...]] | None = None
    sums: dict[int, Agreed | None] = field(default_factory=dict)
    say: Callable[[str], None] = lambda _: None

    def map(
        self,
        f: Callable[[Context, OneTask], Result],
        tasks: Iterable[OneTask],
        cost: Callable[[OneTask], float] | None = None,
    ) -> list[Result]:
        """As Executor.map. A training task that is lost is an update of a device that died; a lost test is missing from the results.

        Raises DeviceError where a device's training did, the first in order of the devices.
        """
        work = cast(Callable[..., object], f)
        if work is train_some:
            sides = cast(list[Task | Sequence[Task]], list(tasks))
            updates = self._train([one for side in sides for one in _works(side)])
            return cast(list[Result], [[updates[task.device] for _, task in _works(side)] for side in sides])
        if work is not evaluate:
            raise TypeError(f"nodes have no {f.__name__}")
        todo = cast(list[Task], list(tasks))
        scores = self._exchange(self._requests([("test", task) for task in todo]))
        if self.fresh and todo:
            self._welcome(todo[0], self.fresh)
        self._note_tests(scores)
        tested = {device: reply.result for device, reply in scores.items() if not reply.refusal}
        return cast(list[Result], [tested[task.device] for task in todo if task.device in tested])

    def _welcome(self, tested: Task, fresh: Callable[[int], tuple[LocalPhase, ...]]) -> None:
        """Has newcomers begin as the run's fresh devices do, with the shared part that was tested."""

        def invite(device: int, card: Card) -> Request:
            start = np.zeros(1, np.float32)  # v_k of round 0
            task = Task("fresh-device test", tested.round, device, tested.shared, start, Whole(), fresh(card.train))
            return self._request(Order("test", task, 0))

        self.carrier.welcome(invite)

    def agree(self, order: SumOrder) -> TotalOf:
        """As Summing.agree. Who is lost before all have agreed is not asked to train; where too few are left all train v_k alone."""
        from fedprune_cli.nodes import summing  # and the ciphers with it

        self.sums.clear()
        self.sums[order.number] = None
        try:
            agreed = summing.agree(self._ask, order)
        except RefusedSumError as error:
            return functools.partial(_refuse, error)
        self.sums[order.number] = agreed
        return functools.partial(summing.total, self._ask, agreed)

    def _ask(self, questions: Mapping[int, Question]) -> Mapping[int, Mapping[str, bytes]]:
        """Returns the answers of those that gave one to a question of a secure sum; raises RefusedSumError where too few refuse none."""
        replies = self._exchange({device: _asking(question) for device, question in questions.items()})
        for device, reply in replies.items():
            before_s = cast(float, self.done.get(device, {}).get("sum_s", 0.0))
            self.done[device] = {**self.done.get(device, {}), "sum_s": before_s + reply.done_s - reply.sent_s}
        if refusals := [reply.refusal for _, reply in sorted(replies.items()) if reply.refusal]:
            replies = {device: reply for device, reply in replies.items() if not reply.refusal}
            if len(replies) < next(iter(questions.values())).terms.threshold:
                raise RefusedSumError(refusals[0])
        return {device: cast(Mapping[str, bytes], reply.result) for device, reply in replies.items()}

    def _train(self, works: Sequence[tuple[str, Task]]) -> dict[int, Update]:
        """Returns the updates of all, who are asked at once: whoever waited for others would make the round longer."""
        asked = [(work, task) for work, task in works if self._is_asked(task)]
        given = self._exchange(self._requests(asked))
        replies = {device: reply for device, reply in given.items() if not reply.refusal}
        last_s = max((reply.done_s for reply in replies.values()), default=0.0)
        for device, reply in replies.items():
            ways = {"carried_s": max(reply.done_s - reply.sent_s - reply.compute_s, 0.0)}
            if reply.got_s is not None:
                moved_s = reply.done_s - reply.got_s - reply.compute_s
                ways = {"downlink_s": reply.got_s - reply.sent_s, "uplink_s": max(moved_s, 0.0)}
            took = {"compute_s": reply.compute_s, **ways, "waiting_s": last_s - reply.done_s}
            self.done[device] = {**self.done.get(device, {}), **took, **as_plain(reply.spent)}
        updates = {task.device: self._update(task, replies.get(task.device)) for _, task in asked}
        return {task.device: updates.get(task.device) or _lost(task, self.layout) for _, task in works}

    def _is_asked(self, task: Task) -> bool:
        """Whether a device is asked to train: where others agreed on a secure sum without it, it is one that died."""
        agreed = self.sums.get(task.round)
        return agreed is None or task.device in agreed.terms.devices

    def _note_tests(self, replies: Mapping[int, Reply]) -> None:
        """Notes how long u took on its way to each test: what a test has brought, the next round's task need not bring again.

        Also what a test drew, of which the model's joules have nothing.
        """
        for device, reply in replies.items():
            if device in self.done:
                ways = {} if reply.got_s is None else {"test_downlink_s": reply.got_s - reply.sent_s}
                drew = {f"test_{key}": value for key, value in as_plain(reply.spent).items()}
                self.done[device] = {**self.done[device], **ways, **drew}

    def _update(self, task: Task, reply: Reply | None) -> Update:
        if reply is None:
            lost = _lost(task, self.layout)
            return lost if task.due_s is None or not self.drops else replace(lost, died=False, late=True)
        update = cast(Update, reply.result)
        return update if task.due_s is None else replace(update, late=reply.done_s - reply.sent_s > task.due_s)

    def _requests(self, works: Sequence[tuple[str, Task]]) -> dict[int, Request]:
        return {task.device: self._request(self._order(work, task)) for work, task in works}

    def _order(self, work: str, task: Task) -> Order:
        base = int(task.personal[0])
        if work == "test" or task.round not in self.sums:
            return Order(work, task, base)
        agreed = self.sums[task.round]
        if agreed is None:
            return Order(work, task, base, "")
        mask = sent_mask(task.kept, self.layout, task.shared.size)
        levels = agreed.order.levels if mask is None else agreed.order.levels[mask]
        return Order(work, task, base, agreed.attempt, levels if levels.any() else None)

    def _exchange(self, requests: Mapping[int, Request]) -> Mapping[int, Reply]:
        replies = self.carrier.exchange(requests)
        if failures := [reply.failure for _, reply in sorted(replies.items()) if reply.failure]:
            raise DeviceError(failures[0])
        for device, reply in sorted(replies.items()):
            if reply.refusal:
                self.say(f"device-{device}: does not take part: {reply.refusal}")
        return replies

    def _request(self, order: Order) -> Request:
        layout = self.layout
        due_s, test = order.task.due_s, order.work == "test"
        number = order.task.round + (not test)
        return Request(
            lambda heard: order.encode(layout, heard), lambda message: read_result(message, order, layout),
            due_s if self.drops else None, due_s, number, f"the {'test' if test else 'training'} of round {number}",
        )  # fmt: skip


def _works(side: Task | Sequence[Task]) -> list[tuple[str, Task]]:
    """Returns what each device of a side is asked: those that a simulation trains side by side have the bits of that."""
    return [("train", side)] if isinstance(side, Task) else [("block", task) for task in side]


def _refuse(error: RefusedSumError, _: Mapping[int, Array]) -> Array:
    raise error


def _asking(question: Question) -> Request:
    message, number = question.encode(), question.number + 1
    what = f"the {question.step} of round {number}'s sum"
    return Request(
        lambda heard: (message, heard), lambda answer: read_answer(answer, question), round=number, what=what
    )


def _lost(task: Task, layout: Layout) -> Update:
    """Returns what the server has of a device that is gone: nothing but the bytes that its update would have had."""
    mask = sent_mask(task.kept, layout, task.shared.size)
    count = task.shared.size if mask is None else int(mask.sum())
    return Update(task.device, np.zeros(0, np.float32), task.personal, None, code_bytes(count, task.bits), died=True)


def measured(done: dict[int, Taken], record: RoundRecord) -> dict[str, object]:
    """Returns what a round's training took on every node, the model's seconds and joules beside it, and forgets it."""
    rows = record.devices
    nodes = []
    for at, device in enumerate(rows.id):
        if "compute_s" in done.get(device, {}):  # and not the keys alone, of one that was lost then
            modelled = {key: getattr(rows, key)[at] for key in ("compute_s", "uplink_s", "downlink_s", "joules")}
            nodes.append({"device": device, **done[device], "modelled": modelled})
    done.clear()
    return {"nodes": nodes}
