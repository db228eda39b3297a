"""Rehearses a pilot on one machine: three nodes as processes, each slowed, each behind a slow link, and both arms on the measured clock.

usage: rehearsal.py [--out DIR] [--seeds 0,1,2] [--rounds N] [--duties 0.2,0.1,0.05] [--links UP:DOWN:MS,...]

A node's processor time is held to its duty, a share of one core: this process looks every few milliseconds at what it has used, stops it
by SIGSTOP where that is too much, and lets it go on by SIGCONT. A link is a TCP proxy of this process: UP and DOWN bytes per second, and
MS milliseconds each way. Nothing needs root, cgroups or tc. Nodes are held from the end of the very first round on: before, they import
PyTorch. They build each run's model in its first round, which therefore counts as much as the median of the others.

Steps: a run of `proposed` that plans with an imagined fleet; `fedprune calibrate --run` of it; then `personalized` and `proposed`, which
plan with what was fitted, on each seed. Runs that are finished are read, and interrupted ones go on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

FEDPRUNE = (sys.executable, "-m", "fedprune_cli")
NODES, TARGET = 3, 0.85
SPLIT = ("data=digits", f"devices.count={NODES}", "devices.fresh=0")
TASK = (
    "model.hidden=[512]", "pruner.granularity=channel", "training.shared_steps=30", "training.personal_steps=10",
    "deadline.fraction=0.5", "meter.unicast=true",
)  # fmt: skip
ARMS = ("personalized", "proposed")
TICK_S = 0.004  # between two looks at what a node has used
CREDIT_S = 0.02  # of processor time that an idle node may save up
PIECE = 4096  # bytes that a link carries at a time
BUFFER = 32 * 1024  # bytes of the proxy's sockets: what is in them is on no link


@dataclass(frozen=True)
class Link:
    """Bytes per second from and to a node, and how long each byte takes either way."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    latency_s: float

    @classmethod
    def of(cls, text: str) -> Link:
        up, down, ms = (float(part) for part in text.split(":"))
        return cls(up, down, ms / 1e3)


# --- a slow link ----------------------------------------------------------------------------------------------------


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: float, latency_s: float) -> None:
    """Carries bytes at a rate; each arrives its latency after it left. A sender that is too fast is held back by its own socket."""
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    async def arrive() -> None:
        while True:
            due_s, piece = await under_way.get()
            await asyncio.sleep(max(due_s - loop.time(), 0))
            if not piece:
                break
            writer.write(piece)
            await writer.drain()
        writer.close()

    arriving, free_s = asyncio.ensure_future(arrive()), loop.time()
    try:
        while piece := await reader.read(PIECE):
            free_s = max(free_s, loop.time()) + len(piece) / rate
            await asyncio.sleep(max(free_s - loop.time(), 0))
            under_way.put_nowait((free_s + latency_s, piece))
    except OSError:  # the node or the server went
        pass
    under_way.put_nowait((loop.time() + latency_s, b""))
    with contextlib.suppress(OSError):
        await arriving


@contextlib.asynccontextmanager
async def proxy(server_port: int, link: Link) -> AsyncIterator[int]:
    """Yields the port at which the server is reached over a link."""

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", server_port, limit=BUFFER)
        except OSError:
            writer.close()
            return
        for one in (writer, back):
            for side in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                one.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, side, BUFFER)
        await asyncio.gather(
            carry(reader, back, link.up_bytes_per_s, link.latency_s),
            carry(there, writer, link.down_bytes_per_s, link.latency_s),
        )

    async with await asyncio.start_server(meet, "127.0.0.1", 0, limit=BUFFER) as listening:
        yield listening.sockets[0].getsockname()[1]


# --- a slow node ----------------------------------------------------------------------------------------------------


def used_s(pid: int) -> float:
    """Returns the processor time that a process has used, all its threads together."""
    return time.clock_gettime((~pid << 3) | 2)  # the clock that clock_getcpuclockid names on Linux


async def hold(process: asyncio.subprocess.Process, duty: float, begun: Callable[[], bool]) -> None:
    """Holds a process to its share of one core from when it has begun, until it ends."""
    while not begun():
        await asyncio.sleep(0.05)
        if process.returncode is not None:
            return
    stopped, before_s, now_s, credit_s = False, used_s(process.pid), time.monotonic(), 0.0
    while process.returncode is None:
        await asyncio.sleep(TICK_S)
        try:
            took_s, before_s = (used := used_s(process.pid)) - before_s, used
            passed_s, now_s = (now := time.monotonic()) - now_s, now
            most_s = (
                max(credit_s, CREDIT_S) if not stopped else math.inf
            )  # who was stopped for too long is owed that time
            credit_s = min(credit_s + duty * passed_s - took_s, most_s)
            if stopped != (credit_s < 0):
                stopped = not stopped
                process.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)
        except (ProcessLookupError, OSError):
            return


# --- a run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the pilot is, how its nodes are held, and over what they reach the server."""

    out: Path
    duties: Sequence[float]
    links: Sequence[Link]

    @property
    def pilot(self) -> Path:
        return self.out / "pilot"


async def start(log: Path, *words: str) -> asyncio.subprocess.Process:
    with log.open("ab") as said:
        return await asyncio.create_subprocess_exec(*words, stdout=said, stderr=said)


def rounds_in(run_dir: Path) -> int:
    path = run_dir / "timings.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextlib.asynccontextmanager
async def nodes(place: Place, port: int, begun: Callable[[], bool]) -> AsyncIterator[None]:
    """Has the nodes come to the server's port, each over its link, and holds them from when something has begun."""
    async with contextlib.AsyncExitStack() as stack:
        for device, (duty, link) in enumerate(zip(place.duties, place.links, strict=True)):
            to = await stack.enter_async_context(proxy(port, link))
            words = (__file__, "--node", str(place.pilot / f"device-{device}"), f"127.0.0.1:{to}")
            process = await start(place.out / f"device-{device}.log", sys.executable, *words)
            stack.push_async_callback(end, process)
            holding = asyncio.ensure_future(hold(process, duty, begun))
            stack.callback(holding.cancel)
        yield


def be_a_node(folder: Path, address: str) -> None:
    """Joins run after run, in one process: what it imports is there for the next one."""
    from fedprune_cli.commands.pilot import join

    device = int(folder.name.rpartition("-")[2])
    while True:
        there = (folder / "samples.safetensors").exists()
        join(folder, address, None if there else [*SPLIT], part=None if there else device)


async def serve(place: Place, port: int, run_dir: Path, *overrides: str) -> None:
    """Makes a run over the nodes, or goes on with it; exits where it fails."""
    words = ("serve", str(place.pilot), *TASK, *overrides, f"out={run_dir}", "--listen", f"127.0.0.1:{port}")
    server = await start(place.out / "server.log", *FEDPRUNE, *words)
    try:
        code = await server.wait()
    finally:
        await end(server)
    if code:
        sys.exit(f"rehearsal: serve ended with {code}; see {place.out / 'server.log'}")


async def end(process: asyncio.subprocess.Process) -> None:
    """Ends a process that has not ended by itself, also one that is stopped."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


async def rehearse(place: Place, seeds: Sequence[int], rounds: int) -> None:
    place.out.mkdir(parents=True, exist_ok=True)
    if not place.pilot.exists():
        words = ("enroll", str(place.pilot), *map(str, range(NODES)), "--host", "127.0.0.1")
        await (await start(place.out / "server.log", *FEDPRUNE, *words)).wait()
    runs = [place.out / "imagined", *(place.out / f"{arm}-s{seed}" for seed in seeds for arm in ARMS)]
    port, before = free_port(), sum(map(rounds_in, runs))
    done = all(rounds_in(run_dir) >= rounds for run_dir in runs)
    async with contextlib.nullcontext() if done else nodes(place, port, lambda: sum(map(rounds_in, runs)) > before):
        if rounds_in(runs[0]) < rounds:
            await serve(place, port, runs[0], "method=proposed", f"rounds={rounds}")
        words = ("calibrate", "--run", str(runs[0]), "--out", str(place.out / "fit"))
        if await (await asyncio.create_subprocess_exec(*FEDPRUNE, *words)).wait():
            sys.exit("rehearsal: nothing was fitted")
        fitted = ("--config-dir", str(place.out / "fit"), "devices=fitted", "channel=fitted", f"rounds={rounds}")
        for run_dir in runs[1:]:
            arm, _, seed = run_dir.name.rpartition("-s")
            if rounds_in(run_dir) < rounds:
                await serve(place, port, run_dir, f"method={arm}", f"seed={seed}", *fitted)


# --- what came of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One run. Medians over its rounds but the first: modelled_s, measured_s: of a round, the second with tests and the server's work;
    training_s, compute_s, uplink_s: of the slowest node in each. to_target_s: modelled and measured, None where it is not reached.
    """

    modelled_s: float
    measured_s: float
    training_s: float
    compute_s: float
    uplink_s: float
    to_target_s: tuple[float, float] | None


def read(run_dir: Path) -> Arm:
    records, timings = (
        [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
        for name in ("rounds.jsonl", "timings.jsonl")
    )
    modelled, measured = [one["latency_s"] for one in records], [one["wall_s"] for one in timings]
    measured[0] = statistics.median(measured[1:])  # the nodes built their models in it
    reached = next((at + 1 for at, one in enumerate(records) if one["accuracy"] >= TARGET), None)
    parts = [
        statistics.median(max(sum(node[key] for key in keys) for node in one["nodes"]) for one in timings[1:])
        for keys in (("downlink_s", "compute_s", "uplink_s"), ("compute_s",), ("uplink_s",))
    ]
    to_target = None if reached is None else (sum(modelled[:reached]), sum(measured[:reached]))
    return Arm(statistics.median(modelled[1:]), measured[0], *parts, to_target)


def report(out: Path, seeds: Sequence[int]) -> None:
    """Prints the arms, modelled beside measured, and what `proposed` saves on either clock."""
    arms = {(arm, seed): read(out / f"{arm}-s{seed}") for seed in seeds for arm in ARMS}
    print(f"\nseconds of a round{'of the slowest node':>43}{f'to {TARGET:.0%}':>17}")
    print(
        f"{'run':16}{'model':>6}{'clock':>7}{'off by':>8}{'training':>10}{'compute':>9}{'uplink':>8}{'model':>8}{'clock':>7}"
    )
    for (arm, seed), of in arms.items():
        target = ("-", "-") if of.to_target_s is None else tuple(f"{seconds:.1f}" for seconds in of.to_target_s)
        off = f"{100 * (of.modelled_s / of.measured_s - 1):+.0f} %"
        print(
            f"{f'{arm}-s{seed}':16}{of.modelled_s:>6.2f}{of.measured_s:>7.2f}{off:>8}{of.training_s:>10.2f}{of.compute_s:>9.2f}"
            f"{of.uplink_s:>8.2f}{target[0]:>8}{target[1]:>7}"
        )
    rounds = [[(one.modelled_s, one.measured_s) for one in (arms[arm, seed] for arm in ARMS)] for seed in seeds]
    print(f"proposed saves of a round {_saved(rounds)}")
    targets = [[arms[arm, seed].to_target_s for arm in ARMS] for seed in seeds]
    reached = [[one for one in pair if one is not None] for pair in targets]
    both = [pair for pair in reached if len(pair) == len(ARMS)]
    print(
        f"proposed saves of the time to the target {_saved(both) if both else 'nothing that is known: not both reached it'}"
    )


def _saved(pairs: Sequence[Sequence[tuple[float, float]]]) -> str:
    """Returns what the second of each pair saves of the first, by the model and by the clock: the mean and the range over the seeds."""
    texts = []
    for clock in (1, 0):
        saved = [100 * (1 - new[clock] / old[clock]) for old, new in pairs]
        texts.append(f"{statistics.mean(saved):.0f} % ({min(saved):.0f} to {max(saved):.0f})")
    return f"{texts[0]} by the clock, {texts[1]} by the model; seeds: {len(pairs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--node", nargs=2, metavar=("FOLDER", "HOST:PORT"), help="be one of the nodes; this script starts them so"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/rehearsal"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--duties", default="0.2,0.1,0.05")
    parser.add_argument("--links", default="40e3:160e3:20,25e3:100e3:40,16e3:64e3:60")
    given = parser.parse_args()
    if given.node:
        be_a_node(Path(given.node[0]), given.node[1])
    links, duties = (
        [Link.of(text) for text in given.links.split(",")],
        [float(duty) for duty in given.duties.split(",")],
    )
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if len(links) != NODES or len(duties) != NODES:
        parser.error(f"there are {NODES} nodes: --duties and --links must have one for each")
    for device, (duty, link) in enumerate(zip(duties, links, strict=True)):
        ways = f"{link.up_bytes_per_s / 1e3:g} kB/s up, {link.down_bytes_per_s / 1e3:g} kB/s down, {1e3 * link.latency_s:g} ms each way"
        print(f"device-{device}: {100 * duty:g} % of a core, {ways}", flush=True)
    asyncio.run(rehearse(Place(given.out, duties, links), seeds, given.rounds))
    report(given.out, seeds)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)  # the code that this file belongs to
    main()
