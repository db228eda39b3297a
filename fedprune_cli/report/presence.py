"""Who took part in a run, and who was left out of it for good: by name, whatever left them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedprune_cli.allocate.policy import listed
from fedprune_cli.report.page import html_section, html_table
from fedprune_cli.report.read import HELD_ROUNDS, Run

NOTE = (
    "A device takes part in a round in which it trains. Who never does is known to the model by nothing; it is tested all the same, and "
    "counts in the 10th percentile."
)
HEADERS = ("devices per round, mean", "rounds of the device with the fewest", "left out for good")


@dataclass(frozen=True)
class Presence:
    """In how many of a run's rounds each training device took part; who `never` did, and who did but not in the last ten: `gone`.

    Where devices.per_round or participation.rate draws some for each round, nobody is `gone`: not to be drawn for ten rounds is chance.
    """

    rounds: tuple[int, ...]
    never: tuple[str, ...]
    gone: tuple[str, ...]

    def __str__(self) -> str:
        """Who was left out for good, in words; nothing where nobody was."""
        never = f"devices {listed(self.never)} never took part" if self.never else ""
        gone = f"devices {listed(self.gone)} took part in none of the last {HELD_ROUNDS} rounds" if self.gone else ""
        return "; ".join(filter(None, (never, gone)))


def presence(run: Run) -> Presence:
    """Returns who took part in a run's rounds."""
    devices = range(max(len(run.manifest["histogram"]) - run.manifest["fresh_devices"], 0))
    rounds = Counter(device for record in run.rounds for device in record.devices.id)
    lately = {device for record in run.rounds[-HELD_ROUNDS:] for device in record.devices.id}
    never = tuple(run.called(device) for device in devices if not rounds[device])
    config = run.manifest["config"]
    chosen = config.get("devices", {}).get("per_round"), (config.get("participation") or {}).get("rate")
    drawn = any(value is not None for value in chosen)
    gone = tuple(run.called(device) for device in devices if rounds[device] and device not in lately and not drawn)
    return Presence(tuple(rounds[device] for device in devices), never, gone)


def presence_json(run: Run) -> dict[str, object]:
    """Returns it for programs: the rounds of the device with the fewest, and the names of those left out for good."""
    found = presence(run)
    return {"least_rounds": min(found.rounds, default=0), "never": [*found.never], "gone": [*found.gone]}


def left_out(runs: Sequence[Run]) -> str:
    """Returns which devices were left out for good of runs of several seeds, in words; nothing where none was."""
    found = ((run.seed, str(presence(run))) for run in runs)
    return "; ".join(f"seed {seed}: {text}" for seed, text in found if text)


def presence_section(runs: Mapping[str, Sequence[Run]]) -> str:
    """Returns who took part, an arm a row, as a section of a page."""
    rows = []
    for arm, of_arm in runs.items():
        rounds = [presence(run).rounds for run in of_arm]
        per_round = sum(map(sum, rounds)) / sum(len(run.rounds) for run in of_arm)
        least = f"{min(min(of, default=0) for of in rounds)} of {len(of_arm[0].rounds)}"
        rows.append([arm, f"{per_round:.1f}", least, left_out(of_arm) or "nobody"])
    return html_section("Who took part", html_table(["", *HEADERS], rows) + f"<p class=note>{NOTE}</p>")
