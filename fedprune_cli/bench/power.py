"""What this machine draws while it trains and while it does nothing: by its own counters of energy, or by somebody's meter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedprune_cli.errors import ConfigError
from fedprune_cli.nodes.energy import SYS, read_counters

COUNTERS = SYS / "class" / "powercap"
SPELL_S = 2.0  # over which watts are averaged
ASSUMED_W = 5.0  # of one busy core, where nothing can be read: an assumption


@dataclass(frozen=True)
class Power:
    """Watts: dynamic_w of training on one thread, on top of idle_w; idle_w: None where it is not known; said: where they come from."""

    dynamic_w: float
    idle_w: float | None
    said: str


def of_meter(busy_w: float | None, idle_w: float | None) -> Power | None:
    """Returns what somebody read on a meter, None where nobody did; raises ConfigError for one without the other, or out of range."""
    if busy_w is None and idle_w is None:
        return None
    if busy_w is None or idle_w is None:
        raise ConfigError(
            f"--{'busy' if busy_w is None else 'idle'}-w: must be given beside --{'idle' if busy_w is None else 'busy'}-w"
        )
    if not 0 < idle_w < busy_w <= 1e6:
        raise ConfigError(
            f"--busy-w {busy_w:g} --idle-w {idle_w:g}: must be in (0, 1e+06], and more when busy than when idle"
        )
    return Power(busy_w - idle_w, idle_w, f"{busy_w:g} W busy, {idle_w:g} W idle by a meter")


def measure(work: Callable[[], object], counters: Path = COUNTERS) -> Power:
    """Returns the watts of this machine's processors at rest, and while it does the work again and again; else what is assumed."""
    idle_w = _watts(lambda: time.sleep(SPELL_S), counters)
    busy_w = None if idle_w is None else _watts(work, counters)
    if idle_w is None or busy_w is None:
        return Power(ASSUMED_W, None, f"energy not measured: {ASSUMED_W:g} W of one busy core assumed")
    if busy_w <= idle_w:  # somebody else kept it busy meanwhile
        return Power(
            ASSUMED_W,
            None,
            f"energy not measured, the machine was busy with other work: {ASSUMED_W:g} W of one busy core assumed",
        )
    said = f"{busy_w:.3g} W busy, {idle_w:.3g} W idle of its processors alone, by their own counters"
    return Power(busy_w - idle_w, idle_w, said)


def _watts(work: Callable[[], object], counters: Path) -> float | None:
    """Returns the mean watts while the work is done for SPELL_S or longer, None where there are no counters or they may not be read."""
    before, started = read_counters(counters, "package"), time.perf_counter()
    if not before:
        return None
    while time.perf_counter() - started < SPELL_S:
        work()
    after, taken_s = read_counters(counters, "package"), time.perf_counter() - started
    spent = [after[name].since(older) if name in after else None for name, older in before.items()]
    known = [joules for joules in spent if joules is not None]
    return sum(known) / taken_s if len(known) == len(spent) else None
