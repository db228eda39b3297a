"""The same rounds on real nodes: `enroll` certificates, `serve` a run, and `join` it from a node."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedprune_cli.commands.look import print_run
from fedprune_cli.commands.options import ConfigDir, Json, Overrides, Plugins, Quiet
from fedprune_cli.errors import ConfigError
from fedprune_cli.terminal import note, say, status

PilotFolder = Annotated[Path, typer.Argument(metavar="PILOT", help="The folder with the pilot's certificates.")]


def enroll(
    pilot: PilotFolder,
    devices: Annotated[list[int], typer.Argument(metavar="DEVICE...", help="Numbers of devices: 0 1 2.", min=0)],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="A name or address at which nodes reach the server; the first time, repeatable."),
    ] = None,
    days: Annotated[int, typer.Option(help="For how long new certificates are valid.", min=1, max=3650)] = 365,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="Put the devices' certificates on the list of those that are refused.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Make certificates for the devices of a pilot: of its own authority, of the server, and a folder for each node.

    The folder PILOT/device-K is what is brought to the node; the authority's key stays in PILOT.
    """
    from fedprune_cli.nodes import certificates

    if revoke:
        for device in devices:
            certificates.revoke(pilot, device)
            say(f"revoked: device-{device}; a server that runs turns it out before the next task")
        return
    if not (pilot / certificates.CA).exists():
        certificates.begin(pilot, host or [], days)
    elif host:
        raise ConfigError("--host: the server has its certificate already")
    for device in devices:
        say(f"written: {certificates.enroll(pilot, device, days)}")


class Step(StrEnum):
    """What `fedprune pilot` can do."""

    INIT = "init"


def pilot(
    step: Annotated[Step, typer.Argument(metavar="init", help="Write what is not there yet.")],
    pilot: PilotFolder,
    devices: Annotated[list[int], typer.Argument(metavar="DEVICE...", help="Numbers of devices: 0 1 2.", min=0)],
    host: Annotated[str, typer.Option("--host", help="The name or address at which nodes reach the SuperLink.")],
    port: Annotated[int, typer.Option(help="Its port.", min=1, max=65535)] = 8443,
    days: Annotated[int, typer.Option(help="For how long new certificates are valid.", min=1, max=3650)] = 365,
    quiet: Quiet = False,
) -> None:
    """Write what a pilot over Flower needs: certificates as enroll does, the app, each node's key, and systemd units.

    A device that has a certificate and a key keeps them. PILOT/device-K is what is brought to the node.
    """
    from fedprune_cli.nodes import certificates
    from fedprune_cli.nodes.flower import write_pilot

    if not (pilot / certificates.CA).exists():
        certificates.begin(pilot, [host], days)
    for device in devices:
        if not certificates.is_enrolled(pilot, device):
            certificates.enroll(pilot, device, days)
    for path in write_pilot(pilot, devices, host, port):
        say(f"written: {path}")


def serve(
    pilot: PilotFolder,
    overrides: Overrides = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT where nodes come, 0.0.0.0:8443 unless given; not for Flower.")
    ] = None,
    config_dir: ConfigDir = None,
    plugin: Plugins = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run one experiment over the nodes of a pilot; the same command again continues it.

    The first time it waits for all enrolled devices and writes PILOT/roster.json. The nodes keep their data and their personalized parts.
    """
    from fedprune_cli.config.compose import compose_config
    from fedprune_cli.config.plain import plain
    from fedprune_cli.many.one import SHOWN, resumable, run_to_end
    from fedprune_cli.nodes.pilot import CARRIERS, ROSTER, Pilot
    from fedprune_cli.runs.life import begin_or_reopen

    given = ["data=nodes", f"data.file={pilot / ROSTER}", *(overrides or [])]
    kind = str(compose_config(given, config_dir).execution.kind)
    if kind not in CARRIERS:
        raise ConfigError(f"execution.kind={kind}: must be one of {', '.join(CARRIERS)}, got {kind!r}")
    if listen and kind == "flower":
        raise ConfigError(
            "--listen: with Flower nodes come to its SuperLink, whose unit is PILOT/flower/superlink.service"
        )
    site = Pilot(pilot, listen or "0.0.0.0:8443", note, kind=kind)
    with status("waiting for the nodes"):
        count = len(site.roster())
    keys = {override.lstrip("+").partition("=")[0] for override in given}
    fleet = (
        {"devices.count": count, "devices.fresh": 0} if not keys & {"devices", "devices.count", "devices.fresh"} else {}
    )
    config = compose_config([*given[:2], *[f"{key}={value}" for key, value in fleet.items()], *given[2:]], config_dir)
    setup = begin_or_reopen(config)
    run_dir = setup.experiment.run_dir
    with resumable(run_dir):
        page = run_to_end(setup, run_dir, SHOWN, site=replace(site, config=plain(config, resolve=True)))
        print_run(run_dir, page, as_json=as_json)


def join(
    folder: Annotated[
        Path, typer.Argument(metavar="NODE", help="The node's folder: what enroll wrote as PILOT/device-K.")
    ],
    server: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="Where the server listens, or Flower's SuperLink.")
    ],
    overrides: Overrides = None,
    part: Annotated[
        int | None,
        typer.Option(help="Which device's samples of the split data are this node's; without it all are.", min=0),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Tell the server how many samples of each class there are.")
    ] = False,
    secure: Annotated[
        bool, typer.Option("--secure", help="Take part in secure sums only: no server sees this node's update.")
    ] = False,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Take part in runs with privacy.dp only, and in no more of them than spend this together, at --delta.",
            min=0.0,
        ),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="What the deltas of all its runs together may be.", min=0.0, max=1.0)
    ] = None,
    tests: Annotated[
        int | None,
        typer.Option(
            help="In no more runs with privacy.dp than test this many models together: no noise hides scores.", min=1
        ),
    ] = None,
    flower: Annotated[
        bool,
        typer.Option("--flower", help="Tasks come by Flower: start a SuperNode, and do what it brings until stopped."),
    ] = False,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Take part as a node: data and personalized part stay in its folder, tasks come from the server.

    The first time the overrides say what its data are (data=table data.file=...), of which it writes samples.safetensors; later
    they are read from there. What --secure, --epsilon, --delta and --tests ask for is kept there too, and a later join can only narrow it.
    """
    from fedprune_cli.nodes.certificates import device_in
    from fedprune_cli.nodes.data import SAMPLES, Place, read_samples, write_samples
    from fedprune_cli.nodes.limits import Limits, remembered
    from fedprune_cli.nodes.post import Post
    from fedprune_cli.store.lock import locked

    if (epsilon is None) != (delta is None):
        raise ConfigError("--epsilon and --delta: give both or none, since an epsilon is one at a delta")
    if flower:
        from fedprune_cli.nodes.flower import attend
    else:
        from fedprune_cli.nodes.attend import attend

    device = device_in(folder)
    if not (folder / SAMPLES).exists():
        from fedprune_cli.nodes.own import own_samples

        with status("loading data"):
            write_samples(folder, own_samples(overrides or [], part))
    elif overrides:
        raise ConfigError(f"{overrides[0]}: this node has its data, {folder / SAMPLES}; remove it to give it others")
    with locked(folder, what="as this node"):  # two would spend one budget twice
        limits = remembered(folder, Limits(secure, epsilon, delta, tests))
        attend(Post(server, folder, Place(device, folder, read_samples(folder)), labels, note, limits))
