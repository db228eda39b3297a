"""What may not be combined with privacy is refused by name, before anything runs."""

from __future__ import annotations

import pytest
from conftest import make_experiment

from fedprune_cli.errors import ConfigError

SECURE = ("privacy.secure=true", "devices.count=8")
CLIENT = (
    "privacy.dp=client",
    "privacy.epsilon=3",
    "privacy.delta=1e-3",
    "privacy.clip=1",
    "privacy.public_scores=true",
    "weights=uniform",
)
EXAMPLE = (*CLIENT, "privacy.dp=example", "privacy.public_samples=true")
BY_SUM = (
    ("failsafe.aggregation=median", "failsafe.aggregation=median: not with PRIVACY: it has to see each update"),
    ("failsafe.aggregation=trimmed_mean", "failsafe.aggregation=trimmed_mean"),
    ("failsafe.clip_norm=2", "failsafe.clip_norm=2.0: not with PRIVACY: it compares the updates' norms"),
    ("failsafe.quarantine_after=2", "failsafe.quarantine_after=2: not with PRIVACY"),
    ("failsafe.late=defer", "failsafe.late=defer: not with PRIVACY"),
    ("faults.stale=0.1", "faults.stale: not with PRIVACY"),
    ("payload.bits=[8]", "payload.bits=[8]: not with PRIVACY"),
    ("participation.freeze_below=0.1", "participation.freeze_below=0.1: not with PRIVACY: no device's loss leaves it"),
)


@pytest.mark.parametrize(("override", "told"), BY_SUM)
@pytest.mark.parametrize("privacy", [SECURE, CLIENT])
def test_sums_refuse_what_needs_each(privacy: tuple[str, ...], override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_experiment(*privacy, override)
    assert told.replace("PRIVACY", privacy[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            (*SECURE, "faults.poisoned_share=0.2"),
            "faults.poisoned_share: not with privacy.secure=true: the server cannot refuse",
        ),
        ((*SECURE, "faults.nan_share=0.2"), "faults.nan_share"),
        ((*SECURE, "devices.per_round=4"), "devices.per_round=4"),
        ((*SECURE, "allocator.clock=chosen"), "allocator.clock=chosen"),
        (
            (*CLIENT, "weights=samples"),
            "weights=samples: not with privacy.dp=client: how many samples each device has would be told",
        ),
        ((*CLIENT, "training.epochs=1"), "training.epochs=1.0"),
        (
            (*CLIENT, "privacy.public_scores=false"),
            "privacy.public_scores=false: not with privacy.dp=client: records hold losses",
        ),
        ((*EXAMPLE, "privacy.public_samples=false"), "privacy.dp=example: not with"),
        ((*EXAMPLE, "participation.freeze_below=0.1"), "participation.freeze_below"),
        ((*EXAMPLE, "pruner.granularity=channel"), "pruner.granularity=channel"),
        ((*EXAMPLE, "training.precision=bfloat16"), "training.precision=bfloat16"),
        (("privacy.dp=client",), "privacy.epsilon=None: must be in [0.001, 1000] with privacy.dp"),
        (("privacy.least=2", "privacy.secure=true"), "privacy.least=2: must be in 3..1000000"),
    ],
)
def test_what_gives_away_what_is_protected_is_refused(options: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_experiment(*options)
    assert told in str(caught.value)


def test_what_is_declared_no_secret_may_be_used() -> None:
    declared = make_experiment(*CLIENT, "privacy.public_samples=true", "weights=samples", "training.epochs=1")
    assert declared.privacy.weight(40.0) == 1.0  # of all data of a device, which it would scale
    assert make_experiment(*EXAMPLE, "weights=samples").privacy.weight(40.0) == 40.0


def test_without_privacy_its_keys_decide_nothing() -> None:
    plain = make_experiment()
    assert "privacy" not in plain.identity
    assert make_experiment("privacy.least=7", "privacy.bits=20").config_hash == plain.config_hash
    assert make_experiment(*SECURE).config_hash != make_experiment(*SECURE, "privacy.least=6").config_hash
