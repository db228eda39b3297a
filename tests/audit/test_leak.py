"""What the server sees of a tiny run is what its devices send, and what attacks make of it stands beside a guess."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import configured, fedprune, make_setup, run_to_end

from fedprune_cli.audit import leak, leak_page
from fedprune_cli.audit.leak import Frame, Row, attack_all, cases_of, first_layer, membership, pieces
from fedprune_cli.audit.leak_page import Leakage, png
from fedprune_cli.audit.leak_views import Case, Scene, Seen, View, find_trained, noise_multiplier, observe, views_of
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.client import samples, train
from fedprune_cli.privacy import leak_attacks as attacks
from fedprune_cli.privacy.leak_metrics import best_match, psnr_db
from fedprune_cli.round.work import training_task
from fedprune_cli.store.folder import read_whole_state
from fedprune_cli.world.datasets import Dataset

ONE, DENSE = Case(1, 1), View("dense")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("leak") / "run"
    run_to_end(path)
    return path


@pytest.fixture(scope="module")
def scene(run_dir: Path) -> Scene:
    torch.set_num_threads(1)
    return Scene(make_setup(), read_whole_state(run_dir), 32, 1, 0)


def see(scene: Scene, view: View, case: Case = ONE, trial: int = 0) -> Seen:
    return observe(scene, view, scene.masks(view), case, trial)


# --- what is seen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_a_step_shows_its_gradient(scene: Scene, count: int) -> None:
    seen = see(scene, DENSE, Case(count, 1))
    parts, state = scene.learner.parts, scene.state
    parts.make_whole()
    parts.shared.copy_(torch.from_numpy(state.shared))
    parts.personal.copy_(torch.from_numpy(state.personal[scene.device]))
    for param in parts.all_params:
        param.requires_grad_(True)
    x, y = samples(scene.learner, seen.samples)
    grads = torch.autograd.grad(torch.nn.functional.cross_entropy(parts.model(x), y), parts.shared_params)
    expected = np.concatenate([grad.numpy().ravel() for grad in grads])
    assert len(seen.samples) == count
    assert seen.known.all()
    assert np.abs(seen.gradient - expected).max() < 1e-4 * np.abs(expected).max() + 1e-6


def test_masks_hide_what_is_dropped(scene: Scene) -> None:
    seen = see(scene, View("pruned", ratio=0.7))
    assert seen.known.sum() == round(0.3 * len(seen.known))
    assert not seen.gradient[~seen.known].any()
    assert not seen.start[~seen.known].any()
    assert seen.gradient[seen.known].any()


def test_a_sum_shows_the_mean_of_what_each_would(scene: Scene) -> None:
    for view in (DENSE, View("as run", ratio=None)):
        summed = see(scene, replace(view, devices=3))
        owner = {sample: device for device in range(4) for sample in scene.setup.scenario.partition.train[device]}
        members = [owner[sample] for sample in summed.everybody.tolist()]
        each = [see(replace(scene, device=device), view) for device in members]
        kept = np.sum([one.known for one in each], axis=0)
        mean = np.sum([one.gradient for one in each], axis=0) / np.maximum(kept, 1)
        assert members[0] == scene.device
        assert len({*members}) == 3
        assert np.array_equal(summed.known, kept > 0)
        assert summed.gradient == pytest.approx(mean, abs=1e-9)


def test_nothing_personal_shows_the_same_of_the_shared_part_and_the_head(scene: Scene) -> None:
    whole, shared = see(scene, View("nothing personal", whole=True)), see(scene, DENSE)
    seen, of_shared = pieces(whole, whole.gradient), pieces(shared, shared.gradient)
    assert of_shared.keys() < seen.keys()
    for name, gradient in of_shared.items():
        assert seen[name] == pytest.approx(gradient, abs=1e-5)
    assert leak._labels(shared, 10) == {}
    label = int(scene.setup.scenario.dataset.labels[whole.samples[0]])
    assert leak._labels(whole, 10)["signs"].tolist() == leak._labels(whole, 10)["counts"].tolist() == [label]


def test_nothing_personal_puts_parts_together_by_name() -> None:
    """With the first block personal the shared part is the end of the model, and not its beginning."""
    setup = make_setup("model.personal=input")
    scene = Scene(setup, setup.initial, 32, 0, 0)
    whole, shared = see(scene, View("nothing personal", whole=True)), see(scene, DENSE)
    for name, gradient in pieces(shared, shared.gradient).items():
        assert pieces(whole, whole.gradient)[name] == pytest.approx(gradient, abs=1e-5)
    assert first_layer(whole, 64) is not None
    assert first_layer(shared, 64) is None


def test_the_own_round_is_the_one_that_the_run_would_make(scene: Scene) -> None:
    view = View("as run", ratio=None, bits=8)
    masks = scene.masks(view)
    update = train(scene.learner, training_task(scene.setup, scene.state, masks, scene.device, 8))
    change = update.shared.astype(np.float64) - scene.state.shared[masks[scene.device]]
    seen = see(scene, view, Case(None, 0))
    assert seen.steps == 3
    assert -0.05 * 3 * seen.gradient[seen.known] == pytest.approx(change, abs=1e-12)


def test_noise_is_as_large_as_its_formula_says(scene: Scene) -> None:
    plain, noisy = see(scene, DENSE), see(scene, View("noise", epsilon=8.0))
    change, noise = plain.gradient, noisy.gradient - plain.gradient
    sigma = noise_multiplier(8.0, 3) / np.sqrt(4)
    assert noise.std() / np.linalg.norm(change) == pytest.approx(sigma, rel=0.1)
    for epsilon in (0.5, 8.0):  # the closed form backwards
        rho = 3 / (2 * noise_multiplier(epsilon, 3) ** 2)
        assert rho + 2 * np.sqrt(rho * np.log(1e3)) == pytest.approx(epsilon)


def test_views_are_named_once_and_sums_have_devices(scene: Scene) -> None:
    views = views_of(scene)
    assert len({view.name for view in views}) == len(views)
    assert max(view.devices for view in views) <= 4
    assert any(view.bits == 8 for view in views)


def decibels_of(row: Row | None) -> float:
    """Returns the PSNR of a row that has one."""
    assert row is not None
    assert row.psnr_db is not None
    return row.psnr_db


# --- what is made of it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(scene: Scene) -> Leakage:
    cells = tuple(attack_all(scene, views_of(scene), cases_of((1, 2), (1,)), 2))
    return Leakage(scene, 2, cells, membership(scene))


def test_a_lone_sample_is_read_unless_there_is_noise(found: Leakage) -> None:
    best = {cell.view.name: cell.best for cell in found.cells if cell.case == ONE}
    for name in ("nothing personal", "personal: head", "pruned 0.5"):
        row = best[name]
        assert row is not None
        assert decibels_of(row) > 60
        assert (row.guess_psnr_db or 99) < 20
        assert (row.others_psnr_db or 99) < 20
        assert (row.ssim or 0) > 0.99
    noisy = best["noise, epsilon 8"]
    assert decibels_of(noisy) < ((noisy and noisy.guess_psnr_db) or 0)
    assert all(0 <= (row.auc or 0.5) <= 1 for row in found.rows)


def test_the_files_are_the_same_bytes_again_and_hold_the_pictures(found: Leakage, scene: Scene) -> None:
    again = replace(found, cells=tuple(attack_all(scene, views_of(scene), cases_of((1, 2), (1,)), 2)))
    assert leak_page.files(again) == leak_page.files(found)
    page, table = leak_page.files(found).values()
    assert page.count("data:image/png;base64,") == len(found.cells) + len(found.cases)
    assert "http" not in page
    assert len(table.splitlines()) == 1 + len(found.rows)
    for one in leak_page.tables(found):
        assert max(map(len, one.plain().splitlines())) <= 80
    assert "dB by completion" in leak_page.sentence(found)


def test_a_png_is_what_others_read() -> None:
    import io

    from PIL import Image

    picture = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), picture.transpose(1, 2, 0))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(picture[:1])))), picture[0])


def test_rows_of_a_table_have_no_pictures_and_their_columns_ranges() -> None:
    inputs = np.array([[0, 5], [10, 5], [5, 5]], np.float32).reshape(3, 2, 1, 1)
    frame = Frame.of(Dataset("t", inputs, np.zeros(3, np.int64), 1, 2.0, (1.0, 2.0), (3.0, 1.0), ""))
    shown = frame.shown(inputs)
    assert not frame.picture
    assert shown[:, 0].ravel().tolist() == [0, 1, 0.5]
    assert frame.guess.ravel().tolist() == [0.5, 0]
    fed = frame.fed(torch.from_numpy(shown)).numpy()
    assert fed == pytest.approx((inputs / 2 - np.array([1, 2]).reshape(2, 1, 1)) / np.array([3, 1]).reshape(2, 1, 1))
    assert frame.back(fed.reshape(3, 2)) == pytest.approx(shown)
    assert frame.back(frame.fed_guess[None])[0] == pytest.approx(frame.guess)


@pytest.mark.slow
def test_a_convolution_is_attacked_by_matching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("model=cnn", "model.padding=2", "model.channels=[4,4]", "model.hidden=16", "rounds=1")
    run_to_end(tmp_path / "run", *small)
    scene = Scene(make_setup(*small), read_whole_state(tmp_path / "run"), 32, 0, 0)
    monkeypatch.setattr(leak, "MOST_ITERATIONS", 40)
    views = (View("nothing personal", whole=True), DENSE)
    cells = list(attack_all(scene, views, (ONE,), 1))
    again = list(attack_all(scene, views, (ONE,), 1))
    assert [cell.rows for cell in cells] == [cell.rows for cell in again]
    assert [cell.best.attack for cell in cells if cell.best] == ["matching"] * 2
    monkeypatch.setattr(leak, "MOST_ITERATIONS", 0)
    monkeypatch.setattr(leak, "LEAST_ITERATIONS", 0)
    untrained = next(attack_all(scene, views, (ONE,), 1)).best
    assert decibels_of(cells[0].best) > decibels_of(untrained) + 1


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_its_files_and_refuses_in_one_line(run_dir: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    result = fedprune("leak", str(run_dir), "--samples", "1", "--trials", "1", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["leakage.csv", "leakage.html"]
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == before
    for code, *bad in (
        (2, str(run_dir), "--device", "4"),  # a fresh one, which never trains
        (2, str(run_dir), "--samples", "0"),
        (2, str(run_dir), "--steps", "1.5"),
        (5, str(tmp_path / "none")),
    ):
        refused = fedprune("leak", *bad)
        assert refused.returncode == code, refused.stderr
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1


def test_where_nothing_is_sent_nothing_is_attacked(tmp_path: Path) -> None:
    run_to_end(tmp_path / "run", "method=local", "rounds=1")
    scene = Scene(make_setup("method=local", "rounds=1"), read_whole_state(tmp_path / "run"), 32, 0, 0)
    with pytest.raises(ConfigError, match="nothing is sent"):
        next(attack_all(scene, (DENSE,), (ONE,), 1))


def test_a_device_is_found_by_name_or_number() -> None:
    setup = make_setup()
    assert find_trained(setup, "3") == 3
    for bad in ("4", "-1", "³", "x"):
        with pytest.raises(ConfigError, match=r"Allowed: 0\.\.3"):
            find_trained(setup, bad)


@pytest.mark.slow
def test_the_figures_of_the_guide(tmp_path: Path) -> None:
    """The default run on digits: quotients and completion by ratio, sums and noise, over all devices."""
    from fedprune_cli.config.build import build_experiment
    from fedprune_cli.round.setup import prepare
    from fedprune_cli.runs import life

    config = configured()
    setup = prepare(build_experiment(config))
    life.create(setup, config, tmp_path / "run")
    list(life.run(setup, tmp_path / "run"))
    scene, frame = Scene(setup, read_whole_state(tmp_path / "run"), 32, 0, 0), Frame.of(setup.scenario.dataset)
    black = frame.fed_guess * 0 - frame.mean.ravel()[0] / frame.std.ravel()[0]

    def decibels(view: View, attack: object, fill: np.ndarray) -> float:
        values = []
        for device in range(20):
            seen = see(replace(scene, device=device), view)
            layer = first_layer(seen, frame.guess.size)
            guesses = frame.back(attack(layer, fill))  # type: ignore[operator]
            values.append(
                psnr_db(best_match(frame.shown(setup.scenario.dataset.inputs[seen.samples]), guesses)[1], 1.0)
            )
        return float(np.mean(values))

    mean = frame.fed_guess
    assert decibels(DENSE, attacks.strongest, mean) > 98
    assert decibels(View("", ratio=0.5), attacks.strongest, mean) > 91
    assert decibels(View("", ratio=0.8), attacks.strongest, black) == pytest.approx(14, abs=2)
    assert decibels(View("", ratio=0.9), attacks.strongest, black) == pytest.approx(9.5, abs=2)
    assert decibels(View("", ratio=0.8), attacks.completed, mean) > 100
    assert decibels(View("", epsilon=8.0), attacks.strongest, mean) == pytest.approx(8.3, abs=2)
    assert decibels(View("", devices=20), attacks.quotients, mean) == pytest.approx(21, abs=4)
