"""What is mistyped is refused in our own words: one line that says what to type instead, and nothing of the libraries below."""

from __future__ import annotations

import random
import re
import shlex
from pathlib import Path

import pytest

from fedprune_cli.config.build import build_experiment
from fedprune_cli.config.compose import branch_config, check_overrides, compose_config
from fedprune_cli.config.experiment import Branch
from fedprune_cli.config.overrides import parse_override
from fedprune_cli.config.words import parse_choice, parse_names, parse_numbers, parse_seeds
from fedprune_cli.errors import ConfigError, one_line

FOREIGN = re.compile(
    r"hydra|omegaconf|exception|alternative|mismatched|extraneous|token recognition|struct\b|ListConfig|DictConfig|multirun|"
    r"defaults list|interpolation|traceback|full_key|to append|search path|expecting",
    re.IGNORECASE,
)


def refusal(*overrides: str, config_dir: Path | None = None) -> str:
    """Returns the one line with which overrides are refused, by composing or by building."""
    with pytest.raises(ConfigError) as caught:
        build_experiment(compose_config(overrides, config_dir))
    text = str(caught.value)
    assert text == one_line(text)
    assert caught.value.exit_code == 2
    return text


@pytest.mark.parametrize(
    ("override", "typed_instead"),
    [
        ("devices.file=fleet (1).csv", "devices.file=fleet (1).csv"),
        ("name=“a b”", "name=a b"),
        ("out='a b", "out=a b"),
        ("out=é", "out=é"),
        ("out=it's", "out=it's"),
        ('out=a"b', 'out=a"b'),
        ("out=~/x", "out=~/x"),
        ("out=a=b", "out=a=b"),
        ("out=a#b;c&d", "out=a#b;c&d"),
        ("+out=x (1)", "+out=x (1)"),
        ("out=1,2", "out=1,2"),
    ],
)
def test_what_to_type_instead_is_what_was_meant(override: str, typed_instead: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(override)
    quoted = str(caught.value)[len(override) :]
    word = shlex.split(quoted[quoted.index(f"'{override.split('=')[0]}=") :])[0]  # as the shell would read it
    parsed = parse_override(word)
    assert f"{word.split('=')[0]}={parsed.value()}" == typed_instead


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("~", "~: a key is missing: must be KEY=VALUE"),
        ("=x", "=x: a key is missing: must be KEY=VALUE"),
        ("rounds", "rounds: must be KEY=VALUE"),
        ("rounds:=3", "rounds:=3: type rounds=3"),
        ("rounds =3", "rounds =3: type rounds=3"),
        ("--help", "--help: must be KEY=VALUE; options stand before a `--`"),
        ("model.hidden[0]=3", "'model.hidden[0]' is no key"),
        ("model.hidden=[16,32", "model.hidden=[16,32: '[' has no counterpart: a list is model.hidden=[1,2]"),
        ("model.hidden=[16}", "']' has no counterpart|'}' has no counterpart"),
        ("training={lr=3}", "it cannot be read: a list is training=[1,2], a group training={a: 1}"),
        ("name=${seed", "name=${seed: '${' has no '}'"),
        ("name=${nope}", "name: ${nope}: there is no such key"),
        ("out=${oc.env:NOPE}", "out: the environment has no variable NOPE"),
        ("seed=0,", "seed=0,: an item between commas is empty: type seed=0"),
        ("seed=0,,1", "type seed=0,1"),
        ("seed=²", "seed=²: digits and signs must be plain ones: type seed=2"),
        ("devices.tx_power_dbm=−3", "type devices.tx_power_dbm=-3"),
        ("seed=1,2", "seed=1,2: several values are for `fedprune train -m`; a list is seed=[1,2], and one text is 'seed=\"1,2\"'"),
        ("seed=range(3)", "seed=range(3): several values are for `fedprune train -m`"),
        ("data=digits,mnist", "several values are for `fedprune train -m`"),
        ("a=", "unknown configuration key 'a'"),
        ("rounds=", "rounds=: must be a whole number"),
        ("rounds=five", "rounds=five: must be a whole number"),
        ("training.lr=5%", "training.lr=5%: must be a number"),
        ("deadline.fraction=1/2", "deadline.fraction=1/2: must be a number or null"),
        ("failsafe.safe_ratio=maybe", "failsafe.safe_ratio=maybe: must be true or false"),
        ("model.hidden=3", "model.hidden=3: must be a list of whole numbers"),
        ("training=3", "training=3: must be a group of values, such as training.KEY=VALUE"),
        ("training=[3]", "training=[3]: must be a group of values"),
        ("training={nope: 3}", "unknown configuration key 'training.nope'"),
        ("model.hidden.9=3", "model.hidden.9=3: the list has no such place"),
        ("data.root=/a b", "unknown configuration key 'data.root'. It belongs to data=cifar10"),
        ("data=", "unknown data option ''. Allowed: arrays, cifar10"),
        ("data=3", "unknown data option '3'"),
        ("data=null", "unknown data option 'null'"),
        ("data=???", "data: missing value: must be one of arrays, cifar10"),
        ("data@x=mnist", "no key has an '@'"),
        ("+data=digits", "data: is chosen twice"),
        ("++data=digits", "++data=digits: type data=digits"),
        ("+rounds=3", "+rounds: is there already, type rounds=VALUE"),
        ("~nope", "~nope: there is nothing of that name to take out"),
        ("~data=mnist", "~data=mnist: there is nothing of that name to take out"),
        ("~training.lr=3", "~training.lr=3: its value is 0.05; ~training.lr takes it out"),
        ("devices=table", "devices.file: missing value, type devices.file=VALUE"),
        ("rounds=???", "rounds: missing value, type rounds=VALUE"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_words(override: str, message: str) -> None:
    text = refusal(override)
    assert any(part in text for part in (message, *message.split("|"))), text
    assert not FOREIGN.search(text)


SIGNS = ("", "", "", "", "+", "++", "~", "-", "--", "~~", "/", " ", "=", "@", "$", ".")
KEYS = ("rounds", "seed", "training.lr", "training", "model.hidden", "data", "data.root", "devices.file", "channel", "channel.file", "name",
        "out", "arms", "branch", "experiment", "deadline.fraction", "payload.bits", "failsafe.safe_ratio", "nope", "trainin.lr",
        "training.lr.x", "", "a b", "a..b", "a.", "data@x", "model.hidden.0", "model.hidden[0]", "é", "objectives",
        "faults.nope")  # fmt: skip
EQUALS = ("=", "=", "=", "=", "=", "", ":=", "==", " = ", ":", "=>", "+=", "＝")
VALUES = (
    "", "1", "a", "fleet (1).csv", "(", ")", "[", "]", "{", "}", "[1", "1]", "{a", "{a:", "{a: 1", "a}", "[1,,2]", "[1 2]", "{a=1}",
    "${", "${seed", "${nope}", "${nope:1}", "${seed}", "${oc.env:NOPE}", "${oc.env:}", "'${'", "'${a:[}'", "“a”", "‘a’", '"a', 'a"',
    "'a", "it's", "/a b", "a,b", "a,", ",", "1,,2", "²", "１", "−1", "½", "a;b", "a#b", "#", "a&b", "<a>", "`a`", "a!b", "a^b", "a\\",
    "\\", "\t", " ", "choice(1,2)", "choice(", "range(1,a)", "range(3)", "foo(1)", "int(a)", "int(1.5)", "glob(*)", "sort(2,1)",
    "null", "???", "true", "1e999", "nan", "[[1]]", "{a: {b: 1}}", "[a", "digits", "a: b", "a=b", "é", "日本", "\x1b[2J", "\n", "a\nb",
    "\u2028", "%", "@", "|", "$", "~", "*", "?", "'", '"', '""', "''", 'a\'b"c', "{}", "[]", "!", "[(]", "{(: 1}", "1.5.5", "0x1",
    "1_0", "--", "-", "+",
)  # fmt: skip


def mistyped(rng: random.Random) -> str:
    """Returns an override of good and bad pieces."""
    value = rng.choice(VALUES)
    if rng.random() < 0.2:
        value += rng.choice(VALUES)
    return rng.choice(SIGNS) + rng.choice(KEYS) + rng.choice(EQUALS) + value


def check_mistyped(count: int, first: int) -> int:
    """Tries overrides; returns how many are refused."""
    bad = 0
    for seed in range(first, first + count):
        override = mistyped(random.Random(seed))
        try:
            build_experiment(compose_config([override]))
        except ConfigError as error:
            bad, text = bad + 1, str(error)
            assert text == one_line(text), override
            assert not FOREIGN.search(text), (override, text)
        else:
            continue
    return bad


def test_hundreds_of_mistyped_overrides_are_one_line_of_our_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert check_mistyped(200, 0) > 150
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_thousands_of_mistyped_overrides_are_one_line_of_our_own() -> None:
    assert check_mistyped(5000, 1000) > 4000


def test_a_sweep_takes_several_values_and_nothing_else_that_is_wrong() -> None:
    check_overrides(["seed=1,2", "data=digits,mnist", "training.lr=choice(0.1,0.2)", "seed=range(0,3)"])
    with pytest.raises(ConfigError, match="an item between commas is empty: type seed=1,2"):
        check_overrides(["seed=1,2,"])
    with pytest.raises(ConfigError, match=r"unknown data option 'digit'\. Did you mean 'digits'"):
        check_overrides(["data=digit,mnist"])
    Path("conf/data").mkdir(parents=True)
    Path("conf/data/digit.yaml").write_text("")
    check_overrides(["data=digit,mnist"], config_dir=Path("conf"))
    with pytest.raises(ConfigError, match="several values are for"):
        check_overrides(["seed=1,2"], sweep=False)


def test_a_branch_is_asked_for_in_the_same_words() -> None:
    config, begun = compose_config([]), Branch("0" * 12 + "-s0", 1)
    assert branch_config(config, ["rounds=50", 'out="a (b)"', "deadline.fraction=null"], begun).out == "a (b)"
    for override, message in (
        ("out=a (b)", "must be quoted: 'out=\"a (b)\"'"),
        ("rounds", "rounds: must be KEY=VALUE"),
        ("rounds=5,6", "several values"),
        ("~rounds", "~rounds: must be KEY=VALUE"),
        ("seed=3", "unknown key of a branch 'seed'"),
        ("out=${", "has no '}'"),
    ):
        with pytest.raises(ConfigError) as caught:
            branch_config(config, [override], begun)
        assert message in str(caught.value)
        assert not FOREIGN.search(str(caught.value))


# --- a folder of one's own ------------------------------------------------------------------------------------------

MINE = "# @package _global_\nname: mine\nrounds: 7\narms:\n  tight: [deadline.fraction=0.3]\n  loose: [deadline.fraction=0.9]\n"


def test_an_experiment_of_ones_own_composes_from_any_folder() -> None:
    for folder in ("conf", "a (b), c", "it's", 'q"uote', "é [1]", "$x {y}"):
        (Path(folder) / "experiment").mkdir(parents=True)
        (Path(folder) / "experiment" / "mine.yaml").write_text(MINE)
        (Path(folder) / "devices").mkdir()
        (Path(folder) / "devices" / "calibrated.yaml").write_text("name: table\nfile: x.csv\nper_round: null\nfresh: 0\n"
            "energy_coefficient: 0\n"
            "energy_budget_j: null\nmin_bandwidth_mhz: 0\nmax_bandwidth_mhz: null\n")  # fmt: skip
        config = compose_config(["experiment=mine", "devices=calibrated"], Path(folder))
        assert (config.rounds, list(config.arms)) == (7, ["tight", "loose"])
        assert build_experiment(config).devices.name == "table"
    assert "unknown experiment option 'mine'" in refusal("experiment=mine")
    assert "Did you mean 'mine'?" in refusal("experiment=min", config_dir=Path("conf"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# @package _global_\ndefaults:\n  - override /data: nope\n", "unknown data option 'nope'"),
        ("# @package _global_\ndefaults:\n  - override /nope: digits\n", "unknown configuration key 'nope'"),
        ("# @package _global_\ndefaults:\n  - nope\n", "there is no configuration file experiment/nope.yaml"),
        ("# @package _global_\nnope: 3\n", "unknown configuration key 'nope'"),
        ("# @package _global_\ntraining: 3\n", "training=3: must be a group of values"),
        ("# @package _global_\nname: ${\n", "'${' and '}' must enclose a key"),
        ("# @package _global_\nname: [\n", "not YAML"),
        ("- 1\n", "mine.yaml: must hold keys with their values"),
        ("# @package _global_\ndefaults: 3\n", "experiment/mine.yaml: its list of defaults cannot be followed"),
        ("# @package _global_\ndefaults:\n  - _self_\n  - _self_\n", "experiment/mine.yaml: its list of defaults cannot be followed"),
        ("rounds: 3\n", "the first line of an experiment's file must be `# @package _global_`"),
        ("a: 1\na: 2\n", "mine.yaml: key a stands there twice"),
    ],
)  # fmt: skip
def test_a_bad_file_of_ones_own_is_one_line(text: str, message: str) -> None:
    path = Path("conf/experiment/mine.yaml")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    said = refusal("experiment=mine", config_dir=Path("conf"))
    assert any(part in said for part in message.split("|")), said
    assert not FOREIGN.search(said), said


def test_a_folder_that_is_none_is_refused() -> None:
    Path("file").write_text("")
    for folder in ("nowhere", "file", "nul\0"):
        assert "there is no such folder" in refusal(config_dir=Path(folder))


# --- lists of words -------------------------------------------------------------------------------------------------


def test_words_are_read_as_they_stand() -> None:
    assert parse_names("proposed, personalized", "--methods") == ("proposed", "personalized")
    assert parse_seeds("0,1,2") == (0, 1, 2)
    assert parse_seeds(" 7 , 9223372036854775807") == (7, 2**63 - 1)
    assert parse_numbers("0,0.25,.5,1e-1", "--ratios", lambda r: 0 <= r < 1, "in [0, 1)") == (0, 0.25, 0.5, 0.1)
    assert parse_choice("job", "--cfg", ("job", "all")) == "job"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("proposed,", "--methods proposed,: an item is empty; type --methods proposed"),
        (",", "--methods ,: an item is empty"),
        ("", "--methods : an item is empty"),
        ("a,,b", "type --methods a,b"),
        ("a,b,a", "--methods a,b,a: a stands there twice"),
    ],
)
def test_names_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_names(text, "--methods")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,", "--seeds 0,: an item is empty; type --seeds 0"),
        ("0,0", "--seeds 0,0: 0 stands there twice"),
        ("0,00", "0 stands there twice"),
        ("²", "'²' must be a whole number from 0 on"),
        ("１", "must be a whole number"),
        ("٣", "must be a whole number"),
        ("-1", "'-1' must be a whole number"),
        ("1.0", "must be a whole number"),
        ("1_0", "must be a whole number"),
        ("0-4", "several are joined by commas: 0,1,2"),
        ("0 1", "must be a whole number"),
        ("9223372036854775808", "is too large, the largest seed is 9223372036854775807"),
        ("9" * 5000, "is too large"),
        (",".join(map(str, range(20_000))), "20000 items, at most 10000 are read"),
    ],
)
def test_seeds_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_seeds(text)
    assert message in str(caught.value) or len(text) > 1000
    assert str(caught.value) == one_line(str(caught.value))


@pytest.mark.parametrize(
    "text", ["", "0.5,", "x", "1", "-0.1", "nan", "inf", "1e999", "½", "１", "0_1", "0.5,.5", "0.5;0.6"]
)
def test_numbers_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--ratios {re.escape(text)}: "):
        parse_numbers(text, "--ratios", lambda ratio: 0 <= ratio < 1, "in [0, 1)")


def test_a_choice_names_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"unknown --cfg 'jobs'. Did you mean 'job'\? Allowed: all, hydra, job"):
        parse_choice("jobs", "--cfg", ("job", "hydra", "all"))
