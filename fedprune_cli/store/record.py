"""The record of a round: the one schema of a line of rounds.jsonl, for whoever writes, checks, watches, tracks or draws it.

Every figure is modelled; measured wall time stands in timings.jsonl. Units are in the names; docs/run-folder.md explains each key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import get_type_hints

from fedprune_cli.store.files import fits


@dataclass(frozen=True)
class FaultLog:
    """What went wrong in a round and which fail-safe acted: for each kind the devices, ascending.

    died, lost, delayed, poisoned: what befell them, which the server cannot see. late: not there after wait_factor deadlines.
    refused: an update that is not finite, or not of the kept entries' number. stale: an update of an earlier round that was taken;
    expired: one that was too old, or whose sender is in quarantine. clipped: an update shortened to clip_norm median norms; outliers:
    those beyond outlier_norm median norms. safe: devices planned with more time than estimated. quarantined: devices that take no
    part. waited_s: how long the round lasted beyond the last update that it took.
    """

    died: Sequence[int] = ()
    lost: Sequence[int] = ()
    delayed: Sequence[int] = ()
    poisoned: Sequence[int] = ()
    late: Sequence[int] = ()
    refused: Sequence[int] = ()
    stale: Sequence[int] = ()
    expired: Sequence[int] = ()
    clipped: Sequence[int] = ()
    outliers: Sequence[int] = ()
    safe: Sequence[int] = ()
    quarantined: Sequence[int] = ()
    waited_s: float = 0.0

    def of(self, kind: str) -> Sequence[int]:
        """Returns the devices of a kind."""
        devices: Sequence[int] = getattr(self, kind)
        return devices


@dataclass(frozen=True)
class PrivacyLog:
    """What protected a round, None where that does not apply.

    devices: those whose changes are in the sum; keepers: the fewest devices that an entry which was sent is of, before any dropped out;
    withheld: how much capping the cut added to the mean ratio; exchange_bytes: what keys and shares cost each device on the uplink;
    bits: of a change in fixed point; refused: why no sum was made, empty where one was. clip, noise: the largest norm, and the noise's
    standard deviation over it; epsilon: what the device that has spent most has spent so far.
    """

    devices: int | None = None
    keepers: int | None = None
    withheld: float | None = None
    exchange_bytes: int | None = None
    bits: int | None = None
    refused: str | None = None
    clip: float | None = None
    noise: float | None = None
    epsilon: float | None = None


KINDS = tuple(one.name for one in fields(FaultLog) if one.name != "waited_s")


@dataclass(frozen=True)
class DeviceRows:
    """A record's figures by device, columns aligned with `id`: first those that trained the shared part, then the frozen.

    bandwidth_hz is 0 for the frozen, which send nothing; accuracy is None in a round that was not tested; clock, power: what of its full
    clock and of its full radiated power a device used, None where they are not chosen; bits: of each device's values on the uplink, 0 for
    the frozen, None where all have the record's; blocks: the numbers of the blocks that each had, None where any are alike; bytes_down: of
    the copy of its own that each was sent, None where all heard one broadcast.
    """

    id: Sequence[int] = ()
    prune_ratio: Sequence[float] = ()
    bandwidth_hz: Sequence[float] = ()
    compute_s: Sequence[float] = ()
    uplink_s: Sequence[float] = ()
    downlink_s: Sequence[float] = ()
    latency_s: Sequence[float] = ()
    pruning_error: Sequence[float] = ()
    joules: Sequence[float] = ()
    bytes_up: Sequence[int] = ()
    train_loss: Sequence[float | None] = ()
    accuracy: Sequence[float | None] | None = None
    clock: Sequence[float] | None = None
    power: Sequence[float] | None = None
    bits: Sequence[int] | None = None
    blocks: Sequence[Sequence[int]] | None = None
    bytes_down: Sequence[float] | None = None

    def columns(self) -> dict[str, object]:
        """Returns the columns in their order; what is not always chosen only where it exists."""
        return {key: values for key, values in asdict(self).items() if values is not None or key not in _CHOSEN}


@dataclass(frozen=True)
class RoundRecord:
    """One finished round. None stands where a figure does not exist: accuracies of an untested round, ratios of a round at rest.

    round: from 1; simulated_s: the clock after it; latency_s: of the round; deadline_s: T as given or stretched; the accuracies: over
    devices, weighted by D_k, unweighted and their 10th percentile, and of devices that never trained; bits: of a value on the uplink,
    None where each device has its own; dense_latency_s, equal_dense_latency_s: what the round would take unpruned, on its optimal and on
    equal bandwidth; price_per_hz, residual, gap: the allocation's dual price and certificate, or how far it may be from the best one;
    frozen: devices that stopped training the shared part, where any may; faults: where anything may go wrong; privacy: where anything is
    protected.
    """

    round: int
    simulated_s: float
    latency_s: float
    deadline_s: float | None
    accuracy: float | None
    accuracy_mean: float | None
    accuracy_p10: float | None
    fresh_accuracy: float | None
    train_loss: float | None
    mean_ratio: float | None
    max_ratio: float | None
    bits: int | None
    rounding_error: float | None
    bytes_up: float
    bytes_down: float
    joules: float
    flops: float
    grad_norm: float
    pruning_error: float | None
    dense_latency_s: float | None
    equal_dense_latency_s: float | None
    price_per_hz: float | None
    residual: float | None
    gap: float | None
    status: str
    message: str
    frozen: int | None = None
    faults: FaultLog | None = None
    privacy: PrivacyLog | None = None
    devices: DeviceRows = field(default_factory=DeviceRows)

    @property
    def rested(self) -> bool:
        """Whether nobody trained the shared part: every device was in outage, in quarantine or frozen, or had spent its privacy budget."""
        return self.status in RESTING

    def figures(self) -> dict[str, float | int | str | None]:
        """Returns the figures of the round as a whole, in the order of its line."""
        order = RESTED_ORDER if self.rested else ORDER
        present = [
            key
            for key in order
            if key not in ("faults", "privacy", "devices") and (key != "frozen" or self.frozen is not None)
        ]
        return {key: getattr(self, key) for key in present}

    def as_json(self) -> dict[str, object]:
        """Returns the line's object, keys in their order; `frozen`, `faults` and `privacy` only where they exist."""
        line: dict[str, object] = dict(self.figures())
        if self.faults is not None:
            line["faults"] = asdict(self.faults)
        if self.privacy is not None:
            line["privacy"] = asdict(self.privacy)
        line["devices"] = {"id": []} if self.rested and not self.devices.id else self.devices.columns()
        return line


RESTING = ("idle", "frozen", "spent")
ORDER = tuple(one.name for one in fields(RoundRecord))
_LAST = (
    "latency_s",
    "bytes_up",
    "bytes_down",
    "joules",
    "flops",
    "grad_norm",
    "status",
    "message",
    "frozen",
    "faults",
    "privacy",
    "devices",
)
_FIRST = ("round", "simulated_s", "accuracy", "accuracy_mean", "accuracy_p10", "fresh_accuracy")
RESTED_ORDER = (
    *_FIRST,
    *(key for key in ORDER if key not in _FIRST + _LAST),
    *_LAST,
)  # as such lines have always been written

_FORMS: Mapping[object, object] = {
    int: int, float: float, str: str, int | None: (int, None), float | None: (float, None), str | None: (str, None), Sequence[int]: [int],
    Sequence[float]: [float], Sequence[float] | None: [float], Sequence[int] | None: [int], Sequence[Sequence[int]] | None: [[int]],
    Sequence[float | None]: [(float, None)], Sequence[float | None] | None: ([(float, None)], None),
}  # fmt: skip


def _form(of: type) -> dict[str, object]:
    return {key: _FORMS[hint] for key, hint in get_type_hints(of).items() if hint in _FORMS}


_ROUND, _DEVICES, _LOG, _PRIVACY = _form(RoundRecord), _form(DeviceRows), _form(FaultLog), _form(PrivacyLog)
_OPTIONAL = ("frozen", "faults", "privacy")
_CHOSEN = ("clock", "power", "bits", "blocks", "bytes_down")


def parse_record(value: object) -> RoundRecord | None:
    """Returns the record that a JSON value is, None for one that no round can have written."""
    required = {key: form for key, form in _ROUND.items() if key not in _OPTIONAL}
    if not isinstance(value, dict) or not fits(value, required | {"devices": {"id": [int]}}):
        return None
    rows, log, privacy = value["devices"], value.get("faults"), value.get("privacy")
    ids = rows["id"]
    bare = value["status"] in RESTING and not ids
    aligned = all(column is None or (isinstance(column, list) and len(column) == len(ids)) for column in rows.values())
    columns = {key: form for key, form in _DEVICES.items() if key in rows or key not in _CHOSEN}
    whole = rows.keys() == {"id"} if bare else rows.keys() == columns.keys() and fits(rows, columns)
    logged = log is None or (fits(log, _LOG) and log.keys() == _LOG.keys())
    logged = logged and (privacy is None or (fits(privacy, _PRIVACY) and privacy.keys() == _PRIVACY.keys()))
    known = value.keys() <= set(ORDER) and fits(value.get("frozen"), _ROUND["frozen"])
    known = known and all(value[key] is not None for key in _OPTIONAL if key in value)
    if not (aligned and whole and logged and known) or min(ids, default=0) < 0:
        return None
    parts = {
        "devices": DeviceRows(**rows),
        "faults": None if log is None else FaultLog(**log),
        "privacy": None if privacy is None else PrivacyLog(**privacy),
    }
    return RoundRecord(**{**value, **parts})
