"""The server's desk: nodes come to it by gRPC with certificates of their own, are handed tasks, and hand in answers.

All of it lives on one event loop in a thread of its own; the run's thread waits in `exchange`. A node that is away is waited for as
long as may be, and is handed its task again when it is back. Whoever is refused is told why in one line; nobody else notices.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from fedprune_cli.errors import FedpruneError, OutputError
from fedprune_cli.learn.client import Score
from fedprune_cli.nodes.board import SHOW_S, SILENT_S, Board
from fedprune_cli.nodes.certificates import Peer, peer_of, read_identity, revoked, unwanted
from fedprune_cli.nodes.channel import ATTEND, SERVICE, grpc, options
from fedprune_cli.nodes.executor import Invite, Reply, Request, reply_in
from fedprune_cli.nodes.orders import Heard
from fedprune_cli.nodes.protocol import END, Hello, Terms, read_from_node, read_hello, sha256
from fedprune_cli.store.sealed import Sealed
from fedprune_cli.world.datasets.roster import Card

T = TypeVar("T")
Code = grpc.StatusCode
HELLO_S = 10.0  # within which a new stream has to say who it is
CLOSING_S = 2.0
GUESTS_S = 30.0  # for newcomers, once the run has had its last round
FIRST_S = 10.0  # after a server's start within which nodes come that were there before


@dataclass
class _Link:
    """A node that is here. heard: what it has of u, since it came; why: set when it is to go."""

    peer: Peer
    hello: Hello
    context: grpc.aio.ServicerContext
    heard: Heard | None = None
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""

    async def write(self, message: bytes) -> None:
        with contextlib.suppress(
            grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError
        ):  # gone: it will be back
            async with self.writing:
                await self.context.write(message)

    def leave(self, why: str) -> None:
        self.why = why
        self.leaving.set()


@dataclass
class _Ask:
    """A task that is out, until there is a reply or it is lost."""

    request: Request
    reply: asyncio.Future[Reply | None]
    of: str = ""
    link: _Link | None = None
    sent_s: float = 0.0
    got_s: float = 0.0
    giving_up: asyncio.TimerHandle | None = None


@dataclass
class Desk:
    """Who is here, and what is out. Only the event loop touches it; `exchange` and `gather` hand their work to it."""

    terms: Terms
    loop: asyncio.AbstractEventLoop
    links: dict[int, _Link] = field(default_factory=dict)
    asks: dict[int, _Ask] = field(default_factory=dict)
    came: asyncio.Event = field(default_factory=asyncio.Event)
    opened_s: float = field(default_factory=time.monotonic)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    board: Board = field(init=False)
    tardy: dict[int, str] = field(default_factory=dict)  # devices whose last training was late, and in what words
    guests: dict[int, _Ask] = field(default_factory=dict)  # what newcomers were handed last
    began: dict[int, str] = field(default_factory=dict)  # how newcomers began, in words
    invite: Invite | None = None
    over: bool = False  # whether the run has had its last round

    def __post_init__(self) -> None:
        self.board = self.terms.board()

    # --- for the run's thread -------------------------------------------------------------------------------------------

    def exchange(self, requests: Mapping[int, Request]) -> Mapping[int, Reply]:
        """As Carrier.exchange."""
        return self._wait(self._exchange(requests))

    def gather(self) -> list[Card]:
        """Returns the cards of all devices once all of them have come."""
        return self._wait(self._gather())

    def welcome(self, invite: Invite) -> None:
        """As Carrier.welcome."""
        self._wait(self._welcome(invite))

    def end(self) -> None:
        """Tells every node that is here that the run has had its last round, once newcomers have what they begin with."""
        self._wait(self._end())

    def _wait(self, work: Coroutine[None, None, T]) -> T:
        waiting = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return waiting.result()
        except BaseException:  # an interruption: nobody waits for it any longer
            waiting.cancel()
            raise

    # --- on the event loop ----------------------------------------------------------------------------------------------

    async def _exchange(self, requests: Mapping[int, Request]) -> dict[int, Reply]:
        self._turn_out()
        self.asks = {device: _Ask(request, self.loop.create_future()) for device, request in requests.items()}
        for device, ask in self.asks.items():
            if ask.request.within_s is not None:
                self.loop.call_later(ask.request.within_s, self._overdue, device, ask)
            if device in self.links:
                self._hand(self.links[device], ask)
            else:
                self._miss(device, ask)
        replies = await asyncio.gather(*(ask.reply for ask in self.asks.values()))
        found = {device: reply for device, reply in zip(self.asks, replies, strict=True) if reply is not None}
        self.asks = {}
        return found

    async def _gather(self) -> list[Card]:
        while missing := [device for device in range(self.terms.devices) if device not in self.links]:
            self.came.clear()
            self.terms.say(f"waiting for {', '.join(f'device-{device}' for device in missing[:10])}")
            await self.came.wait()
        return [self.links[device].hello.card for device in range(self.terms.devices)]

    async def _welcome(self, invite: Invite) -> None:
        self.invite = invite
        for device in self.links:
            self._greet(device)

    def _greet(self, device: int) -> None:
        """Hands a newcomer what it begins with, once it has answered to what it was handed before."""
        link, old = self.links[device], self.guests.get(device)
        if self.invite is None or device < self.terms.devices or (old and old.link is link and not old.reply.done()):
            return
        self.guests[device] = _Ask(self.invite(device, link.hello.card), self.loop.create_future())
        self._hand(link, self.guests[device])

    def _meet(self, device: int, ask: _Ask, reply: Reply) -> None:
        """Notes how a newcomer begins, and hands it what has changed meanwhile."""
        score, what = reply.result, f"begins with the shared part of round {ask.request.round}"
        if isinstance(score, Score):
            self.began[device] = f"a newcomer, {what}: {score.correct} of {score.total} test samples are right"
        else:
            self.began[device] = (
                f"a newcomer, cannot {what.replace('begins', 'begin')}: {reply.failure or reply.refusal}"
            )
        self.terms.say(f"device-{device}: {self.began[device]}")
        if self.invite and self.invite(device, self.links[device].hello.card).round > ask.request.round:
            self._greet(device)

    async def _end(self) -> None:
        until_s = time.monotonic() + GUESTS_S
        while waiting := [
            ask.reply for ask in self.guests.values() if ask.link in self.links.values() and not ask.reply.done()
        ]:
            if not (await asyncio.wait(waiting, timeout=until_s - time.monotonic()))[0]:
                break
        self.over = True
        with contextlib.suppress(TimeoutError):  # one that does not listen is no matter of the run's
            await asyncio.wait_for(asyncio.gather(*(link.write(END) for link in self.links.values())), CLOSING_S)

    def _hand(self, link: _Link, ask: _Ask) -> None:
        if ask.giving_up:
            ask.giving_up.cancel()
        if ask.link is link or ask.reply.done():
            return
        ask.link = link
        message, link.heard = ask.request.write(link.heard)
        ask.of, ask.sent_s, ask.got_s = sha256(message), time.monotonic(), 0.0
        self._soon(link.write(message))

    def _miss(self, device: int, ask: _Ask) -> None:
        """Waits for a device that is away, and no longer than may be."""

        wait_s = max(self.terms.patience_s, self.opened_s + FIRST_S - time.monotonic())
        why = f"device-{device}: away for {wait_s:.3g} s, its task is lost ({ask.request.what})"
        ask.giving_up = self.loop.call_later(wait_s, self._lose, ask, why)

    def _lose(self, ask: _Ask, why: str) -> None:
        if not ask.reply.done():
            self.terms.say(why)
            ask.reply.set_result(None)

    def _overdue(self, device: int, ask: _Ask) -> None:
        """Gives up a task whose time is over."""
        if ask.reply.done():
            return
        if ask.link:
            self.tardy[device] = f"{ask.request.what}: not within {ask.request.within_s:.3g} s"
        self._lose(ask, f"device-{device}: late, nobody waits for it ({ask.request.what})")

    def _turn_out(self) -> None:
        """Asks those to leave whose certificates are revoked or have expired since they came."""
        refused = revoked(self.terms.pilot)
        for link in self.links.values():
            if why := unwanted(link.peer, refused):
                link.leave(why)

    def _soon(self, work: Coroutine[None, None, None]) -> None:
        task = self.loop.create_task(work)
        _running.add(task)
        task.add_done_callback(_running.discard)

    async def attend(self, _: object, context: grpc.aio.ServicerContext) -> None:
        """One node's stream, from its hello to its end."""
        link = await self._admit(context)
        device = link.peer.device
        assert device is not None
        if old := self.links.get(device):
            old.leave(f"another connection took the place of this one of {link.peer.name}")
        self.links[device] = link
        self.came.set()
        version, torch = link.hello.versions.fedprune, link.hello.versions.torch
        self.board.know(device, version=version, torch=torch, machine=link.hello.machine)
        self.board.see(device, "up")
        self.tardy.pop(device, None)
        self.terms.say(f"{link.peer.name}: here ({link.hello.machine})")
        try:
            if self.terms.order:
                await link.write(self.terms.order.encode())
            if ask := self.asks.get(device):
                self._hand(link, ask)
            self._greet(device)
            await self._listen(link, device)
        finally:
            if self.links.get(device) is link:
                del self.links[device]
                ask = self.asks.get(device)
                left = f", and {ask.request.what} is not done" if ask and not ask.reply.done() else ""
                why = link.why or ("the run is over" if self.over else f"gone{left}")
                self.board.see(device, "refused" if link.why else "away", why)
                self.terms.say(f"{link.peer.name}: gone{f' ({link.why})' if link.why else ''}{left}")
                if ask and not ask.reply.done():
                    self._miss(device, ask)

    async def _listen(self, link: _Link, device: int) -> None:
        leaving = asyncio.ensure_future(link.leaving.wait())
        try:
            while True:
                reading = asyncio.ensure_future(link.context.read())
                await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if link.leaving.is_set():
                    reading.cancel()
                    await _refuse(link.context, Code.PERMISSION_DENIED, link.why)
                data = await reading
                if data is grpc.aio.EOF:
                    return
                try:
                    self._take(device, read_from_node(data))
                except (ValueError, IndexError, KeyError, TypeError) as error:
                    link.why = f"a message was refused: {error}"
                    await _refuse(link.context, Code.INVALID_ARGUMENT, link.why)
        finally:
            leaving.cancel()

    def _take(self, device: int, message: Sealed) -> None:
        """Takes what a node says of a task; what it says of one that is out no longer is passed over."""
        ask, header = self.asks.get(device) or self.guests.get(device), message.header
        if ask is None or header["of"] != ask.of or ask.reply.done():
            return
        now_s = time.monotonic()
        if header["kind"] == "got":
            ask.got_s = now_s
            return
        reply = reply_in(message, ask.request, ask.sent_s, ask.got_s or ask.sent_s, now_s)
        ask.reply.set_result(reply)
        self.board.know(device, round=ask.request.round)
        if device >= self.terms.devices:
            self._meet(device, ask, reply)
        if ask.request.due_s is not None:
            self.tardy.pop(device, None)
            if now_s - ask.sent_s > ask.request.due_s:
                took = f"{now_s - ask.sent_s:.3g} s, {ask.request.due_s:.3g} s are given"
                self.tardy[device] = f"{ask.request.what}: {took}"

    async def _admit(self, context: grpc.aio.ServicerContext) -> _Link:
        """Returns the link of a node that may take part; refuses any other."""
        try:
            peer = peer_of(context.auth_context()["x509_pem_cert"][0])
            refused = revoked(self.terms.pilot)
        except (FedpruneError, KeyError, IndexError) as error:
            await self._turn_away(context, Code.PERMISSION_DENIED, f"{context.peer()}: {error}")
        if why := unwanted(peer, refused):
            await self._turn_away(context, Code.PERMISSION_DENIED, why, peer)
        if peer.device is None or (peer.device >= self.terms.devices and not self.terms.cards):
            why = f"{peer.name} is no device of this pilot: it has device-0 to device-{self.terms.devices - 1}"
            await self._turn_away(context, Code.PERMISSION_DENIED, why, peer)
        try:
            data = await asyncio.wait_for(context.read(), HELLO_S)
            hello = read_hello(data if isinstance(data, bytes) else b"")
        except (ValueError, TimeoutError) as error:
            await self._turn_away(context, Code.INVALID_ARGUMENT, f"{peer.name}: its hello was refused: {error}", peer)
        if why := self.terms.unfit(peer.device, hello):
            if peer.device not in self.links:
                self.board.know(peer.device, version=hello.versions.fedprune, torch=hello.versions.torch)
            await self._turn_away(context, Code.FAILED_PRECONDITION, why, peer)
        return _Link(peer, hello, context)

    async def _turn_away(
        self, context: grpc.aio.ServicerContext, code: grpc.StatusCode, why: str, peer: Peer | None = None
    ) -> NoReturn:
        self.terms.say(f"refused: {why}")
        if peer and peer.device is not None and peer.device not in self.links:  # else somebody else has its certificate
            self.board.see(peer.device, "refused", why)
        await _refuse(context, code, why)

    # --- for whoever watches ----------------------------------------------------------------------------------------------

    async def show(self) -> None:
        """Keeps the pilot's nodes.json true until the desk closes."""
        while not self.closing.is_set():
            self._observe()
            await asyncio.to_thread(self.board.write, self.board.news())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.closing.wait(), SHOW_S)
        self._observe()
        gathered = self.terms.order is None  # the run is yet to begin
        await asyncio.to_thread(self.board.write, self.board.news(serving=gathered))

    def _observe(self) -> None:
        """Notes of the nodes that are here which do not say a word, and which are late."""
        now_s = time.monotonic()
        for device in self.links:
            ask, state = self.asks.get(device) or self.guests.get(device), "late" if device in self.tardy else "up"
            why = self.tardy.get(device) or self.began.get(device, "")
            if ask and ask.link is self.links[device] and not ask.reply.done():
                out_s, due_s = now_s - ask.sent_s, ask.request.due_s
                if not ask.got_s and out_s > SILENT_S:
                    state, why = "silent", f"{ask.request.what}: does not say that it is there"
                elif due_s is not None and out_s > due_s:
                    state, why = "late", f"{ask.request.what}: not within {due_s:.3g} s"
            self.board.see(device, state, why)


_running: set[asyncio.Task[None]] = set()  # tasks that nobody else holds


async def _refuse(context: grpc.aio.ServicerContext, code: grpc.StatusCode, why: str) -> NoReturn:
    await context.abort(code, why)
    raise AssertionError  # abort has raised


@contextlib.contextmanager
def desk(address: str, terms: Terms) -> Iterator[Desk]:
    """Yields a desk that nodes reach at `address`, HOST:PORT; raises OutputError when it cannot be had."""
    identity = read_identity(terms.pilot / "server")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="desk", daemon=True)
    thread.start()

    async def start() -> tuple[Desk, grpc.aio.Server]:
        here = Desk(terms, loop)
        server = grpc.aio.server(options=options(terms.most_bytes))
        handler = grpc.stream_stream_rpc_method_handler(here.attend)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {ATTEND: handler}),))
        pair = [(identity.key, identity.own)]
        server.add_secure_port(address, grpc.ssl_server_credentials(pair, identity.ca, require_client_auth=True))
        await server.start()
        return here, server

    def wait(work: Coroutine[None, None, T], seconds: float | None = None) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(seconds)

    try:
        here, server = wait(start())
    except RuntimeError as error:
        loop.call_soon_threadsafe(loop.stop)
        raise OutputError(f"cannot listen at {address}: {' '.join(str(error).split())[:200]}") from None
    showing = asyncio.run_coroutine_threadsafe(here.show(), loop)
    try:
        yield here
    finally:
        loop.call_soon_threadsafe(here.closing.set)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            showing.result(CLOSING_S)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            wait(server.stop(0.5), CLOSING_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSING_S)
