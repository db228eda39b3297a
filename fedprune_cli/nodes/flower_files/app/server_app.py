"""At the SuperLink, one process a run: `fedprune serve` has this process's grid do what it asks for, until it goes."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from multiprocessing.connection import Client

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Answers `serve` until it closes the connection."""
    with Client(context.run_config["socket"], "AF_UNIX") as server:
        while True:
            try:
                asked = json.loads(server.recv_bytes())
            except (EOFError, OSError):
                return
            server.send_bytes(json.dumps(_answer(grid, asked)).encode())


def _answer(grid: Grid, asked: Mapping[str, list]) -> list:  # type: ignore[type-arg]  # of JSON
    """Sends [node, bytes] and returns the messages' names; or returns what there is of replies to such names; or who is there."""
    if "push" in asked:
        contents = [(node, ConfigRecord({"bytes": base64.b64decode(data)})) for node, data in asked["push"]]
        return [*grid.push_messages([Message(RecordDict({"fedprune": of}), node, "train") for node, of in contents])]
    if "pull" in asked:
        return [_reply(message) for message in grid.pull_messages(asked["pull"])]
    return [*grid.get_node_ids()]


def _reply(message: Message) -> list[str]:
    """Returns the name of the message that it replies to, what went wrong, and the bytes."""
    of = message.metadata.reply_to_message_id
    if message.has_error():
        return [of, message.error.reason or f"error {message.error.code}", ""]
    return [of, "", base64.b64encode(message.content["fedprune"]["bytes"]).decode()]
