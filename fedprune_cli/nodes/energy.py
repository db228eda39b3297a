"""What a node's machine draws while it works, where Linux lets it be read; where not, it is not measured, which is no zero.

    psys     joules of the whole platform, as far as its maker wired it: RAPL's domain of that name, which some of Intel's processors have
    rapl     joules of all processor packages, Intel's and AMD's: cores, caches, built-in graphics; neither memory that has a domain of its
             own, nor disks, radio and power supply
    board    watts into a Jetson's module, by its INA3221: processor, GPU and memory, not the carrier board and what hangs on it
    battery  watts out of the batteries while they discharge: the whole device, screen and radio too

Each has in it what other processes do meanwhile, other nodes on the machine among them, and what the machine draws when it does nothing.
The first source of the four that can be read is taken. Counters give joules by difference; watts are read five times a second and
integrated by trapezoids.

What the files mean is in Linux' documentation: power/powercap/powercap.rst (`energy_uj`, `max_energy_range_uj`), hwmon/ina3221.rst
(`in1_input` in mV, `curr1_input` in mA, labels from the device tree), ABI/testing/sysfs-class-power (`status`, `power_now`, `current_now`,
`voltage_now`, in micro-units; drivers differ in the sign of a current). Since Linux 5.10 `energy_uj` is root's alone (CVE-2020-8694).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from fedprune_cli.store.files import fits

SYS = Path("/sys")
KINDS = ("psys", "rapl", "board", "battery")
# between readings, of the sources in the order in which they are looked for; a counter of 2^32 steps starts again after minutes
PERIODS_S = {"rapl": 30.0, "board": 0.2, "battery": 0.2}
MOST_W = 1e4  # that a node draws: more is a counter that was set back, as after a suspend, or garbage
TICK_S = 0.01  # within which a counter may tell of more time than has passed
TOTALS = ("VDD_IN",)  # labels of the rail that feeds all others; a channel without a label may feed anything


@dataclass(frozen=True)
class Spent:
    """What was measured: joules, above 0, and `of` what, one of KINDS."""

    joules: float
    of: str


def as_plain(spent: Spent | None) -> dict[str, float | str | None]:
    """Returns it as answers and timings have it, null where nothing was measured."""
    return {"joules": None, "joules_of": None} if spent is None else {"joules": spent.joules, "joules_of": spent.of}


def read_spent(told: Mapping[str, object]) -> Spent | None:
    """Returns what an answer or a row of timings says, None where it says nothing; raises ValueError for what nobody can have measured."""
    joules, of = told.get("joules"), told.get("joules_of")
    if joules is None and of is None:
        return None
    if not fits(joules, float) or float(str(joules)) <= 0 or of not in KINDS:
        said = f"{str(joules)[:20]} of {str(of)[:20]}"
        raise ValueError(f"joules that cannot be ({said}): must be above 0 and of {', '.join(KINDS)}, or both null")
    return Spent(float(str(joules)), str(of))


def read_row(row: Mapping[str, object]) -> tuple[Spent | None, float | None]:
    """Returns the joules in a node's row of timings.jsonl, measured and modelled, None where it has none; raises ValueError."""
    modelled = row.get("modelled")
    modelled_j = modelled.get("joules") if isinstance(modelled, Mapping) else None
    if not fits(modelled_j, (float, None)):
        raise ValueError("modelled joules are not a number")
    return read_spent(row), None if modelled_j is None else float(str(modelled_j))


@dataclass(frozen=True)
class Counter:
    """Joules that were counted so far, and at how many it starts again from 0, None where that is not said."""

    joules: float
    most_j: float | None

    def since(self, older: Counter) -> float | None:
        """Returns the joules since an older reading; None where it went back and does not say where it starts again."""
        step_j = self.joules - older.joules
        if step_j >= 0:
            return step_j
        return None if self.most_j is None else step_j + self.most_j


@dataclass(frozen=True)
class Sample:
    """One reading. of: a key of PERIODS_S; counters: of RAPL, by domain, such as package-0 and psys; watts: of the others."""

    of: str
    at_s: float
    counters: Mapping[str, Counter] = field(default_factory=dict)
    watts: float = 0.0


def read_counters(powercap: Path, domain: str) -> dict[str, Counter]:
    """Returns RAPL's counters of a domain, `package` or `psys`; nothing where one of them cannot be read: a part is not the whole.

    The packages stand in `intel-rapl-mmio:*` a second time, which is passed over.
    """
    found = dict[str, Counter]()
    for zone in sorted(powercap.glob("intel-rapl:*")):
        name = _text(zone / "name")
        if not name.startswith(domain):  # core, uncore, dram and others, which are parts
            continue
        now, most = _micro(zone / "energy_uj"), _micro(zone / "max_energy_range_uj")
        if now is None or now < 0 or (most is not None and now > most):
            return {}
        found[name] = Counter(now, most)
    return found


def read_board(hwmon: Path) -> float | None:
    """Returns the watts of a Jetson's input rail, None where there is no such rail or it does not say."""
    for chip in sorted(hwmon.glob("hwmon*")):
        for channel in (1, 2, 3) if _text(chip / "name") == "ina3221" else ():
            if _text(chip / f"in{channel}_label") in TOTALS:
                return _product(chip / f"in{channel}_input", chip / f"curr{channel}_input")
    return None


def read_batteries(supplies: Path) -> float | None:
    """Returns the watts out of the machine's batteries, None where none is discharging or one that is does not say."""
    watts = []
    for supply in sorted(supplies.glob("*")):
        # a mouse's battery is of the scope Device
        if _text(supply / "type") == "Battery" and _text(supply / "scope") != "Device":
            watts += [_battery_w(supply)] if _text(supply / "status") == "Discharging" else []
    known = [one for one in watts if one is not None]
    return sum(known) if known and len(known) == len(watts) else None


def _battery_w(supply: Path) -> float | None:
    power = _micro(supply / "power_now")
    if power is not None:
        return abs(power)
    product = _product(supply / "current_now", supply / "voltage_now")
    return None if product is None else abs(product) / 1e6


def _text(path: Path) -> str:
    """Returns what a file says, empty where it says nothing."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _micro(path: Path) -> float | None:
    """Returns the whole number in a file, as millionths; None where there is none."""
    try:
        return int(_text(path)) / 1e6
    except (ValueError, OverflowError):
        return None


def _product(one: Path, other: Path) -> float | None:
    """Returns the product of the whole numbers in two files, in millionths."""
    a, b = _micro(one), _micro(other)
    return None if a is None or b is None else a * b * 1e6


def take(root: Path, of: str) -> Sample | None:
    """Returns what a source says now, None where it cannot be read. root: where sysfs is."""
    at_s = time.monotonic()
    if of == "rapl":
        powercap = root / "class" / "powercap"
        counters = read_counters(powercap, "package") | read_counters(powercap, "psys")
        return Sample(of, at_s, counters) if counters else None
    watts = read_board(root / "class" / "hwmon") if of == "board" else read_batteries(root / "class" / "power_supply")
    return None if watts is None else Sample(of, at_s, watts=watts)


@contextlib.contextmanager
def metering(root: Path = SYS) -> Iterator[list[Sample | None]]:
    """Yields the samples of the first source that can be read: one of now, one each period, and one of the block's end; else none.

    None stands for a sample that could not be taken.
    """
    first = next((sample for of in PERIODS_S if (sample := take(root, of))), None)
    if first is None:
        yield []
        return
    samples, over, of = list[Sample | None]([first]), threading.Event(), first.of

    def follow() -> None:
        while not over.wait(PERIODS_S[of]):
            samples.append(take(root, of))

    following = threading.Thread(target=follow, daemon=True)
    following.start()
    try:
        yield samples
    finally:
        over.set()
        following.join()
        samples.append(take(root, of))


def spent_between(samples: Sequence[Sample | None]) -> Spent | None:
    """Returns what was drawn from the first sample to the last, None where that cannot be told.

    The platform's counter is taken for the platform only where it has counted no less than the packages, which are a part of it: not every
    maker wires it.
    """
    known = [sample for sample in samples if sample is not None]
    if len(known) < max(len(samples), 2):
        return None
    if known[0].of != "rapl":
        return _spent(_integrated(known), known[0].of)
    packages_j, platform_j = _counted(known, "package"), _counted(known, "psys")
    if platform_j is not None and platform_j >= (packages_j or 0.0):
        return _spent(platform_j, "psys") or _spent(packages_j, "rapl")
    return _spent(packages_j, "rapl")


def _spent(joules: float | None, of: str) -> Spent | None:
    """Returns it; nothing where nothing was counted: a machine that runs draws something."""
    return Spent(joules, of) if joules else None


def _integrated(samples: Sequence[Sample]) -> float | None:
    """Returns the joules of watts by trapezoids; None where a reading is none that can be."""
    if not all(0 < sample.watts <= MOST_W for sample in samples):
        return None
    return sum((a.watts + b.watts) / 2 * (b.at_s - a.at_s) for a, b in pairwise(samples))


def _counted(samples: Sequence[Sample], domain: str) -> float | None:
    """Returns the joules that a domain's counters have counted; None where one is missing, or went back or ahead by more than can be."""
    names, total_j = [name for name in samples[0].counters if name.startswith(domain)], 0.0
    for before, after in pairwise(samples):
        for name in names:
            old, new = before.counters.get(name), after.counters.get(name)
            step_j = new.since(old) if old and new else None
            if step_j is None or not 0 <= step_j <= MOST_W * (after.at_s - before.at_s + TICK_S):
                return None
            total_j += step_j
    return total_j if names else None
