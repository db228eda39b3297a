"""What is watched for those who are not at the terminal: a page, the same for Prometheus, and a message when a limit is broken."""

from __future__ import annotations

import contextlib
import html
import http.client
import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from fedprune_cli.audit.fleet import HEADERS, name_of
from fedprune_cli.audit.watch import Limit, Look
from fedprune_cli.errors import ConfigError, OutputError, one_line
from fedprune_cli.nodes.board import STATES
from fedprune_cli.terminal import note

LOCAL = "127.0.0.1"
REFRESH_S = 2
POST_S = 5.0  # within which whoever is told of a broken limit has to answer
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a browser loads nothing, whatever a name says

# of a run: the figure, its name for Prometheus, and what it is
GAUGES: tuple[tuple[str, str, str], ...] = (
    ("latency_s", "latency_seconds", "Modelled seconds of the last round."),
    ("simulated_s", "simulated_seconds", "Modelled seconds of all rounds so far."),
    ("mean_ratio", "mean_ratio", "Mean pruning ratio of the last round."),
    ("accuracy", "accuracy", "Accuracy over devices, weighted by samples."),
    ("accuracy_p10", "accuracy_p10", "Accuracy of the 10th percentile of devices."),
    ("fresh_accuracy", "fresh_accuracy", "Accuracy on a fresh device."),
    ("bytes_up", "sent_bytes", "Modelled bytes sent by all devices so far."),
    ("joules", "energy_joules", "Modelled energy of all devices so far."),
    ("cost", "cost", "Cost of bytes and energy so far, at the prices given."),
)


@dataclass(frozen=True)
class Seen:
    """What was seen last, beside its limits; name: what is watched."""

    name: str
    look: Look
    limits: Sequence[Limit]

    def page(self) -> str:
        """Returns it as a page that needs no other file."""
        from fedprune_cli.report.page import html_page, html_section, html_table

        now, fleet = self.look, self.look.fleet
        body = [f"<p class=answer>{html.escape(now.words())}</p>"]
        body += [f"<p><strong>{html.escape(line)}</strong></p>" for line in now.broken]
        if fleet:
            body.append(html_section("Nodes", html_table(HEADERS, fleet.cells())))
        body.append(html_section("Figures", html_table(("figure", "now", "limit"), now.figures(self.limits))))
        note = "Seconds of nodes without waiting for others: measured by the server, and what the model says. Joules: of a node's "
        note += "machine while it worked, whatever else it did and idling included; the model's are those of computing and sending. "
        shown = f"{note * bool(fleet)}This page shows itself anew every {REFRESH_S} s; /metrics has the same for Prometheus."
        return html_page(self.name, [*body, f"<p class=note>{html.escape(shown)}</p>"])

    def metrics(self) -> str:
        """Returns it in Prometheus' text format; a figure that does not exist now is left out."""
        now, last = self.look, self.look.rows[-1] if self.look.rows else {}
        text = [
            _gauge("round", "The last finished round.", [({}, len(now.rows))]),
            _gauge("rounds_planned", "Rounds that the run is to have.", [({}, now.wanted_rounds)]),
            _gauge("finished", "1 once the run is finished.", [({}, int(now.finished))]),
            _gauge("running", "1 while a process runs it.", [({}, int(now.held))]),
        ]
        text += [_gauge(name, about, [({}, last.get(key))]) for key, name, about in GAUGES]
        broken = {line.split()[0] for line in now.broken}
        kept = [({"limit": str(limit)}, int(str(limit) in broken)) for limit in self.limits]
        return "".join([*text, _gauge("limit_broken", "1 once a limit was broken.", kept), *self._of_nodes()])

    def _of_nodes(self) -> list[str]:
        fleet = self.look.fleet
        if fleet is None:
            return []
        nodes, took = {name_of(node): node for node in fleet.nodes}, fleet.costs
        states = [
            ({"node": n, "state": state}, int(node.state == state)) for n, node in nodes.items() for state in STATES
        ]
        rounds = [({"node": n}, node.round) for n, node in nodes.items()]
        known = [
            ({"node": n, "version": node.version, "torch": node.torch, "machine": node.machine}, 1)
            for n, node in nodes.items()
        ]
        own = {name: took[node.device] for name, node in nodes.items() if node.device in took}
        measured = [({"node": name}, one.measured_s) for name, one in own.items()]
        modelled = [({"node": name}, one.modelled_s) for name, one in own.items()]
        drawn = [({"node": name, "of": one.drawn.of}, one.drawn.joules) for name, one in own.items() if one.drawn]
        modelled_j = [({"node": name}, one.modelled_j) for name, one in own.items()]
        return [
            _gauge("served", "1 while a server is there for the nodes.", [({}, int(fleet.served))]),
            _gauge("node_state", f"1 for the state of a node: {', '.join(STATES)}.", states),
            _gauge("node_since_seconds", "When it began, in Unix seconds.", [({"node": n}, of.since_s) for n, of in nodes.items()]),
            _gauge("node_round", "The round of a node's last answer to this server.", rounds),
            _gauge("node_measured_seconds", "What a node's last training took, waiting for others apart.", measured),
            _gauge("node_modelled_seconds", "What the model says that it takes.", modelled),
            _gauge("node_measured_joules", "What it drew while a node worked on it, where that is measured.", drawn),
            _gauge("node_modelled_joules", "What the model says that computing and sending draw.", modelled_j),
            _gauge("node_info", "What a node runs.", known),
        ]  # fmt: skip


def _gauge(name: str, about: str, samples: Sequence[tuple[Mapping[str, str], float | None]]) -> str:
    """Returns the lines of one metric, nothing where it has no sample."""
    lines = [f"fedprune_{name}{_labels(labels)} {float(value)!r}\n" for labels, value in samples if value is not None]
    return "".join([f"# HELP fedprune_{name} {about}\n# TYPE fedprune_{name} gauge\n", *lines]) if lines else ""


def _labels(labels: Mapping[str, str]) -> str:
    """Returns labels as Prometheus reads them: a backslash, a quote and a new line are escaped."""
    written = (value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for value in labels.values())
    inner = ",".join(f'{key}="{value}"' for key, value in zip(labels, written, strict=True))
    return f"{{{inner}}}" if inner else ""


@dataclass(frozen=True)
class Address:
    """Where the page is served."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"


def parse_address(text: str) -> Address:
    """Returns the address that HOST:PORT, or PORT alone for this machine only, says; raises ConfigError."""
    found = re.fullmatch(r"(?:(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]*):)?(\d{1,5})", text.strip())
    if not found or int(found[2]) > 65535:
        raise ConfigError(f"--serve {text}: must be HOST:PORT or PORT, such as 127.0.0.1:9100 or 9100")
    return Address((found[1] or LOCAL).strip("[]"), int(found[2]))


@dataclass
class Window:
    """What is served: the last look, None before the first one."""

    address: Address
    seen: Seen | None = None


@contextlib.contextmanager
def window(address: Address) -> Iterator[Window]:
    """Yields a window whose page is served until the end; raises OutputError when the address cannot be had."""
    shown = Window(address)

    class Page(BaseHTTPRequestHandler):
        server_version, sys_version, timeout = "fedprune", "", 10.0

        def do_GET(self) -> None:
            kinds = {"/": "text/html; charset=utf-8", "/metrics": "text/plain; version=0.0.4; charset=utf-8"}
            path = self.path.partition("?")[0]
            if path not in kinds or shown.seen is None:
                self.send_error(404 if path not in kinds else 503)
                return
            body = (shown.seen.page() if path == "/" else shown.seen.metrics()).encode(errors="replace")
            headers = {"Content-Type": kinds[path], "Content-Length": str(len(body)), "Cache-Control": "no-store"}
            headers |= {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
            headers |= {"Refresh": str(REFRESH_S)} if path == "/" else {}
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing: the terminal shows the run."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Says nothing of a browser that is gone."""

    try:
        server = Server((address.host, address.port), Page)
    except OSError as error:
        raise OutputError(f"--serve {address.host}:{address.port}: {error.strerror or error}") from None
    shown.address = replace(address, port=int(server.server_address[1]))
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True)
class Webhook:
    """Whom a broken limit is told. url: which may hold a secret, and is therefore said nowhere."""

    url: str

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and self.url.isprintable()
            fine = fine and " " not in self.url and parts.port != 0
        except ValueError:
            fine = False
        if not fine:
            raise ConfigError("--webhook: must be an address such as https://HOST/PATH")

    def tell(self, name: str, now: Look, broken: Sequence[str]) -> None:
        """Posts which limits are broken and what is seen, as JSON; where that fails says so in one line."""
        body = json.dumps({"watched": name, "broken": [*broken], **now.plain()}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=POST_S):
                return
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = getattr(error, "reason", None) or error
            note(f"--webhook {urlsplit(self.url).hostname}: {one_line(str(why))[:200]}; watching goes on")


def outward(
    looks: Iterator[Look], name: str, limits: Sequence[Limit], serve: str | None, webhook: str | None
) -> Iterator[Look]:
    """Yields the looks; shows each on a page and tells of each limit once that it is broken, where one of both is wanted."""
    hook, told = Webhook(webhook) if webhook else None, set[str]()
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(window(parse_address(serve))) if serve else None
        if shown:
            note(f"served: {shown.address}")
        for now in looks:
            if shown:
                shown.seen = Seen(name, now, limits)
            yield now
            new = [line for line in now.broken if line not in told]
            told.update(new)
            if hook and new:
                hook.tell(name, now, new)
