"""Whether what is to be read fits into memory, asked before it is read."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from fedprune_cli.errors import DeviceError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Returns the memory that this process can still have: the system's, or what its control group leaves; None where nobody says."""
    found = []
    with contextlib.suppress(OSError, AttributeError):
        found += [1024 * int(kib) for kib in re.findall(r"^MemAvailable: +(\d+) kB", MEMINFO.read_text(), re.MULTILINE)]
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = re.findall(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        found.append(max(limit - used + sum(map(int, cached)), 0))
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # not Linux: all that there is
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def check_room(what: str, needed: int, instead: str) -> None:
    """Raises DeviceError with both figures when `needed` bytes are more than there are; `instead` says what to do."""
    available = available_bytes()
    if available is not None and needed > available:
        raise DeviceError(
            f"{what}: reading it takes about {_gib(needed)} of memory, {_gib(available)} are available; {instead}"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
