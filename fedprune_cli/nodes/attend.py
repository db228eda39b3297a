"""A node's stream to the server: it comes again whenever it is broken, until the run is over or the server refuses it."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedprune_cli.errors import CheckpointError
from fedprune_cli.nodes.certificates import Identity, read_identity
from fedprune_cli.nodes.channel import METHOD, REFUSALS, grpc, options
from fedprune_cli.nodes.post import Post, node_for
from fedprune_cli.nodes.protocol import got, hello_of, read_from_server, sha256
from fedprune_cli.store.sealed import Sealed

if TYPE_CHECKING:
    from fedprune_cli.nodes.node import Node
    from fedprune_cli.nodes.orders import Heard

MOST_BYTES = 2**30
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 1.0
TLS = ("certificate", "hostname verification", "peer name")  # in what gRPC says of a server that is not the right one


def attend(post: Post) -> None:
    """Does the server's tasks until the run is over. Raises CheckpointError when the server refuses this node, or is not the right one."""
    hello = hello_of(post.place.samples.card(labels=post.labels)).encode()
    duty, pause_s, told = _Duty(post), FIRST_PAUSE_S, ""
    while why := _session(duty, hello):
        if duty.spoken_to:
            pause_s, told = FIRST_PAUSE_S, ""
        if why != told:
            post.say(f"device-{post.place.device}: {post.address}: {why}; trying again")
        told = why
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _session(duty: _Duty, hello: bytes) -> str:
    """Follows one stream to its end; returns why it broke, nothing when the run is over."""
    duty.spoken_to, post = False, duty.post
    with _channel(post.address, read_identity(post.folder)) as channel:
        outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        outgoing.put(hello)
        try:
            over = duty.follow(_read(channel.stream_stream(METHOD)(iter(outgoing.get, None))), outgoing)
        except grpc.RpcError as error:
            return _why(error)
        finally:
            outgoing.put(None)
    return "" if over else "the server closed the stream"


@dataclass
class _Duty:
    """What a node is at: the node for the run, and what it has heard of u. spoken_to: whether the stream had any message."""

    post: Post
    node: Node | None = None
    heard: Heard | None = None
    spoken_to: bool = False

    def follow(self, messages: Iterator[Sealed], outgoing: queue.SimpleQueue[bytes | None]) -> bool:
        """Does what it is told; returns whether the run is over."""
        for message in messages:
            self.spoken_to, kind = True, message.header["kind"]
            if kind == "end":
                return True
            if kind == "run":
                self.heard, self.node = None, node_for(self.post, message, self.node)
            elif self.node is not None:
                self.heard = _work(self.node, message, self.heard, outgoing)
        return False


def _read(stream: Iterator[bytes]) -> Iterator[Sealed]:
    for data in stream:
        try:
            yield read_from_server(data)
        except ValueError as error:
            raise CheckpointError(f"the server's message was refused: {error}") from None


def _work(node: Node, message: Sealed, heard: Heard | None, outgoing: queue.SimpleQueue[bytes | None]) -> Heard | None:
    """Does a task and hands in what comes of it; returns what the node has heard of u by now."""
    of = sha256(message.encode())
    if message.header["kind"] == "task":  # what a sum asks is answered as soon, and each byte of it counts
        outgoing.put(got(of))
    try:
        order, heard = node.read(message, heard)
    except ValueError as error:
        raise CheckpointError(f"the server's task was refused: {error}") from None
    outgoing.put(node.respond(of, order))
    return heard


def _channel(address: str, identity: Identity) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.own)
    return grpc.secure_channel(address, credentials, options(MOST_BYTES))


def _why(error: grpc.RpcError) -> str:
    """Returns why a stream broke that may be tried again; raises CheckpointError where it may not."""
    code, details = error.code(), " ".join(str(error.details()).split("last error: ")[-1].split())[:300]
    if code in REFUSALS:
        raise CheckpointError(f"the server refuses this node: {details}")
    if code == grpc.StatusCode.UNAVAILABLE and any(word in details.lower() for word in TLS):
        raise CheckpointError(f"not the server that this node's certificates are for: {details}")
    return details
