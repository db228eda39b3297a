"""Several runs compared on the same seeds: what each method or arm costs and gains, and the answer in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedprune_cli.errors import CheckpointError, one_line
from fedprune_cli.report.estimate import QUANTITIES, Estimate, Estimates, known, mean_over_seeds
from fedprune_cli.report.page import percent
from fedprune_cli.report.presence import presence
from fedprune_cli.report.read import Run, crossing, held_accuracy

TARGET_MARGIN = 0.005  # the target: what the reference holds, minus half a point
EQUAL_SUFFIX = " (equal bandwidth)"
# parts of a configuration that compared runs share
SAME_WORLD: tuple[Literal["data", "partition", "devices", "channel", "rounds"], ...] = (
    "data",
    "partition",
    "devices",
    "channel",
    "rounds",
)
Arms = Mapping[str, Mapping[int, Run]]  # arm -> seed -> its run


@dataclass(frozen=True)
class Comparison:
    """Runs of several methods, or arms of an experiment, on the same seeds.

    runs: method or arm -> its runs in seed order; reference: the one that sets the target and the reductions, None if absent;
    targets: seed -> target accuracy; figures: method -> quantity -> estimate.
    Reductions are against the reference on its own optimal bandwidth; the shares are of the reference's mean round on EQUAL bandwidth.
    """

    runs: Mapping[str, tuple[Run, ...]]
    reference: str | None
    targets: Mapping[int, float]
    figures: Mapping[str, Estimates]

    @property
    def subject(self) -> str:
        """The arm that the comparison is about: `proposed` where it is one, else the first but the reference, if there is another."""
        others = [arm for arm in self.runs if arm != self.reference]
        return "proposed" if "proposed" in others else next(iter(others), next(iter(self.runs)))


def compare(runs: Sequence[Run], labels: Sequence[str] | None = None, reference: str = "personalized") -> Comparison:
    """Returns the comparison of runs grouped by `labels`, by method when None; `reference` is a method.

    Raises CheckpointError when the runs are not of the same data, devices, channel and seeds.
    """
    arms = _by_arm(runs, labels)
    seeds = _common_seeds(arms)
    base_arm = reference_arm({arm: next(iter(of_arm.values())).method for arm, of_arm in arms.items()}, reference)
    base = arms[base_arm] if base_arm else None
    targets = {seed: held_accuracy(base[seed]) - TARGET_MARGIN for seed in seeds} if base else {}
    estimates: dict[str, Estimates] = {}
    for arm, of_arm in arms.items():
        rows = [run_figures(of_arm[seed], base[seed] if base else None, targets.get(seed)) for seed in seeds]
        estimates[arm] = _over_seeds(rows)
        if base and arm == base_arm:
            equal = [_equal_bandwidth_figures(base[seed], targets[seed]) for seed in seeds]
            estimates[arm + EQUAL_SUFFIX] = _over_seeds(equal)
    ordered = {arm: tuple(of_arm[seed] for seed in seeds) for arm, of_arm in arms.items()}
    return Comparison(ordered, base_arm, targets, estimates)


def _by_arm(runs: Sequence[Run], labels: Sequence[str] | None) -> Arms:
    """Returns the runs by arm and seed; raises CheckpointError for one that is unfinished, given twice, or of another world."""
    arms: dict[str, dict[int, Run]] = {}
    for run, arm in zip(runs, map(one_line, labels or [run.method for run in runs]), strict=True):
        if run.summary is None:
            raise CheckpointError(f"{run.path}: not finished; continue it with `fedprune resume {run.path}`")
        if run.seed in arms.setdefault(arm, {}):
            raise CheckpointError(f"{run.path}: a second run of {arm} with seed {run.seed}; give one of each")
        arms[arm][run.seed] = run
    return arms


def _common_seeds(arms: Arms) -> list[int]:
    """Returns the seeds that every arm has, in order; raises CheckpointError when one has others, or its runs are of another world."""
    seeds = sorted(next(iter(arms.values())))
    first = next(iter(next(iter(arms.values())).values()))
    for arm, of_arm in arms.items():
        if sorted(of_arm) != seeds:
            raise CheckpointError(
                f"{arm} has the seeds {sorted(of_arm)}, others {seeds}: a comparison needs the same ones"
            )
        for run in of_arm.values():
            for key in SAME_WORLD:
                if run.manifest["config"][key] != first.manifest["config"][key]:
                    raise CheckpointError(
                        f"{run.path}: another {key} than {first.path}; runs are compared in the same world"
                    )
    return seeds


def reference_arm(methods: Mapping[str, str], method: str = "personalized") -> str | None:
    """Returns the arm that has the name of the method where it runs it, else the first that does; methods: arm -> what it runs."""
    candidates = [arm for arm, of in methods.items() if of == method]
    return method if method in candidates else next(iter(candidates), None)


def _over_seeds(rows: Sequence[Mapping[str, float | None]]) -> Estimates:
    """Returns the estimate of each quantity from a row a seed."""
    return {quantity.key: mean_over_seeds([row[quantity.key] for row in rows]) for quantity in QUANTITIES}


def run_figures(run: Run, base: Run | None, target: float | None) -> dict[str, float | None]:
    """Returns a run's quantities, its reductions against the reference of the same seed."""
    final = run.final
    latency_s = _mean_latency_s(run)
    reached = None if target is None else crossing(run, target)
    time_s = None if reached is None else run.rounds[reached].simulated_s
    row: dict[str, float | None] = {quantity.key: None for quantity in QUANTITIES}
    row |= {
        "latency_s": latency_s,
        "time_to_target_s": time_s,
        "accuracy": final.accuracy,
        "accuracy_p10": final.accuracy_p10,
        "least_rounds": float(min(presence(run).rounds, default=0)),
        "fresh_accuracy": final.fresh_accuracy,
        "mean_ratio": float(np.mean([r.mean_ratio for r in run.rounds if r.mean_ratio is not None] or [0.0])),
        "megabytes_up": sum(r.bytes_up for r in run.rounds) / 1e6,
        "joules": sum(r.joules for r in run.rounds),
    }
    if base is None or target is None:
        return row
    base_s, equal_s = _mean_latency_s(base), mean_equal_s(base)
    base_time_s = _time_to_held_s(base, target)
    base_final, equal_time_s = base.final, _equal_time_s(base, target)
    row |= {
        "accuracy_gain": final.accuracy - base_final.accuracy,
        "p10_gain": final.accuracy_p10 - base_final.accuracy_p10,
        "time_reduction_equal": None if time_s is None else 1 - time_s / equal_time_s,
        "latency_reduction": 1 - latency_s / base_s,
        "time_reduction": None if time_s is None else 1 - time_s / base_time_s,
        "bandwidth_share": (equal_s - base_s) / equal_s,
        "pruning_share": (base_s - latency_s) / equal_s,
    }
    return row


def _equal_bandwidth_figures(base: Run, target: float) -> dict[str, float | None]:
    """Returns the quantities of the reference on equal bandwidth: dense training does not depend on bandwidth, only its clock does."""
    base_s, equal_s = _mean_latency_s(base), mean_equal_s(base)
    base_time_s, time_s = _time_to_held_s(base, target), _equal_time_s(base, target)
    return run_figures(base, base, target) | {
        "latency_s": equal_s,
        "time_to_target_s": time_s,
        "joules": None,  # the radio's share would have to be metered again
        "latency_reduction": 1 - equal_s / base_s,
        "time_reduction": 1 - time_s / base_time_s,
        "time_reduction_equal": 0.0,
        "bandwidth_share": 0.0,
        "pruning_share": 0.0,
    }


def _mean_latency_s(run: Run) -> float:
    """Returns the mean seconds per round."""
    return float(np.mean([r.latency_s for r in run.rounds]))


def _time_to_held_s(base: Run, target: float) -> float:
    """Returns the reference's seconds to the target, which is a level that it holds and therefore reaches."""
    return base.rounds[crossing(base, target) or 0].simulated_s


def _equal_time_s(base: Run, target: float) -> float:
    """Returns the seconds to the target of the reference's devices on equal bandwidth; it reaches what it holds itself."""
    return float(sum(r.equal_dense_latency_s or 0.0 for r in base.rounds[: (crossing(base, target) or 0) + 1]))


def mean_equal_s(run: Run) -> float:
    """Returns the mean seconds per round of the run's devices without pruning on equal bandwidth."""
    return float(np.mean([r.equal_dense_latency_s or 0.0 for r in run.rounds]))


def missed_seeds(comparison: Comparison, method: str) -> str:
    """Returns on how many seeds a method does not reach the target."""
    runs = comparison.runs[method]
    missed = sum(crossing(run, comparison.targets[run.seed]) is None for run in runs)
    return f"missed on {missed} of {len(runs)} seeds"


def latency_split(comparison: Comparison, reference: str) -> dict[str, tuple[float, float, float, float]]:
    """Returns for each method: seconds per round left, saved by pruning, saved by bandwidth, and half of what is left's interval."""
    equal_s = known(comparison.figures[f"{reference}{EQUAL_SUFFIX}"], "latency_s").mean
    split = {}
    for method, cells in comparison.figures.items():
        latency, bandwidth, pruning = (cells[key] for key in ("latency_s", "bandwidth_share", "pruning_share"))
        if latency and bandwidth and pruning:
            half_s = latency.half_width or 0.0
            split[method] = (latency.mean, pruning.mean * equal_s, bandwidth.mean * equal_s, half_s)
    return split


def headline(comparison: Comparison) -> str:
    """Returns the answer in a few sentences, whichever way it falls."""
    arm, reference = comparison.subject, comparison.reference
    if reference is None or arm == reference:
        return "No reduction is given: it needs the method 'personalized' and another one."
    mine, base = comparison.figures[arm], comparison.figures[reference]
    target = percent(float(np.mean(list(comparison.targets.values()))))
    seeds = len(comparison.targets)
    text = f"{arm} takes {_less(known(mine, 'latency_reduction'))} simulated time per round than {reference} with its own optimal bandwidth"
    if to_target := mine["time_reduction"]:
        equal = _less(known(mine, "time_reduction_equal"))
        text += f" and {_less(to_target)} to the target accuracy of {target}, {equal} than on equal bandwidth"
    else:
        text += f"; it does not reach the target accuracy of {target} on every seed"
    bandwidth, pruning = known(mine, "bandwidth_share").mean, known(mine, "pruning_share").mean
    accuracy, base_accuracy = known(mine, "accuracy").mean, known(base, "accuracy").mean
    text += (
        f". Against equal bandwidth a round takes {_less(Estimate(bandwidth + pruning, None, seeds))}: "
        f"{100 * bandwidth:.1f} points by bandwidth, {100 * pruning:.1f} by pruning. "
        f"Final device accuracy {percent(accuracy)} against {percent(base_accuracy)} ({_points(known(mine, 'accuracy_gain'))} points). "
    )
    return text + (f"Means of {seeds} seeds with 95 % intervals." if seeds > 1 else "One seed: there is no interval.")


def _points(gain: Estimate) -> str:
    if gain.half_width is None:
        return f"{100 * gain.mean:+.2f}"
    ends = gain.mean - gain.half_width, gain.mean + gain.half_width
    return f"{100 * gain.mean:+.2f} [{100 * ends[0]:+.2f}, {100 * ends[1]:+.2f}]"


def _less(reduction: Estimate) -> str:
    word = "less" if reduction.mean >= 0 else "more"
    sign = 1 if reduction.mean >= 0 else -1
    interval = ""
    if reduction.half_width is not None:
        ends = sorted((sign * reduction.mean - reduction.half_width, sign * reduction.mean + reduction.half_width))
        interval = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
    return f"{100 * abs(reduction.mean):.1f} %{interval} {word}"
