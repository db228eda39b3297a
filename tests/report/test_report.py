"""Reports: pages that stand alone, figures that repeat to the byte, and a comparison whose sums are right."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, configured, resign, run_to_end

from fedprune_cli.errors import CheckpointError
from fedprune_cli.report import figures, page
from fedprune_cli.report.comparison import compare, headline, latency_split, mean_equal_s, missed_seeds, run_figures
from fedprune_cli.report.comparison_page import markdown, read_table, write_comparison
from fedprune_cli.report.read import Run, crossing, read_run
from fedprune_cli.report.run import write_report
from fedprune_cli.report.sweep import Combination, build_groups, write_sweep
from fedprune_cli.runs import life


@pytest.fixture
def runs(finished: dict[tuple[str, int], Path], tmp_path: Path) -> dict[tuple[str, int], Path]:
    """Returns copies of finished runs, for a test to do with as it likes."""
    return {key: shutil.copytree(path, tmp_path / path.name) for key, path in finished.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    paths, place = {}, tmp_path_factory.mktemp("runs")
    for method in ("proposed", "personalized"):
        for seed in (0, 1):
            path = place / f"{method}{seed}"
            run_to_end(path, f"method={method}", f"seed={seed}", "rounds=4")
            paths[method, seed] = path
    return paths


@pytest.fixture(scope="module")
def pages(finished: dict[tuple[str, int], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Returns the page of a run's report and that of a comparison, drawn once, to look at."""
    place = tmp_path_factory.mktemp("pages")
    of_one = write_report(shutil.copytree(finished["proposed", 0], place / "run"))
    return [of_one, write_comparison(compare([read_run(path) for path in finished.values()]), place / "comparison")]


def test_a_report_holds_its_figures_and_repeats_to_the_byte(runs: dict[tuple[str, int], Path]) -> None:
    path = runs["proposed", 0]
    page = write_report(path)
    first = {file.name: file.read_bytes() for file in page.parent.iterdir()}
    figures = {f"{name}.svg" for name in ("accuracy", "latency", "allocation", "convergence", "partition")}
    assert set(first) == {"index.html", "rounds.csv", "devices.csv", "histogram.csv"} | figures
    write_report(path)
    assert first == {file.name: file.read_bytes() for file in page.parent.iterdir()}
    rows = list(csv.DictReader((page.parent / "rounds.csv").open()))
    records = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    assert [float(row["latency_s"]) for row in rows] == [record["latency_s"] for record in records]
    assert len(list(csv.DictReader((page.parent / "devices.csv").open()))) == 4 * 4
    counts = np.array(
        [
            [int(v) for k, v in row.items() if k != "device"]
            for row in csv.DictReader((page.parent / "histogram.csv").open())
        ]
    )
    assert counts.sum() == 1797


def test_a_page_needs_nothing_but_itself(pages: list[Path]) -> None:
    for written in pages:
        text = written.read_text()
        assert len(text) < 1_000_000
        assert "<script" not in text
        assert not re.search(r'(src|href)="?(https?:)?//', text)
        assert not re.search(r"url\((?!#)", text)
        assert text.count("<svg") == text.count("</svg>") >= 2
        identifiers = re.findall(r' id="([^"]+)"', text)
        assert len(identifiers) == len(set(identifiers))
        assert "prefers-color-scheme: dark" in text
        assert "currentColor" in text


def test_no_figure_shows_markup_of_mathematics(
    runs: dict[tuple[str, int], Path], pages: list[Path], tmp_path: Path
) -> None:
    """Text is drawn as it is, for names may hold dollars: a label in TeX would be read as TeX."""
    loaded = [read_run(path) for path in runs.values()]
    swept = [Combination((f"a={at}", f"seed={run.seed}"), str(run.path)) for at, run in enumerate(loaded)]
    written = [*pages, write_sweep(swept, build_groups(swept), tmp_path / "sweep")]
    drawn = [path.read_text() for page in written for path in page.parent.glob("*.svg")]
    drawn.append(figures.frontier_figure([{"deadline_s": 1.0, "mean_ratio": 0.5}], 1.0).svg())
    point = dict.fromkeys(("ratio", "measured_s", "low_s", "high_s", "modelled_s", "masked_s"), 0.5)
    drawn.append(figures.calibration_figure([point]).svg())
    assert len(drawn) == 13
    for svg in drawn:
        texts = re.findall(r"<text[^>]*>([^<]*)", svg)
        assert texts
        assert not [text for text in texts if "$" in text or "\\" in text or "^" in text]


def test_names_from_users_are_escaped(runs: dict[tuple[str, int], Path]) -> None:
    path = runs["proposed", 0]
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["method"] = "<script>alert(1)</script>"
    manifest["config"]["name"] = "</pre><img src=x>"
    (path / "manifest.json").write_text(json.dumps(manifest))
    resign(path)
    text = write_report(path).read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert page.csv_text(["a"], [["=1+1"], ["@x"], [-3]]).splitlines() == ["a", "'=1+1", "'@x", "-3"]


def test_the_comparison_adds_up(runs: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    loaded = {key: read_run(path) for key, path in runs.items()}
    comparison = compare(list(loaded.values()))
    base, mine = comparison.figures["personalized"], comparison.figures["proposed"]
    by_hand = [np.mean([r.latency_s for r in loaded["proposed", seed].rounds]) for seed in (0, 1)]
    assert mine["latency_s"]
    assert np.isclose(mine["latency_s"].mean, np.mean(by_hand))
    t_975 = 12.706204736432095  # Student's t, one degree of freedom
    assert np.isclose(mine["latency_s"].half_width, t_975 * np.std(by_hand, ddof=1) / np.sqrt(2))
    for seed in (0, 1):
        run = loaded["personalized", seed]
        assert comparison.targets[seed] == min(r.accuracy for r in run.rounds) - 0.005
        assert crossing(run, comparison.targets[seed]) is not None
    out_of_reach = replace(comparison, targets=dict.fromkeys(comparison.targets, 1.1))
    assert (
        missed_seeds(out_of_reach, "proposed")
        == f"missed on {len(comparison.targets)} of {len(comparison.targets)} seeds"
    )
    assert missed_seeds(comparison, "personalized").startswith("missed on 0 of")
    left, pruning, bandwidth, _ = latency_split(comparison, "personalized")["proposed"]
    equal = comparison.figures["personalized (equal bandwidth)"]["latency_s"]
    assert equal
    assert base["latency_reduction"]
    assert base["latency_reduction"].mean == 0
    row = run_figures(loaded["proposed", 0], loaded["personalized", 0], comparison.targets[0])
    equal_s = mean_equal_s(loaded["personalized", 0])
    assert np.isclose(row["latency_s"] / equal_s, 1 - row["bandwidth_share"] - row["pruning_share"])
    assert left > 0
    assert min(pruning, bandwidth) > 0
    assert "less simulated time per round than personalized" in headline(comparison)
    page = write_comparison(comparison, tmp_path / "out")
    assert {file.name for file in page.parent.iterdir()} == {
        "index.html", "table.csv", "table.tex", "table.md", "versus.csv",
        *(f"{name}.{kind}" for name in ("progress", "finals", "target", "split", "convergence") for kind in ("svg", "pdf")),
    }  # fmt: skip
    stored = read_table(page.parent / "table.csv")
    assert markdown(stored) == (page.parent / "table.md").read_text()
    gain = comparison.figures["proposed"]["accuracy_gain"]
    differences = [
        loaded["proposed", s].rounds[-1].accuracy - loaded["personalized", s].rounds[-1].accuracy for s in (0, 1)
    ]
    assert gain
    assert np.isclose(gain.mean, np.mean(differences))
    assert np.isclose(gain.half_width, t_975 * np.std(differences, ddof=1) / np.sqrt(2))
    assert r"\begin{tabular}" in (page.parent / "table.tex").read_text()


def test_the_headline_is_honest_in_both_directions(runs: dict[tuple[str, int], Path]) -> None:
    loaded = [read_run(path) for path in runs.values()]
    turned = compare(loaded, reference="proposed")
    assert "more simulated time per round than proposed" in headline(turned)
    one = compare([run for run in loaded if run.seed == 0])
    assert "One seed: there is no interval." in headline(one)
    slow = [
        Run(r.path, r.manifest, tuple(replace(record, accuracy=0.01) for record in r.rounds), r.summary)
        if r.method == "proposed"
        else r
        for r in loaded
    ]
    assert "does not reach the target accuracy" in headline(compare(slow))


def test_the_headline_speaks_of_the_arm_proposed_in_whatever_order_arms_come(runs: dict[tuple[str, int], Path]) -> None:
    mine, base = read_run(runs["proposed", 0]), read_run(runs["personalized", 0])
    arms = {"proposed few bits": mine, "personalized 8 bit": base, "proposed": mine, "personalized": base}
    for names in (list(arms), list(reversed(arms))):
        comparison = compare([arms[name] for name in names], names)
        assert comparison.reference == "personalized"
        assert headline(comparison).startswith(
            "proposed takes 50.0 % less simulated time per round than personalized with"
        )
    other = compare([base, mine], ["dense", "tight"])
    assert headline(other).startswith("tight takes 50.0 % less simulated time per round than dense with")


def test_unlike_runs_are_not_compared(runs: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    loaded = {key: read_run(path) for key, path in runs.items()}
    with pytest.raises(CheckpointError, match="a second run of proposed with seed 0"):
        compare([loaded["proposed", 0], loaded["proposed", 0]])
    with pytest.raises(CheckpointError, match="needs the same ones"):
        compare([loaded["proposed", 0], loaded["personalized", 1]])
    run_to_end(tmp_path / "other", "method=personalized", "rounds=4", "partition.alpha=5")
    with pytest.raises(CheckpointError, match="another partition"):
        compare([loaded["proposed", 0], read_run(tmp_path / "other")])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_pages_render_in_a_browser(runs: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    page = write_comparison(compare([read_run(path) for path in runs.values()]), tmp_path / "out")
    for width in ("1000", "390"):
        shot = tmp_path / f"{width}.png"
        with tempfile.TemporaryDirectory() as profile:
            switches = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                        "disable-component-update", "disable-sync", "enable-logging=stderr")  # fmt: skip
            command = [
                "chromium",
                *(f"--{switch}" for switch in switches),
                f"--user-data-dir={profile}",
                f"--window-size={width},2000",
            ]
            command += [f"--screenshot={shot}", page.as_uri()]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in result.stderr
        assert shot.stat().st_size > 20_000


def test_a_table_s_ids_name_the_devices_of_a_run(tmp_path: Path) -> None:
    table = "id,cpu_ghz,cycles_per_flop,tx_power_dbm,gain_db\n" + "".join(
        f"press {at},1,1,23,-100\n" for at in range(4)
    )
    Path("fleet.csv").write_text(table)
    tiny = [override for override in TINY if not override.startswith("devices.")]
    config = configured(*tiny, "devices=table", "devices.file=fleet.csv", "devices.fresh=1", "out=run")
    setup = life.begin_or_reopen(config)
    for _ in life.run(setup, Path("run")):
        pass
    write_report(Path("run"))
    rows = (Path("run") / "report" / "devices.csv").read_text().splitlines()
    assert rows[0].startswith("round,name,id,")
    assert rows[1].startswith("1,press 0,0,")
    assert (Path("run") / "report" / "histogram.csv").read_text().splitlines()[4].startswith("press 3,")
    assert read_run(Path("run")).called(2) == "press 2"
