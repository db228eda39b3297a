"""Goes through the settings of docs/results/where_it_pays.md one by one, keeps their tables, and writes the page from what is kept.

usage: pays.py run [SETTING ...] [--jobs N]   compares all settings, or those named; finished runs are read, interrupted ones continued
       pays.py keep                           copies the tables of all that is finished beside the page, and writes the page
       pays.py page                           writes the page from the tables that are kept
"""

from __future__ import annotations

import csv
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bound import bounds

from fedprune_cli.report.comparison_page import read_table
from fedprune_cli.report.estimate import BY_KEY, Estimate, Estimates, mean_over_seeds
from fedprune_cli.report.page import csv_text
from fedprune_cli.report.versus import Versus

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results" / "where_it_pays.md"
KEPT = PAGE.with_suffix("")  # SETTING-table.csv, -versus.csv, -tuning.csv and -bound.csv
MADE = Path("outputs") / "where_it_pays"  # of where it is run
TABLES = ("table", "versus", "tuning", "bound")
SEEDS = (0, 1, 2, 3, 4)
JOINT, RIVALS = ("kkt", "blocks", "proportional"), ("equal", "fixed", "dense, drop")
NEEDED = RIVALS[:2]  # whom the joint choice must beat for it to pay
ENOUGH = 0.15  # less time to the target
COLUMNS = ("time_to_target_s", "time_reduction", "latency_s", "accuracy", "accuracy_p10", "least_rounds", "mean_ratio")
DIGITS, SMALL = ("data=optdigits", "model.hidden=[128,64]"), ("data=optdigits", "model.hidden=[32]")
FINE_BLOCKS = 'arms.blocks=["method=proposed","allocator=blocks","allocator.block_khz=15"]'
ON_LTE_M = ("devices.mix=[mcu_m7]", "devices.shares=[1]", "channel=lte_m", FINE_BLOCKS)


@dataclass(frozen=True)
class Setting:
    """A fleet and a band: its name in files, what it is in words, and its overrides."""

    name: str
    title: str
    overrides: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """The command that compares its arms."""
        seeds = ",".join(map(str, SEEDS))
        return ["compare", *self.configuration, "--seeds", seeds, "--out", str(MADE / self.name)]

    @property
    def configuration(self) -> list[str]:
        """What its runs have in common."""
        return ["experiment=where_it_pays", *self.overrides]


SETTINGS = (
    Setting("measured_20", "Raspberry Pi 5, Pi 4 and weak phones, 20 MHz", DIGITS),
    Setting("measured_1", "Raspberry Pi 5, Pi 4 and weak phones, 1 MHz", (*DIGITS, "channel.bandwidth_mhz=1", FINE_BLOCKS)),
    Setting("small_1", "Raspberry Pi 5, Pi 4 and weak phones, 1 MHz, a small model", (*SMALL, "channel.bandwidth_mhz=1", FINE_BLOCKS)),
    Setting("lte_m", "microcontrollers on LTE-M", (*DIGITS, *ON_LTE_M)),
    Setting("small_lte_m", "microcontrollers on LTE-M, a small model", (*SMALL, *ON_LTE_M)),
    Setting("thirds", "Raspberry Pi 5, weak phones and microcontrollers, a third each, 20 MHz",
            (*DIGITS, "devices.mix=[pi5,phone_low,mcu_m7]", "devices.shares=[1,1,1]")),
    Setting("measured_5", "Raspberry Pi 5, Pi 4 and weak phones, 5 MHz", (*DIGITS, "channel.bandwidth_mhz=5")),
    Setting("measured_100", "Raspberry Pi 5, Pi 4 and weak phones, 100 MHz", (*DIGITS, "channel.bandwidth_mhz=100")),
    Setting("imagined", "the imagined fleet, 20 MHz", (*DIGITS, "devices=sampled")),
    Setting("one_slow", "19 Raspberry Pi 5 and a microcontroller, 20 MHz",
            (*DIGITS, "devices.mix=[pi5,mcu_m7]", "devices.shares=[19,1]")),
    Setting("fmnist", "Raspberry Pi 5, Pi 4 and weak phones, 20 MHz, Fashion-MNIST", ("data=fmnist",)),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What is kept of a setting: arm -> its estimates, (arm, other) -> how much sooner it is, arm -> the setting that it took.

    bound: how much less time any allocation that keeps as much could take for the rounds of `equal`.
    """

    estimates: Mapping[str, Estimates]
    sooner: Mapping[tuple[str, str], Versus]
    taken: Mapping[str, str]
    bound: Estimate


def read_result(kept: Path, setting: Setting) -> Result | None:
    """Returns what is kept of a setting, None where it was not run."""
    table, versus, tuning, bound = (kept / f"{setting.name}-{name}.csv" for name in TABLES)
    if not table.exists():
        return None
    with versus.open(newline="") as file:
        pairs = [*csv.DictReader(file)]
    taken = read_taken(tuning)
    sooner = {(row["arm"], row["than"]): Versus(estimate(row), int(row["others_miss"])) for row in pairs}
    with bound.open(newline="") as file:
        room = mean_over_seeds([float(row["room"]) for row in csv.DictReader(file)])
    assert room is not None
    return Result(read_table(table), sooner, taken, room)


def read_taken(tuning: Path) -> dict[str, str]:
    """Returns arm -> the setting that it took."""
    with tuning.open(newline="") as file:
        return {row["arm"]: row["setting"] for row in csv.DictReader(file) if row["taken"] == "True"}


def estimate(row: Mapping[str, str]) -> Estimate | None:
    """Returns the estimate of a row of versus.csv."""
    half = row["half_width_95"]
    return Estimate(float(row["mean"]), float(half) if half else None, int(row["seeds"])) if row["mean"] else None


def beats(result: Result, arm: str, other: str) -> bool:
    """Whether an arm is sooner than another by enough, with an interval away from 0; undecided, and no, where it misses the target."""
    found = result.sooner[arm, other].saved
    if found is None:
        return False
    return found.mean >= ENOUGH and found.half_width is not None and found.mean > found.half_width


def best(result: Result) -> str:
    """Returns which of the joint arms beats more of those that it must, then which is sooner than `equal`, the first of equals."""

    def worth(arm: str) -> tuple[int, float]:
        sooner = result.sooner[arm, "equal"].saved
        return sum(beats(result, arm, other) for other in NEEDED), -1.0 if sooner is None else sooner.mean

    return max(JOINT, key=worth)


def verdict(result: Result) -> str:
    """Returns in words whether the joint choice pays, and against whom it does not."""
    arm = best(result)
    lost = [other for other in NEEDED if not beats(result, arm, other)]
    return f"pays ({arm})" if not lost else f"not against {' and '.join(lost)} ({arm})"


def cell(result: Result, arm: str, other: str) -> str:
    """Returns how much sooner an arm is than another, or that it misses the target."""
    found = result.sooner[arm, other]
    return f"{arm} misses" if found.saved is None else found.cell()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def section(setting: Setting, result: Result | None) -> str:
    """Returns a setting's part of the page: its command, and the arms at the settings that they took where it was run."""
    command = shlex.join(["fedprune", *setting.words])
    text = f"\n## {setting.title[0].upper()}{setting.title[1:]}\n\n```\n{command}\n```\n\n"
    if result is None:
        return text + "Not run yet.\n"
    columns = [BY_KEY[key] for key in COLUMNS]
    rows = [
        [
            arm,
            f"`{result.taken[arm]}`" if arm in result.taken else "",
            *(column.cell(of.get(column.key)) for column in columns),
        ]
        for arm, of in result.estimates.items()
    ]
    names = ", ".join(f"[{name}]({KEPT.name}/{setting.name}-{name}.csv)" for name in TABLES)
    return (
        text
        + table(["", "setting that it took", *(column.title for column in columns)], rows)
        + f"\nAs files: {names}.\n"
    )


def answer(results: Mapping[str, Result]) -> str:
    """Returns where it pays and where it does not, in a sentence or two."""
    if not results:
        return "None of the settings below has been run yet.\n"
    titles = {setting.name: setting.title for setting in SETTINGS}
    pays = [titles[name] for name, result in results.items() if verdict(result).startswith("pays")]
    not_there = [titles[name] for name in results if titles[name] not in pays]
    said = f"**It pays on {len(pays)} of {len(results)} settings" + (f": {'; '.join(pays)}.**" if pays else ".**")
    return said + (f" Not shown on: {'; '.join(not_there)}.\n" if not_there else "\n")


INTRODUCTION = f"""# Where it pays

Where does the joint choice of ratio and bandwidth pay, and under which kind of deadline, when every arm has the one that suits it best?
This page is written by `python .ci/pays.py keep` from the tables beside it, and a test holds it to them.

Each arm chose its setting on seeds 97, 98 and 99, which are not reported, among fractions of the round's own dense time, stretched where
it must be, and seconds after which whoever is not there is left out, given in median rounds of `personalized` on the seed's own site.
`dense, drop` is `personalized` with such seconds to choose from, and the fixed ratio, which is chosen too, has them as well. Who took part,
and how the worst off fared, stands in the columns of the device with the fewest rounds and of the 10th percentile. ± is half the 95 %
interval over 5 seeds, of paired differences where two are compared; simulated seconds are modelled.

It *pays* where `kkt`, `blocks` or `proportional` reaches the target at least {100 * ENOUGH:.0f} % sooner than equal bandwidth and than the
fixed ratio on its best bandwidth, with the interval away from 0. Where another arm misses the target on a seed, as a deadline that was
chosen on others can make it, it counts there with the seconds of its whole run, which is less than it needs, and "at least" says so; where
the arm itself misses it, nothing is decided.

The most at equal's weight is a bound: how much sooner any allocation at all could end the rounds of equal bandwidth, at the setting that it
took, while the same devices keep as much of the model in their weighted sum. `minlatency` finds that least time, and P1 is concave. Who
beats equal bandwidth by more stands a shorter round with less of the model, or had luck: the intervals are wide.

Why: there is more to divide the longer the deadline is. With the larger model on 20 MHz the bound is 12 % at a deadline of 0.14
rounds, 16 % at 0.2 and 19 % at 0.28 and 0.4 (seed 0, 12 rounds), and a task that stands a fifth of the model takes the short ones. There,
in an earlier comparison that was tuned on one seed, `kkt`, `proportional` and `equal` were within each other's noise. A small model has
little to spare and needs the long ones, and on LTE-M the modem's peak makes rates go with bandwidth alone, so that a third can be gained by
whom it is given. The three settings that were run were chosen because short runs on seeds 90 to 92 promised something there; the others are
still to be run.

"""


def page(kept: Path = KEPT) -> str:
    """Returns the page from the tables that are kept in a folder."""
    found = {setting.name: read_result(kept, setting) for setting in SETTINGS}
    results = {name: result for name, result in found.items() if result is not None}
    rows = [
        [
            setting.title,
            *(cell(result, best(result), other) for other in RIVALS),
            BY_KEY["time_reduction"].cell(result.bound),
            verdict(result),
        ]
        for setting in SETTINGS if (result := results.get(setting.name)) is not None
    ]  # fmt: skip
    header = [
        "less time to the target %",
        *(f"than {other}" for other in RIVALS),
        "the most at equal's weight",
        "verdict",
    ]
    summary = f"\n{table(header, rows)}" if rows else ""
    return INTRODUCTION + answer(results) + summary + "".join(section(one, found[one.name]) for one in SETTINGS)


def run(names: Sequence[str], jobs: Sequence[str]) -> int:
    """Compares the settings one after the other, each in a process of its own; returns the exit code of the first that failed, else 0."""
    known = {setting.name: setting for setting in SETTINGS}
    if wrong := [name for name in names if name not in known]:
        print(f"error: no setting {wrong[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    codes = []
    for setting in [known[name] for name in names] or SETTINGS:
        print(f"== {setting.name}: {setting.title}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "fedprune_cli", *setting.words, *jobs]
        codes.append(subprocess.run(command, check=False).returncode)
        if not codes[-1]:
            took = shlex.split(read_taken(MADE / setting.name / "tuning.csv")["equal"])
            rooms = [*zip(SEEDS, bounds(setting.configuration, SEEDS, took), strict=True)]
            (MADE / setting.name / "bound.csv").write_text(csv_text(["seed", "room"], rooms))
    return next((code for code in codes if code), 0)


def keep() -> None:
    """Copies the tables of the settings that are finished beside the page."""
    KEPT.mkdir(exist_ok=True)
    for setting in SETTINGS:
        paths = [MADE / setting.name / f"{name}.csv" for name in TABLES]
        if all(path.exists() for path in paths):
            for name, path in zip(TABLES, paths, strict=True):
                shutil.copyfile(path, KEPT / f"{setting.name}-{name}.csv")


def main(arguments: Sequence[str]) -> int:
    """Does what the command line says; returns the exit code."""
    words, jobs = [*arguments], list[str]()
    if "--jobs" in words:
        at = words.index("--jobs")
        words, jobs = words[:at] + words[at + 2 :], words[at : at + 2]
    if words[:1] == ["run"]:
        return run(words[1:], jobs)
    if words not in (["keep"], ["page"]):
        print(__doc__, file=sys.stderr)
        return 2
    if words == ["keep"]:
        keep()
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
