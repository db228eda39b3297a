"""What the Tab key offers, in a real bash too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedprune_cli.commands import completion
from fedprune_cli.config.compose import compose_config


def flat(values: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(values, dict) or not values:
        return {prefix.removesuffix("."): values}
    return {name: leaf for key, value in values.items() for name, leaf in flat(value, f"{prefix}{key}.").items()}


def test_every_key_of_the_configuration_is_offered_and_hydra_takes_every_group() -> None:
    composed = flat(OmegaConf.to_container(compose_config([]), resolve=False))
    wanted = {key for key in composed if not key.endswith(".name") and key != "hydra"}
    assert wanted <= {word.removesuffix("=") for word in completion.complete_override("")}
    for group, options in completion.groups().items():
        if not group.startswith("hydra"):  # those need their extras
            compose_config([f"{group}={sorted(options)[-1]}"])  # the others: contracts, experiments


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("partition.al", ["partition.alpha="]),
        ("data=f", ["data=fmnist", "data=folder"]),
        ("method=proposed,ped", []),
        ("method=proposed,pr", ["method=proposed,pruned"]),  # not the one that is there already
        ("failsafe.safe_ratio=", ["failsafe.safe_ratio=false", "failsafe.safe_ratio=true"]),
        ("hydra/launcher=", ["hydra/launcher=cluster", "hydra/launcher=cores", "hydra/launcher=slurm"]),
        ("nothing.like=", []),
    ],
)
def test_words_are_completed(typed: str, offered: list[str]) -> None:
    assert completion.complete_override(typed) == offered


@pytest.mark.parametrize("wordbreaks", ["\t\n\"'><=;|&(:", "\t\n\"'><;|&(:"])
@pytest.mark.parametrize(
    ("line", "offered"),
    [("fedprune ver", ["verify"]), ("fedprune train data=fmn", ["fmnist"]), ("fedprune train -m --qui", ["--quiet"])],
)
def test_bash_gets_what_it_will_put_in_place(wordbreaks: str, line: str, offered: list[str], tmp_path: Path) -> None:
    """bash replaces what follows its last word break, so that at `=` it must be given the value alone."""
    (tmp_path / "completion.sh").write_text(completion.BASH)
    script = """
    source completion.sh
    COMP_WORDBREAKS=$1; COMP_LINE=$2; COMP_POINT=${#2}
    _fedprune_completion fedprune 2>/dev/null
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-c", script, "bash", wordbreaks, line]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": path}, cwd=tmp_path, check=False
    )
    whole = [f"{line.rpartition(' ')[2].rpartition('=')[0]}={word}" for word in offered] if "=" in line else offered
    assert result.stdout.split() == (offered if "=" in wordbreaks else whole)
