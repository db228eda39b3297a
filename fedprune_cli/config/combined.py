"""What may not be combined with privacy, refused by name: why it would give away what is to be protected, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune_cli.config.experiment import Experiment
from fedprune_cli.errors import ConfigError
from fedprune_cli.wire.quantize import BITS_PER_PARAM


def refuse_combinations(experiment: Experiment) -> None:
    """Raises ConfigError for the first key whose value does not go with what `privacy` asks for."""
    privacy = experiment.privacy
    if privacy.none:
        return
    word = "privacy.secure=true" if privacy.secure else f"privacy.dp={privacy.dp}"
    for refused, key, why in (
        *_never(experiment),
        *_of_sums(experiment),
        *_of_noise(experiment),
        *_of_secret_draws(experiment),
    ):
        if refused:
            raise ConfigError(f"{key}: not with {word}: {why}")


def _never(experiment: Experiment) -> Iterator[tuple[bool, str, str]]:
    """Yields what goes with no protection: whether it is asked for, the key with its value, and why it is refused."""
    privacy, failsafe, participation = experiment.privacy, experiment.failsafe, experiment.participation
    lone = "no device's loss leaves it; leave it null"
    yield participation.freeze_below is not None, f"participation.freeze_below={participation.freeze_below}", lone
    remote, kind = experiment.execution.remote, f"execution.kind={experiment.execution.kind}"
    known = "the server's noise would follow from the seed; take privacy.secure=true, with which each node adds a share that only it knows"
    yield remote and privacy.dp == "client" and not privacy.secure, kind, known
    tested = "each node's test reaches the server by itself; declare accuracies and losses no secret by privacy.public_scores=true"
    yield remote and not privacy.public_scores, kind, tested
    if privacy.by_sum:
        each = failsafe.aggregator.needs != "sum"
        sees = "it has to see each update, and the server has their sum alone; take mean"
        yield each, f"failsafe.aggregation={failsafe.aggregation}", sees
        clips = "it compares the updates' norms, which the server does not know and noise does not cover; take privacy.dp and privacy.clip"
        yield failsafe.clip_norm is not None, f"failsafe.clip_norm={failsafe.clip_norm}", clips
        judges = "it judges each update by what it holds, which the server does not see; leave it null"
        yield failsafe.quarantine_after is not None, f"failsafe.quarantine_after={failsafe.quarantine_after}", judges
        late = "an update that comes in a later round is in no sum that it was masked or noised for; take wait or drop"
        yield failsafe.policy.defers, f"failsafe.late={failsafe.late}", late
        yield experiment.faults.delays, "faults.stale", late.replace("take wait or drop", "set it to 0")
        coarse = "a device's own scale of rounding would have to be known; take [32], of which privacy.bits are used"
        yield experiment.payload.bits != [BITS_PER_PARAM], f"payload.bits={experiment.payload.bits}", coarse


def _of_sums(experiment: Experiment) -> Iterator[tuple[bool, str, str]]:
    """Yields what does not go with secure sums."""
    privacy, devices, faults = experiment.privacy, experiment.devices, experiment.faults
    if not privacy.secure:
        return
    shares = ("nan_share", "inf_share", "misshapen_share", "poisoned_share")
    bad = next((key for key in shares if getattr(faults, key)), None)
    yield (
        bad is not None,
        f"faults.{bad}",
        "the server cannot refuse what it does not see: one such update spoils the sum; set it to 0",
    )
    yield (
        bool(faults.others),
        f"faults.others={[*faults.others]}",
        "what a plug-in's fault sends cannot be refused; leave it empty",
    )
    few = f"an entry is of at least privacy.least + privacy.spare = {privacy.keepers} devices"
    wanted = devices.per_round
    yield wanted is not None and wanted < privacy.keepers, f"devices.per_round={wanted}", f"{few}; let more take part"
    allocator = experiment.allocator
    for key in ("clock", "power"):
        chosen = getattr(allocator, key, "fixed")
        why = "the keys and shares are sent at full power, whose joules such a choice does not count; take fixed"
        yield chosen != "fixed", f"allocator.{key}={chosen}", why


def _of_noise(experiment: Experiment) -> Iterator[tuple[bool, str, str]]:
    """Yields what does not go with differential privacy."""
    privacy, training = experiment.privacy, experiment.training
    if privacy.dp is None:
        return
    told = "how many samples each device has would be told; declare it no secret by privacy.public_samples=true"
    if not privacy.public_samples:
        yield privacy.dp == "example", f"privacy.dp={privacy.dp}", f"a batch is a share of the device's samples: {told}"
        yield (
            experiment.weights.name != "uniform",
            f"weights={experiment.weights.name}",
            f"{told}, or take weights=uniform",
        )
        yield training.epochs is not None, f"training.epochs={training.epochs}", f"{told}, or leave it null"
    scores = (
        "records hold losses and accuracies, which nothing noises; declare them no secret by privacy.public_scores=true, as in "
        "a simulation whose records nobody else is given"
    )
    yield not privacy.public_scores, "privacy.public_scores=false", scores
    yield (
        experiment.branch is not None,
        "branch",
        "its noise was set for the rounds of the run that it leaves; make a new run",
    )
    if privacy.dp == "example":
        slices = "a slice of whole channels has no gradient for each sample yet; take weight"
        yield experiment.pruner.granularity == "channel", "pruner.granularity=channel", slices
        where = "each sample's gradient is computed on the CPU in float32"
        yield training.device != "cpu", f"training.device={training.device}", where
        yield training.precision != "float32", f"training.precision={training.precision}", where


def _of_secret_draws(experiment: Experiment) -> Iterator[tuple[bool, str, str]]:
    """Yields what would let u depend on who else took part in a round, and so undo what is gained by not telling it."""
    if not experiment.secret_draw:
        return
    drawn = f"and participation.rate={experiment.participation.rate:g}"
    known = f"{drawn}: the server of a secure sum knows who takes part, which gains nothing; take privacy.secure=false, or no rate"
    yield experiment.privacy.secure, "privacy.secure=true", known
    late = f"{drawn}: whether an update is in time may depend on who else is heard; take wait"
    yield not experiment.failsafe.policy.waits, f"failsafe.late={experiment.failsafe.late}", late
    taught = f"{drawn}: what it remembers of those that came decides what others send"
    yield experiment.failsafe.safe_ratio, "failsafe.safe_ratio=true", f"{taught}; set it to false"
    yield experiment.participation.rotation, "participation.rotation=true", f"{taught}; set it to false"
    by = experiment.weights.name
    yield by not in ("uniform", "samples"), f"weights={by}", f"{taught}; take weights=uniform"
    clock = f"{drawn}: rounds are shorter where slow devices stay away, which decides what others send; take deadline.fraction"
    yield (
        experiment.deadline.total_seconds is not None,
        f"deadline.total_seconds={experiment.deadline.total_seconds}",
        clock,
    )
