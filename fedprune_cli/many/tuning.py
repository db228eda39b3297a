"""Every arm at its own best setting: what each may choose from, the runs that choose, on seeds of their own, and what it takes.

    tune:
      seeds: [97, 98, 99]
      settings:                                                # of all arms; or arm -> such a list, and others stay as they are
        - deadline.fraction=0.2
        - deadline.seconds=1 allocator.on_infeasible=drop
        - deadline.seconds=0.1*round allocator.on_infeasible=drop

`round` stands for the reference's median seconds per round on the seed that a run is of, so that an experiment can ask for seconds on any
data and radio. The reference runs first, at the first of its own settings: it sets the target and the unit of each seed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedprune_cli.config.experiment import Experiment
from fedprune_cli.config.overrides import parse_override
from fedprune_cli.config.words import MAX_SEED
from fedprune_cli.errors import ConfigError, FedpruneError, unknown
from fedprune_cli.many.compared import OF_A_ROUND, OWN_KEYS, Contest, build_member, draw
from fedprune_cli.many.side_by_side import Failure, Member
from fedprune_cli.report.comparison import SAME_WORLD, reference_arm
from fedprune_cli.report.read import read_run
from fedprune_cli.report.tuning import UNCHANGED, Trial, Tuned, best_of, round_s
from fedprune_cli.store.files import Plain

KEYS = ("seeds", "settings")
Setting = tuple[str, ...]  # overrides
Runner = Callable[[Sequence[Member]], Sequence[Failure]]  # takes members to their ends, and returns those that failed


@dataclass(frozen=True)
class Tuning:
    """How arms are tuned: the seeds of the runs that choose, arm -> its settings in their order, and the arm that sets the targets."""

    seeds: tuple[int, ...]
    settings: Mapping[str, Sequence[Setting]]
    reference: str


def called(setting: Setting) -> str:
    """Returns a setting as it is shown."""
    return " ".join(word if OF_A_ROUND.search(word) else shlex.quote(word) for word in setting) or UNCHANGED


def read_tuning(contest: Contest) -> Tuning | None:
    """Returns how a contest's arms are tuned, None where they are compared as they are.

    Every setting of every arm is composed and checked before the first run; raises ConfigError naming the arm and the setting.
    """
    tune = contest.tune
    if tune is None:
        return None
    if not isinstance(tune, dict):
        raise ConfigError(f"tune={tune}: must be null, or seeds and settings")
    for key in tune:
        if key not in KEYS:
            raise unknown("key 'tune' has", str(key), KEYS)
    if missing := [key for key in KEYS if key not in tune]:
        raise ConfigError(f"tune.{missing[0]}: missing value")
    seeds = _seeds(tune["seeds"])
    if both := [seed for seed in seeds if seed in contest.seeds]:
        raise ConfigError(
            f"--seeds: {both[0]} is of tune.seeds, which choose the settings and are not reported; give others"
        )
    settings = {arm: _settings(arm, contest, tune["settings"]) for arm in contest.arms}
    built = {arm: [_build(contest, arm, setting, seeds[0]) for setting in of] for arm, of in settings.items()}
    reference = reference_arm({arm: of[0].method.name for arm, of in built.items()})
    if reference is None:
        raise ConfigError("tune: needs an arm with method=personalized, which sets the target")
    if any(OF_A_ROUND.search(override) for override in settings[reference][0]):
        raise ConfigError(
            f"tune.settings: {called(settings[reference][0])}: {reference} measures a round with it, so that it needs seconds"
        )
    draw(built[reference][0])
    world = {key: built[reference][0].identity[key] for key in SAME_WORLD}
    for arm, of in built.items():
        for setting, experiment in zip(settings[arm], of, strict=True):
            if other := [key for key in SAME_WORLD if experiment.identity[key] != world[key]]:
                raise ConfigError(
                    f"tune.settings: {arm}, {called(setting)}: another {other[0]}; arms are compared in the same world"
                )
    return Tuning(seeds, settings, reference)


def _seeds(given: Plain) -> tuple[int, ...]:
    seeds = given if isinstance(given, list) else []
    whole = [one for one in seeds if isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= MAX_SEED]
    if not whole or len(whole) < len(seeds):
        raise ConfigError(f"tune.seeds={given}: must be a list of seeds in 0..2^63-1")
    return tuple(dict.fromkeys(whole))


def _settings(arm: str, contest: Contest, given: Plain) -> tuple[Setting, ...]:
    """Returns the settings of an arm; one without overrides where it has none to choose from."""
    if isinstance(given, dict):
        for name in given:
            if name not in contest.arms:
                raise unknown("arm of tune.settings", str(name), contest.arms)
        given = given.get(arm, [""])
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise ConfigError(
            f"tune.settings={given}: must be a list of settings, each as on a command line, or arm -> such a list"
        )
    settings = tuple(dict.fromkeys(_words(str(text)) for text in given))
    for override in (word for setting in settings for word in setting):
        key = parse_override(OF_A_ROUND.sub("=1", override)).key_or_group
        if key in (*OWN_KEYS, "arms", "tune", "experiment"):
            raise ConfigError(f"tune.settings: {override}: no setting chooses {key}")
    return settings


def _words(text: str) -> Setting:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"tune.settings: {text}: {str(error).lower()}") from None


def _build(contest: Contest, arm: str, setting: Setting, seed: int) -> Experiment:
    try:
        return build_member(contest, arm, setting, seed)[1]
    except ConfigError as error:
        raise ConfigError(f"tune.settings: {arm}, {called(setting)}: {error}") from None


def tune(contest: Contest, tuning: Tuning, run: Runner) -> tuple[Contest, Tuned]:
    """Returns the contest with each arm at the setting that it took, and what was tried; `run` makes the runs that choose.

    Raises FedpruneError, with the exit code of the first failure, where the reference or every setting of an arm failed.
    """
    reference = tuning.reference
    seeds = (*tuning.seeds, *contest.seeds)
    first = [build_member(contest, reference, tuning.settings[reference][0], seed)[0] for seed in seeds]
    if failures := run(first):
        error = FedpruneError(f"tune: {reference} sets the target and failed, see above")
        error.exit_code = failures[0].exit_code
        raise error
    bases = {member.seed: read_run(member.run_dir) for member in first}
    contest = replace(contest, round_s={seed: round_s(run) for seed, run in bases.items()})
    choices = [(arm, setting) for arm, of in tuning.settings.items() for setting in of if len(of) > 1]
    members = {
        choice: [_trying(build_member(contest, *choice, seed)[0], choice[1]) for seed in tuning.seeds]
        for choice in choices
    }
    failures = run([member for of in members.values() for member in of])
    failed = {failure.member.run_dir: failure.message for failure in failures}
    trials = {choice: _trial(choice, of, failed) for choice, of in members.items()}
    tuned = Tuned(reference, {seed: bases[seed] for seed in tuning.seeds}, tuple(trials.values()), {})
    taken = {arm: of[0] for arm, of in tuning.settings.items()}
    for arm in dict.fromkeys(arm for arm, _ in choices):
        best = best_of([trial for trial in trials.values() if trial.arm == arm], tuned.bases)
        if best is None:
            error = FedpruneError(f"tune: every setting of {arm} failed, see above")
            error.exit_code = failures[0].exit_code
            raise error
        taken[arm] = next(setting for (of, setting), trial in trials.items() if of == arm and trial is best)
    chosen = {arm: called(taken[arm]) for arm, _ in choices}
    contest = replace(contest, arms={arm: (*of, *taken[arm]) for arm, of in contest.arms.items()})
    return contest, replace(tuned, chosen=chosen)


def _trying(member: Member, setting: Setting) -> Member:
    return replace(member, arm=f"{member.arm}, {called(setting)}", reported=False)


def _trial(choice: tuple[str, Setting], members: Sequence[Member], failed: Mapping[Path, str]) -> Trial:
    arm, setting = choice
    failure = next((failed[one.run_dir] for one in members if one.run_dir in failed), None)
    return Trial(arm, called(setting), () if failure else tuple(read_run(one.run_dir) for one in members), failure)
