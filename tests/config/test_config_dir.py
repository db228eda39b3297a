"""A folder of one's own, `--config-dir`, with every command that composes; and lists of words as the commands refuse them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TINY, fedprune

MINE = "# @package _global_\nname: mine\narms:\n  tight: [deadline.fraction=0.4]\n  loose: [deadline.fraction=0.9]\n"


def made_folder() -> str:
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/mine.yaml").write_text(MINE)
    return "conf"


def test_arms_of_ones_own_are_compared_and_train_says_that_it_ignores_them() -> None:
    asked = ("--config-dir", made_folder(), "experiment=mine", *TINY)
    compared = fedprune("compare", *asked, "--json", "--jobs", "1")
    assert compared.returncode == 0, compared.stderr
    assert {path.parent.name for path in Path("outputs").glob("mine/*/summary.json")} != set()
    assert "tight" in compared.stdout
    assert "loose" in compared.stdout
    trained = fedprune("train", *asked, "out=alone")
    assert trained.returncode == 0
    assert "arms are for compare: train runs the experiment without them" in trained.stderr


@pytest.mark.slow
def test_what_calibrate_writes_is_used_by_allocate_and_ladder() -> None:
    made = fedprune(
        "calibrate", *TINY, "--turns", "1", "--ratios", "0,0.5", "--ratios-only", "--cpu-ghz", "1", "--out", "cal"
    )
    assert made.returncode == 0, made.stderr
    for command in ("ladder", "allocate"):
        plain = fedprune(command, "--json", "devices.count=3")
        own = fedprune(command, "--json", "--config-dir", "cal", "devices=calibrated", "devices.count=3")
        assert own.returncode == 0, own.stderr
        assert json.loads(own.stdout) != json.loads(plain.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train|--cfg|jobs", "unknown --cfg 'jobs'. Did you mean 'job'?"),
        ("train|--info|nope", "unknown --info 'nope'. Allowed: all, config"),
        ("train|-p|training", "-p training: shows a part of the configuration, with --cfg job"),
        ("train|--cfg|job|-p|trainin", "unknown part of the configuration 'trainin'. Did you mean 'training'?"),
        ("train|--config-name|nope", "--config-name nope: there is no such configuration file"),
        ("train|seed=1,2", "seed=1,2: several values are for `fedprune train -m`; a list is seed=[1,2]"),
        ("train|-m|seed=1,2,", "an item between commas is empty: type seed=1,2"),
        ("train|-m|data=digits,nope", "unknown data option 'nope'"),
        ("train|devices.file=fleet (1).csv", "the value must be quoted: 'devices.file=\"fleet (1).csv\"'"),
        ("train|--|--help", "--help: must be KEY=VALUE"),
        ("compare|--seeds|0,", "--seeds 0,: an item is empty; type --seeds 0"),
        ("compare|--seeds|0,0", "--seeds 0,0: 0 stands there twice"),
        ("compare|--seeds|²", "'²' must be a whole number from 0 on"),
        ("compare|--methods|proposed,", "--methods proposed,: an item is empty; type --methods proposed"),
        ("compare|--methods|", "--methods : an item is empty"),
        ("compare|arms=3", "arms: must map each name to a list of overrides"),
        ("ladder|--fractions|0.5,x", "--fractions 0.5,x: 'x' must be a number above 0"),
        ("ladder|--allocators|kkt,kkt", "kkt stands there twice"),
        ("calibrate|--ratios|0,,0.5", "--ratios 0,,0.5: an item is empty; type --ratios 0,0.5"),
        ("allocate|--objective|p3", "unknown objective 'p3'. Did you mean 'p2'?"),
        *((f"{command}|--config-dir|nope", "--config-dir nope: there is no such folder")
          for command in ("train", "compare", "allocate", "ladder", "calibrate")),
    ],
)  # fmt: skip
def test_commands_refuse_in_one_line_and_write_nothing(arguments: str, message: str) -> None:
    ended = fedprune(*arguments.split("|"))
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert message in ended.stderr
    assert list(Path().iterdir()) == []
