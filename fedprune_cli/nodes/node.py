"""A node's half of the protocol, whatever carries it: a task in, an answer out; what it keeps is on its disk before it answers."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.experiment import Experiment
from fedprune_cli.errors import ConfigError, DeviceError, FedpruneError
from fedprune_cli.learn.batched import train_some
from fedprune_cli.learn.client import Learner, Score, Task, Update, evaluate
from fedprune_cli.learn.models import build_model
from fedprune_cli.learn.parts import split_model, to_device
from fedprune_cli.learn.private import Noised, require_sample_gradients
from fedprune_cli.nodes.data import Place, Samples, Versions, versions_of
from fedprune_cli.nodes.energy import SYS, metering, spent_between
from fedprune_cli.nodes.orders import Answer, Heard, Order, read_order, sent_mask
from fedprune_cli.nodes.protocol import failed, refused
from fedprune_cli.nodes.spent import Purse
from fedprune_cli.nodes.sum_messages import Question, SumAnswer, read_question
from fedprune_cli.privacy.accounting import Release
from fedprune_cli.privacy.secure import RefusedSumError
from fedprune_cli.privacy.settings import Privacy
from fedprune_cli.round.protect import sound_or_old
from fedprune_cli.round.setup import build_blueprint
from fedprune_cli.store.files import Plain
from fedprune_cli.store.sealed import Sealed
from fedprune_cli.store.state import Array
from fedprune_cli.wire.quantize import BITS_PER_PARAM


@dataclass(frozen=True)
class Node:
    """A device of one run: its number, what it computes with, its v_k by round, and what of it is protected, in how many rounds.

    of: the SHA-256 of the run's configuration and of its samples, where they are protected; sys: where its machine says what it draws.
    """

    device: int
    learner: Learner
    versions: Versions
    privacy: Privacy
    rounds: int
    of: str = ""
    sys: Path = SYS

    @property
    def run(self) -> str:
        """The name of its run."""
        return self.versions.folder.name

    @property
    def purse(self) -> Purse:
        """What it has to spend of its privacy budget."""
        return Purse(self.versions.folder, self.privacy, self.rounds, self.of)

    def read(self, message: Sealed, heard: Heard | None) -> tuple[Order | Question, Heard | None]:
        """Returns the task in a message, or the question of a secure sum, and what of u is heard by then.

        Raises ValueError for one of another model or device.
        """
        try:
            if message.header["kind"] == "sum":
                question = read_question(message, self.run)
                order: Order | Question = question
                device = question.device
            else:
                task, heard = read_order(message, self.learner.layout, heard)
                order, device = task, task.task.device
        except (IndexError, KeyError, TypeError) as error:  # of a mask's code, or of what is not there
            raise ValueError(f"not a task ({type(error).__name__})") from None
        if device != self.device:
            raise ValueError(f"a task of device {device}, this is device {self.device}")
        return order, heard

    def answer(self, of: str, order: Order | Question) -> Answer | SumAnswer:
        """Returns what it makes of a task, whose message has the SHA-256 `of`; raises DeviceError where training does."""
        if isinstance(order, Question):
            from fedprune_cli.nodes import sum_member  # and the ciphers with it

            started = time.perf_counter()
            try:
                parcels = sum_member.answer(self.versions.folder, order)
            except (ValueError, KeyError) as error:
                raise RefusedSumError(f"device {self.device}: a question that makes no sense: {error}") from None
            return SumAnswer(of, order.step, parcels, time.perf_counter() - started)
        with metering(self.sys) as samples:
            started = time.perf_counter()
            result, moved = self._work(order)
            compute_s = time.perf_counter() - started
        return Answer(of, result, compute_s, moved, spent_between(samples))

    def respond(self, of: str, order: Order | Question) -> bytes:
        """Returns the message that it answers a task with: what it makes of it, or why it makes nothing."""
        try:
            return self.answer(of, order).encode()
        except RefusedSumError as error:
            return refused(of, str(error))
        except DeviceError as error:
            return failed(of, str(error))
        except (ArithmeticError, FedpruneError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if self.privacy.dp is None:
                raise
            print(f"device-{self.device}: {type(error).__name__}: {error}", file=sys.stderr)
            return refused(of, f"device {self.device}: cannot do this task")  # what went wrong may be of its data

    def _work(self, order: Order) -> tuple[Update | Score, bool]:
        task = replace(order.task, personal=self.versions.read(order.base))
        content = (
            b"" if self.privacy.none else replace(order, attempt=None, levels=None).encode(self.learner.layout, None)[0]
        )
        origin = self._origin(order.base, content)
        if self.privacy.dp:
            task = replace(task, may_diverge=True)  # that it did is of its data, and no error tells it
        if order.work == "test":
            if self.privacy.dp:
                if any(phase.kind != "personal" for phase in task.schedule):
                    raise RefusedSumError(f"device {self.device}: is to train the shared part for a test")
                self.purse.allow_test(origin)
            score = evaluate(self.learner, task)
            personal = self.learner.parts.personal.cpu().numpy().copy()
            # of a device that never trained, whose start is its own now, unless no step may be without noise
            finite = bool(np.isfinite(personal).all())
            if task.schedule and (finite or self.privacy.dp) and self.privacy.dp != "example":
                personal = personal if finite else task.personal  # whether it was is of its data
                self.versions.write(task.round, personal, origin)
                self.versions.keep((task.round,))
            return score, False
        open_ = order.attempt is None and task.shared.size > 0
        if self.privacy.secure and (open_ or task.bits != BITS_PER_PARAM):
            raise RefusedSumError(f"device {self.device}: is to hand in an update without masks")
        if self.privacy.dp == "example":
            task = replace(task, noised=self._noised(order, content, task.personal))
        together = order.work == "block" and task.noised is None
        (update,) = train_some(self.learner, [task] if together else task)
        finite = bool(np.isfinite(update.personal).all() and np.isfinite(update.shared).all())
        update = update if finite else _diverged(update, task)
        moved = finite or self.privacy.dp is not None  # where that is of its data too, the old v_k is the new one
        if moved:
            self.versions.write(task.round + 1, update.personal, origin)
        self.versions.keep((order.base, task.round + 1))
        if self.privacy.dp == "client":  # which no noise hides
            update = replace(update, train_loss=None)
        masks = self.privacy.secure and order.attempt is not None  # else there is nothing to hand in
        return (self._under_masks(order, update, origin) if masks else update), moved

    def _origin(self, base: int, content: bytes) -> str:
        """Returns what comes of a task, by what it and those before it asked: the SHA-256 of its content and of the origin of v_k.

        What is paid for and counted goes by it, and not by values, which no noise hides: that two of them are the same would tell of them.
        Empty where nothing is protected.
        """
        if self.privacy.none:
            return ""
        return hashlib.sha256(self.versions.origin(base).encode() + b"\0" + content).hexdigest()

    def _noised(self, order: Order, content: bytes, personal: Array) -> Noised:
        """Returns how the steps of a task are noised; raises RefusedSumError where that is not enough, or the budget is spent.

        content: all that the task says, whoever else has one.
        """
        clip, phases = self.privacy.clip, [phase for phase in order.task.schedule if phase.steps]
        if order.noise is None or clip is None:
            raise RefusedSumError(f"device {self.device}: is to train without noise")
        v_sha256 = hashlib.sha256(personal.tobytes()).digest()  # which tells nothing: v_k is of noised steps itself
        key = self.purse.key(f"steps of noise {order.noise!r} over {clip!r}: ".encode() + content + v_sha256)
        rate = max((phase.batch / len(self.learner.train[self.device]) for phase in phases), default=1.0)
        if phases:
            self.purse.spend(
                Release(order.noise, rate, sum(phase.steps for phase in phases)), hashlib.sha256(key).hexdigest()
            )
        return Noised(clip, order.noise, key)

    def _under_masks(self, order: Order, update: Update, origin: str) -> Update:
        """Returns the update with whole numbers under the masks of the round's sum in the place of its values [n_k]; none without a sum.

        What it counts by is the number of its own samples, and not what a server says.
        """
        from fedprune_cli.nodes import sum_member

        bare = replace(update, shared=np.zeros(0, np.uint32), code=b"", rounding_error=None)
        if not order.attempt or not len(update.shared):
            return bare
        task = order.task
        mask = sent_mask(task.kept, self.learner.layout, task.shared.size)
        before = task.shared if mask is None else task.shared[mask]
        change = sound_or_old(update.shared, before).astype(np.float64) - before
        if order.levels is not None:
            change = change[np.argsort(order.levels, kind="stable")]
            origin = hashlib.sha256(
                origin.encode() + str(order.levels.dtype).encode() + order.levels.tobytes()
            ).hexdigest()
        samples = len(self.learner.train[self.device])
        part = sum_member.Part(self.device, task.round, order.attempt, change, samples, self.purse, origin)
        return replace(bare, shared=sum_member.masked_change(self.versions.folder, part))


def _diverged(update: Update, task: Task) -> Update:
    """Returns the update of a device that keeps nothing of what it trained."""
    return replace(update, personal=task.personal, train_loss=None, rounding_error=None)


def build_node(place: Place, run: str, config: Mapping[str, Plain]) -> Node:
    """Returns the node for a run; raises ConfigError or CheckpointError when it cannot do its work."""
    torch.set_num_threads(1)  # two threads sum in another order and give other bits
    # what goes with no nodes is refused, whatever the server calls it
    execution = {**_section(config, "execution"), "kind": "nodes"}
    told = {**config, "execution": execution}
    if "${" in json.dumps(told):  # of this machine's environment, which is none of the server's
        raise ConfigError("the run's configuration refers to something outside it (${...})")
    experiment, samples = build_experiment(OmegaConf.create(told)), place.samples
    if experiment.privacy.dp and (kind := experiment.training.device) != "cpu":
        # one task would have two values, and two noises
        raise ConfigError(
            f"training.device={kind}: not with privacy.dp on nodes: it is not the same bits twice; take cpu"
        )
    shape = samples.inputs.shape[1:]
    parts = split_model(
        build_model(experiment.model, shape, samples.classes, experiment.seed), experiment.method.personal_part
    )
    layout = build_blueprint(experiment, parts, shape).layout
    versions = versions_of(place.folder, run, parts.personal.numpy().copy())
    train, test = samples.owned_by(place.device)
    learner = Learner(
        experiment.seed, experiment.training, to_device(parts, experiment.training.device), samples.inputs, samples.labels,
        samples.scale, samples.mean, samples.std, train, test, layout,
    )  # fmt: skip
    if experiment.privacy.dp == "example":
        require_sample_gradients(parts, shape, experiment.model.name)
    of = "" if experiment.privacy.dp is None else _identity(experiment, samples)
    return Node(place.device, learner, versions, experiment.privacy, experiment.rounds, of)


def _identity(experiment: Experiment, samples: Samples) -> str:
    """Returns the SHA-256 of what a run's noise is for: its configuration but for how and where it is executed, and the node's samples."""
    fields = json.loads(json.dumps(asdict(experiment)))
    around = ("out", "execution", "tracking", *(() if experiment.faulty else ("faults", "failsafe")))
    decides = {
        section: {key: value for key, value in of.items() if key not in ("root", "file")}
        if isinstance(of, dict)
        else of
        for section, of in fields.items()
        if section not in around
    }
    return hashlib.sha256(json.dumps([decides, samples.sha256], sort_keys=True).encode()).hexdigest()


def _section(config: Mapping[str, Plain], name: str) -> dict[str, Plain]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
