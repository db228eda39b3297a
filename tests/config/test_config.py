"""Every configuration error is one line that names the key, its value and what is allowed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import warm
from conftest import TINY, composed, configured, make_experiment
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedprune_cli import CONF
from fedprune_cli.config.build import GROUPS, SECTIONS, _checked, _to_si, build_experiment
from fedprune_cli.config.compose import compose_config
from fedprune_cli.errors import ConfigError

BAD = [
    ("data=fmnst", "unknown data option 'fmnst'. Did you mean 'fmnist'?"),
    ("partition.alpha=-1", "partition.alpha=-1: must be"),
    ("partition.alpha=abc", "partition.alpha"),
    ("partition.alpha=nan", "partition.alpha=nan"),
    ("rounds=1e400", "rounds"),
    ("rounds=0", "rounds=0: must be in 1..1000000"),
    ("rounds=2.5", "rounds"),
    ("rounds=null", "rounds"),
    ("seed=-1", "seed=-1"),
    ("seed=[1", "mismatched|no viable|seed"),
    ("devices.count=0", "devices.count=0"),
    ("devices.count=true", "devices.count"),
    ("devices.radius_km=-1", "devices.radius_km=-1"),
    ("channel.bandwidth_mhz=0", "channel.bandwidth_mhz=0"),
    ("channel.bs_power_dbm=1e9", "channel.bs_power_dbm"),
    ("training.lr=0", "training.lr=0"),
    ("deadline.fraction=0", "deadline.fraction=0"),
    ("deadline.fraction=null", "deadline.fraction"),
    ("deadline.total_seconds=-1", "deadline.total_seconds=-1: must be > 0"),
    ("model.hidden=3", "model.hidden"),
    ("model.hidden=[0]", "model.hidden"),
    ("trainin.lr=1", "unknown configuration key 'trainin.lr'. Did you mean 'training.lr'?"),
    ("partition.alhpa=1", "Did you mean 'partition.alpha'?"),
    ("+foo=1", "unknown configuration key 'foo'"),
    ("+training.foo=1", "foo"),
    ("~data", "data"),
    ("~training.lr", "training.lr"),
    ("training=3", "training"),
    ("method=[a,b]", "method"),
    ("experiment=nope", "unknown experiment option 'nope'|experiment"),
    ("name=../../etc", "name"),
    ("name=''", "name"),
    ("execution.kind=cluster", "execution.kind=cluster: must be 'serial', 'processes', 'ray', 'nodes' or 'flower'"),
    ("out=${oc.env:NOPE}", "out|NOPE"),
    ("training.lr=${nope}", "nope"),
]


@pytest.mark.parametrize(("override", "message"), BAD)
def test_bad_overrides_are_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_experiment(configured(override))
    text = str(caught.value)
    assert "\n" not in text
    assert any(part in text for part in message.split("|")), text


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, table in GROUPS.items() for name in table])
def test_every_table_entry_has_its_file_and_composes(group: str, name: str) -> None:
    assert (CONF / group / f"{name}.yaml").is_file()
    overrides = [f"{group}={name}"]
    needed = {
        "trace": ["file=some.csv"], "uplink": ["file=some.csv"],
        "table": ["file=some.csv", "label=state"], "windows": ["file=some.csv", "label=state"],
        "arrays": ["file=some.npz"], "folder": ["root=some"], "nodes": ["file=some.json"],
    }  # fmt: skip
    overrides += [f"{group}.{value}" for value in needed.get(name, []) if (group, value) != ("devices", "label=state")]
    chosen = getattr(build_experiment(configured(*overrides)), group)
    assert getattr(chosen, "name", name) == name


def outcome_of(build: Callable[[], object]) -> str:
    """Returns what is built, every number with its type, or what is said instead."""
    try:
        return repr(build())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check_against_omegaconf(cls: type, values: dict[str, Any]) -> None:
    asked = outcome_of(lambda: OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values)))
    assert outcome_of(lambda: _checked(cls, values)) == asked


@pytest.mark.parametrize("group", GROUPS)
def test_what_files_hold_is_of_the_types_that_omegaconf_gives_it(group: str) -> None:
    for name, cls in GROUPS[group].items():
        values = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
        check_against_omegaconf(cls, _to_si(values, group))  # type: ignore[arg-type]


STRANGE = (None, True, False, 0, -1, 8, 2**53, 2**70, 10**400, 0.5, 8.0, float("nan"), float("inf"), "8", "0.5", "", "yes", "cpu", "???",
           "${x}", "\\${x}", [], [1], [1, "2"], [1.5], [None], [[1]], {}, {"a": 1})  # fmt: skip


OF_ALL_TYPES = ("model=mlp", "payload", "deadline", "evaluation")  # numbers, texts, lists; records have the law below
LONG = ("devices=measured", "channel=umi", *SECTIONS)


@pytest.mark.parametrize(
    "place",
    [*OF_ALL_TYPES, *(pytest.param(one, marks=pytest.mark.slow) for one in LONG if one not in OF_ALL_TYPES)],
)
def test_every_strange_value_is_converted_or_refused_as_omegaconf_does(place: str) -> None:
    key, _, name = place.partition("=")
    cls = GROUPS[key][name] if name else SECTIONS[key]
    whole = make_experiment(*[place] * bool(name))
    sound = {field.name: getattr(getattr(whole, key), field.name) for field in dataclasses.fields(cls) if field.init}
    sound = json.loads(json.dumps(sound, default=dataclasses.asdict))
    for name in sound:
        for strange in STRANGE:
            check_against_omegaconf(cls, sound | {name: strange})
    check_against_omegaconf(cls, sound | {"nope": 1})
    for name in sound:
        check_against_omegaconf(cls, {key: value for key, value in sound.items() if key != name})


@pytest.mark.parametrize("strange", [None, True, -1, 10**400, "8", "x", "${x}", [1]])
@pytest.mark.parametrize("key", ["cpu_hz", "source", "nope"])
def test_a_strange_value_in_a_record_is_converted_or_refused_as_omegaconf_does(key: str, strange: object) -> None:
    devices = dataclasses.asdict(make_experiment("devices=measured").devices)  # type: ignore[call-overload]
    records = [record | {key: strange} for record in devices["classes"][:1]]
    check_against_omegaconf(
        GROUPS["devices"]["measured"], devices | {"classes": records, "mix": [records[0]["name"]], "shares": [1]}
    )


def test_every_file_has_its_table_entry() -> None:
    for group, table in GROUPS.items():
        assert {path.stem for path in (CONF / group).glob("*.yaml")} == set(table)


@pytest.mark.parametrize(
    "overrides",
    [
        ["devices=measured", "training.lr=0.5", "rounds=2", "training.lr=null", "model.hidden=[8,4]", "out=${oc.env:HOME}/x", "out=y"],
        ["model.hidden=[]", "experiment=ablations", "seed=3", "data=watch", "meter=paper", "model=cnn1d", "name='a b'"],
        ["+foo=1", "~training.lr", "partition=iid", "+training.more={a: 3}"],
    ],
)  # fmt: skip
def test_the_tests_own_way_to_compose_gives_what_the_command_line_does(overrides: list[str]) -> None:
    given, asked = composed(*overrides), compose_config([*TINY, *overrides])
    assert OmegaConf.to_yaml(given) == OmegaConf.to_yaml(asked)
    assert OmegaConf.is_struct(given) == OmegaConf.is_struct(asked)
    given.rounds = 7
    assert composed(*overrides) == asked  # nobody else sees what somebody changes


@pytest.mark.parametrize("override", ["partition.alhpa=1", "training.lr=1,2", "data=fmnst"])
def test_what_the_command_line_refuses_is_refused_by_the_tests_own_way_in_the_same_words(override: str) -> None:
    with pytest.raises(ConfigError) as asked:
        compose_config([*TINY, override])
    with pytest.raises(ConfigError) as given:
        composed(override)
    assert str(given.value) == str(asked.value)


def test_what_the_tests_read_once_is_what_the_files_hold() -> None:
    for path in sorted(CONF.rglob("*.yaml")):
        assert OmegaConf.load(path) == warm.load(path), path


def test_units_become_si() -> None:
    experiment = make_experiment("channel.bandwidth_mhz=5", "channel.bs_power_dbm=30", "channel.noise_dbm_per_hz=-174")
    assert experiment.channel.bandwidth_hz == 5e6
    assert experiment.channel.bs_power_w == pytest.approx(1)
    assert experiment.channel.noise_w_per_hz == pytest.approx(3.98e-21, rel=1e-3)


def test_the_hash_knows_numbers_and_nothing_else() -> None:
    base = make_experiment().config_hash
    places = ("execution.kind=processes", "execution.workers=3", "out=elsewhere", "tracking=wandb")
    for same in ("seed=5", "training.lr=5e-2", *places):
        assert make_experiment(same).config_hash == base, same
    for other in ("rounds=4", "training.lr=0.06", "method=fedavg", "deadline.fraction=0.4", "partition.alpha=0.9"):
        assert make_experiment(other).config_hash != base, other


def test_data_root_is_a_place_and_no_number() -> None:
    hashes = {
        build_experiment(compose_config(["data=fmnist", f"data.root={root}"])).config_hash for root in ("/a", "/b")
    }
    assert len(hashes) == 1


KEYS = [
    "rounds",
    "partition.alpha",
    "training.lr",
    "devices.count",
    "channel.bandwidth_mhz",
    "deadline.fraction",
    "model.hidden",
    "data",
]


@settings(max_examples=50)
@given(st.sampled_from(KEYS), st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12))
def test_any_text_is_a_value_or_one_line(key: str, text: str) -> None:
    lines = 1
    try:
        build_experiment(compose_config([f"{key}={text}"]))
    except ConfigError as error:
        lines = len(str(error).splitlines())
    assert lines == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_says_what_it_asks(name: str) -> None:
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    for key in ("Question:", "Command:", "Expected:", "Minutes:"):
        assert any(line.startswith(f"# {key}") and line.removeprefix(f"# {key}").strip() for line in lines), key
    assert build_experiment(configured(f"experiment={name}")).name == name  # tests/system/test_experiments.py: its arms
