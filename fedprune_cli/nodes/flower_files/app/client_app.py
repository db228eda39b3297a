"""On a node, in a new process for each message: the warm worker beside it, `fedprune join`, does the work."""

from __future__ import annotations

from multiprocessing.connection import Client

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
def work(message: Message, context: Context) -> Message:
    """Returns what the worker answers."""
    with Client(context.node_config["socket"], "AF_UNIX") as worker:
        worker.send_bytes(message.content["fedprune"]["bytes"])
        answer = worker.recv_bytes()
    return Message(RecordDict({"fedprune": ConfigRecord({"bytes": answer})}), reply_to=message)
