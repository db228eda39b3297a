"""What a round's record says of its protection, held against what follows from the configuration: keepers, clip, noise and epsilon."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

import numpy as np

from fedprune_cli.privacy.keepers import fewest_keepers
from fedprune_cli.privacy.secure import RefusedSumError, Terms
from fedprune_cli.round.plan import Plan
from fedprune_cli.round.protect import fixed_point
from fedprune_cli.round.setup import Setup
from fedprune_cli.store.memory import Slots
from fedprune_cli.store.record import FaultLog, PrivacyLog, RoundRecord

TOLERANCE = 1e-9  # relative: the same formulas


def privacy_failures(setup: Setup, record: RoundRecord, after: Slots, plan: Plan | None = None) -> Iterator[str]:
    """Yields what of a round's protection is not what the configuration gives; after: what is remembered after it.

    plan: of a round in which somebody trained the shared part. How many entries a slice of whole channels keeps is known to who was
    there, and its keepers are held to the fewest allowed only.
    """
    if setup.experiment.privacy.none:
        if record.privacy is not None:
            yield "it says what protected it, and nothing did"
        return
    given = record.privacy or PrivacyLog()
    expected = _expected(setup, record, after, plan)
    sliced = setup.blueprint.layout.slices
    for key in (field.name for field in fields(PrivacyLog)):
        told, wanted = getattr(given, key), getattr(expected, key)
        if sliced and key in ("keepers", "refused", "devices", "bits"):
            continue
        if told != wanted and not _close(told, wanted):
            yield f"privacy.{key} is {told!r}, the configuration gives {wanted!r}"
    if setup.experiment.privacy.secure and given.devices and (given.keepers or 0) < setup.experiment.privacy.keepers:
        yield f"an entry was sent that {given.keepers} devices keep, the fewest allowed are {setup.experiment.privacy.keepers}"


def _close(told: object, wanted: object) -> bool:
    both = isinstance(told, float | int) and isinstance(wanted, float | int)
    return both and math.isclose(float(str(told)), float(str(wanted)), rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _expected(setup: Setup, record: RoundRecord, after: Slots, plan: Plan | None) -> PrivacyLog:
    facts: dict[str, object] = {}
    if (budget := setup.budget) is not None:
        spent = budget.spent(int(after["privacy_rounds"].max(initial=0)))
        facts = {"clip": setup.experiment.privacy.clip, "noise": budget.one.noise, "epsilon": spent}
    if plan is not None and setup.experiment.privacy.by_sum:
        facts |= _of_sum(setup, record, plan)
    return PrivacyLog(**facts)  # type: ignore[arg-type]


def _of_sum(setup: Setup, record: RoundRecord, plan: Plan) -> dict[str, object]:
    """Returns what the configuration, and the record's faults, say of a round's sum."""
    privacy, size = setup.experiment.privacy, setup.blueprint.cost.shared_params
    devices, log = plan.devices.tolist(), record.faults or FaultLog()
    if not size or not (devices or setup.experiment.secret_draw):
        return {"devices": 0, "keepers": 0, "refused": "nobody sends anything"}
    missing = {*log.died, *log.lost, *log.delayed, *log.refused}
    missing |= set() if setup.experiment.failsafe.policy.waits else {*log.late}
    survivors = [device for device in devices if device not in missing]
    counts = np.rint((1 - plan.ratios[plan.devices]) * size).astype(int).tolist()
    told: dict[str, object] = {"devices": len(survivors), "keepers": fewest_keepers(counts), "refused": ""}
    if not privacy.secure:
        return told
    asked = plan.allocation.prune_ratio[plan.admitted_places]
    told |= {
        "exchange_bytes": setup.blueprint.exchanged_bytes(len(devices))[0],
        "withheld": float(plan.ratios[plan.devices].mean() - asked.mean()),
        "bits": fixed_point(setup, devices).bits,
    }
    # a node may be lost between any two steps
    if setup.experiment.execution.remote and record.privacy and record.privacy.refused:
        return told | {"devices": 0, "refused": record.privacy.refused, "bits": None}
    announced = Terms(tuple(devices), tuple(counts), privacy.needed(len(devices)), privacy.least, b"")
    try:
        announced.check(devices)
        announced.check(survivors)
    except RefusedSumError as error:
        told |= {"devices": 0, "refused": str(error), "bits": None}
    return told
