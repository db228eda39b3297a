"""Where a node stands, and the run that it works on, whatever carries its tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedprune_cli.nodes.data import Place
from fedprune_cli.nodes.limits import NO_LIMITS, Limits
from fedprune_cli.store.sealed import Sealed

if TYPE_CHECKING:
    from fedprune_cli.nodes.node import Node


@dataclass(frozen=True)
class Post:
    """Where a node stands: at which server, as whom, and what it is told in one line each. labels: whether their counts are told.

    limits: what it asks of every run, whatever the server says.
    """

    address: str
    folder: Path
    place: Place
    labels: bool
    say: Callable[[str], None]
    limits: Limits = NO_LIMITS


def node_for(post: Post, order: Sealed, node: Node | None) -> Node:
    """Returns the node of the run that the server's order names: the one that is there, unless the run is another one."""
    run, config = str(order.header["run"]), order.header["config"]
    if node is not None and node.run == run:
        return node
    from fedprune_cli.nodes.node import build_node  # PyTorch with it: who waits for this node sees it meanwhile

    node = build_node(post.place, run, config if isinstance(config, dict) else {})
    post.limits.refuse(node.device, node.purse)
    node.purse.open()
    post.say(f"device-{node.device}: works on {run}")
    return node
