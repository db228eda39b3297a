"""Laws of the models for windows and texts: what they compute, what they cost, what a slice of them leaves out, what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL_CASES, configured, make_setup, model_inputs, run_to_end
from torch import nn

from fedprune_cli.config.build import build_experiment
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.batched import batches, train_block
from fedprune_cli.learn.client import Learner, Task, evaluate, train
from fedprune_cli.learn.cost import count_cost
from fedprune_cli.learn.kept import Channels, Entries, Whole
from fedprune_cli.learn.models import ModelConfig, build_model, require_tokens
from fedprune_cli.learn.parts import split_model
from fedprune_cli.learn.personalize import Phase
from fedprune_cli.learn.prune import Masks, build_masks
from fedprune_cli.learn.recurrent import Gru
from fedprune_cli.learn.schedule import by_steps
from fedprune_cli.learn.structured import find_channels
from fedprune_cli.round.setup import build_learner
from fedprune_cli.world.datasets.dataset import number_dataset, token_dataset
from fedprune_cli.world.datasets.embedded import Digits

TOKENS = next(name for name in MODEL_CASES if "embedding" in name)
SMALL = {
    "cnn1d": ("model=cnn1d", "model.channels=[8,12]", "model.kernel=3", "model.hidden=10"),
    "gru": ("model=gru", "model.hidden=[12,10]"),
    "tokens": ("model=gru", "model.hidden=[12]", "model.embedding=6", "model.vocabulary=17"),
}
KINDS = ("personal", "shared", "both")


def config_of(*overrides: str) -> ModelConfig:
    return build_experiment(configured(*overrides)).model


def learner_of(*overrides: str, personal: str = "head") -> Learner:
    """Returns a learner on real digits whose rows are the axes of a window of 8 steps; as tokens, every other pixel in reading order."""
    setup = make_setup()
    whole, dataset = build_learner(setup.experiment, setup.scenario), setup.scenario.dataset
    tokens = "model.embedding=6" in overrides
    inputs = dataset.inputs.reshape(-1, 1, 1, 64)[..., ::2] if tokens else dataset.inputs.reshape(-1, 8, 1, 8)
    seen = {"scale": 1.0, "mean": (0.0,), "std": (1.0,)} if tokens else {}
    parts = split_model(build_model(config_of(*overrides), inputs.shape[1:], 10, seed=0), personal)
    layout = find_channels(parts, count_cost(parts, inputs.shape[1:]))
    return replace(whole, parts=parts, inputs=inputs, layout=layout, **seen)


def task_of(learner: Learner, kept: Channels | Entries | Whole, phases: tuple[Phase, ...]) -> Task:
    shared, personal = learner.parts.shared.numpy().copy(), learner.parts.personal.numpy().copy()
    return Task("training", 0, 1, shared, personal, kept, by_steps(phases, 100, 8))


def half(learner: Learner) -> Masks:
    setup = make_setup("pruner.granularity=channel")
    state = replace(setup.initial, shared=learner.parts.shared.numpy())
    return build_masks(setup.experiment.pruner, state, np.full(4, 0.6), 0, learner.layout)


@pytest.mark.parametrize("name", SMALL)
def test_training_a_slice_is_training_with_dropped_units_frozen_at_zero(name: str) -> None:
    learner = learner_of(*SMALL[name])
    masks = half(learner)
    phases = (Phase("personal", 2), Phase("shared", 5), Phase("both", 2))
    whole = task_of(learner, Whole(), phases)
    small, masked = (
        train(learner, replace(whole, kept=kept))
        for kept in (Channels(masks.kept_units(1)), Entries(np.packbits(masks[1])))
    )
    assert 0 < masks[1].mean() < 0.5
    np.testing.assert_allclose(small.shared, masked.shared, atol=1e-5)
    np.testing.assert_allclose(small.personal, masked.personal, atol=1e-5)
    assert np.abs(small.shared - whole.shared[masks[1]]).max() > 1e-3
    after = train(learner, whole)  # a slice leaves nothing behind
    np.testing.assert_array_equal(after.shared, train(learner_of(*SMALL[name]), whole).shared)


def tasks_of(learner: Learner) -> list[Task]:
    """Seven devices with different numbers of steps and samples in a step, of which some keep everything and some little."""
    phases = (Phase("personal", 1), Phase("shared", 2), Phase("both", 2))
    rng = np.random.default_rng(0)
    size = learner.parts.shared.numel()
    return [
        replace(
            task_of(learner, Entries(np.packbits(rng.random(size) < 0.6)) if device % 2 else Whole(), phases),
            device=device % 4,
            schedule=by_steps(
                [Phase(p.kind, p.steps + device % 3) for p in phases], 3 + device, learner.training.batch_size
            ),
        )
        for device in range(7)
    ]


@pytest.mark.parametrize(
    ("name", "personal", "decay"),
    [
        ("gru", "input", 0.1), ("gru", "rnn2+head", 0.0), ("gru", "none", 0.0), ("tokens", "head", 0.1), ("tokens", "rnn1", 0.1),
        *(
            pytest.param(*of, marks=pytest.mark.slow)
            for of in (("gru", "head", 0.0), ("gru", "rnn2", 0.1), ("tokens", "input", 0.0))
        ),
    ],
)  # fmt: skip
def test_grus_side_by_side_train_like_the_loop(name: str, personal: str, decay: float) -> None:
    learner = learner_of(*SMALL[name], personal=personal)
    learner = replace(learner, training=replace(learner.training, block=7, weight_decay=decay, lr=0.3, personal_lr=0.2))
    assert batches(learner.parts, learner.training)
    tasks = tasks_of(learner)
    for task, other in zip(tasks, train_block(learner, tasks), strict=True):
        one = train(learner, task)
        np.testing.assert_allclose(one.shared, other.shared, atol=2e-6)
        np.testing.assert_allclose(one.personal, other.personal, atol=2e-6)
        assert one.train_loss is not None
        assert np.isclose(one.train_loss, other.train_loss, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "hidden", "batch"), [("gru", "[12,10]", 7), ("gru", "[5,7]", 10), ("tokens", "[9]", 5)]
)
def test_a_gru_does_not_depend_on_its_company_nor_on_its_place(name: str, hidden: str, batch: int) -> None:
    learner = learner_of(*SMALL[name], f"model.hidden={hidden}")
    learner = replace(learner, training=replace(learner.training, block=5, batch_size=batch))
    tasks = tasks_of(learner)[:4]
    want = train_block(learner, [tasks[2]])[0]
    for place in range(4):
        company = [*tasks[:2], tasks[3]]
        company.insert(place, tasks[2])
        got = train_block(learner, company)[place]
        assert (want.shared.tobytes(), want.personal.tobytes()) == (got.shared.tobytes(), got.personal.tobytes())
        assert want.train_loss == got.train_loss


def test_only_small_grus_under_plain_sgd_are_batched() -> None:
    training = learner_of(*SMALL["gru"]).training
    for overrides, plain, expected in (
        (SMALL["gru"], training, True),
        (SMALL["tokens"], training, True),
        (("model=gru", "model.hidden=[65]"), training, False),
        (SMALL["cnn1d"], training, False),
        (SMALL["gru"], replace(training, momentum=0.9), False),
    ):
        parts = split_model(build_model(config_of(*overrides), (1, 1, 9), 10, seed=0), "head")
        assert batches(parts, plain) == expected, overrides


@pytest.mark.parametrize("name", SMALL)
def test_it_learns_digits(name: str) -> None:
    learner = learner_of(*SMALL[name])
    learner = replace(learner, training=replace(learner.training, lr=0.2, personal_lr=0.2))
    task, phases = task_of(learner, Whole(), ()), (Phase("both", 100),)
    trained = train(learner, task_of(learner, Whole(), phases))
    before = evaluate(learner, task)
    after = evaluate(learner, replace(task, shared=trained.shared, personal=trained.personal))
    assert after.correct > before.correct + after.total / 5


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("cnn1d", "channel"), ("gru", "weight"), ("gru", "channel"), ("tokens", "channel"),
        pytest.param("cnn1d", "weight", marks=pytest.mark.slow), pytest.param("tokens", "weight", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_prunes_and_keeps_its_deadline(
    name: str, granularity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run, on digits whose rows are axes, or whose pixels are tokens."""
    digits = Digits("digits", None).load()
    windows = number_dataset("digits", digits.inputs.reshape(-1, 8, 1, 8), digits.labels, 10)
    texts = token_dataset("digits", digits.inputs.reshape(-1, 1, 1, 64)[..., ::4], digits.labels, 10)
    monkeypatch.setattr(Digits, "load", lambda self: texts if name == "tokens" else windows)
    records = run_to_end(tmp_path / "run", *SMALL[name], f"pruner.granularity={granularity}")
    assert len(records) == 3
    for record in records:
        assert max(record["devices"]["prune_ratio"]) > 0
        rounded = 1e-9 if granularity == "channel" else 5e-3  # a mask keeps a whole number of some 500 entries
        assert record["latency_s"] <= record["deadline_s"] * (1 + rounded)
        assert np.isfinite(record["train_loss"])
    assert records[-1]["train_loss"] < records[0]["train_loss"]


def test_a_gru_is_its_equations() -> None:
    """h' = (1 - z) n + z h, written out from the textbook (Cho et al.) with PyTorch's place for the reset gate."""
    torch.manual_seed(0)
    model, x = Gru(5, 4, last=True), torch.randn(3, 7, 5)
    weight_i, weight_h, bias_i, bias_h = (p.detach().numpy().astype(float) for p in model.gru.parameters())
    state = np.zeros((3, 4))
    for step in range(7):
        a, b = x[:, step].numpy() @ weight_i.T + bias_i, state @ weight_h.T + bias_h
        r, z = (1 / (1 + np.exp(-a[:, at] - b[:, at])) for at in (slice(0, 4), slice(4, 8)))
        state = (1 - z) * np.tanh(a[:, 8:] + r * b[:, 8:]) + z * state
    np.testing.assert_allclose(model(x).detach().numpy(), state, atol=1e-6)
    model.last = False
    np.testing.assert_allclose(model(x)[:, -1].detach().numpy(), state, atol=1e-6)


@pytest.mark.parametrize(
    ("personal", "passes"),
    [  # how often each product is made, in steps: forward, for the weight's gradient, for the other factor's
        ("head", {"personal": (7, 7, 7, 7, 2), "shared": (14, 20, 21, 20, 2), "both": (14, 20, 21, 20, 3)}),
        ("input", {"personal": (14, 20, 14, 13, 2), "shared": (7, 7, 14, 20, 3), "both": (14, 20, 21, 20, 3)}),
        ("rnn2+head", {"personal": (7, 7, 14, 20, 3), "shared": (14, 20, 14, 13, 2), "both": (14, 20, 21, 20, 3)}),
    ],
)
def test_the_flops_of_a_gru_are_those_of_a_formula(personal: str, passes: dict[str, tuple[int, ...]]) -> None:
    """Two layers of 12 and 10 units over 7 steps of 5 axes: 2 FLOPs per multiply-add, three gates, by parameter and kind of step."""
    parts = split_model(build_model(config_of(*SMALL["gru"]), (5, 1, 7), 3, seed=0), personal)
    cost = count_cost(parts, (5, 1, 7))
    at = {name: i for i, (name, _) in enumerate(parts.names)}
    products = {
        "rnn1.1.gru.weight_ih_l0": 36 * 5, "rnn1.1.gru.weight_hh_l0": 36 * 12,
        "rnn2.0.gru.weight_ih_l0": 30 * 12, "rnn2.0.gru.weight_hh_l0": 30 * 10,
        "head.weight": 3 * 10,
    }  # fmt: skip
    for kind in KINDS:
        for (name, product), steps in zip(products.items(), passes[kind], strict=True):
            assert cost.param_flops[kind][at[name]] == 2 * product * steps, (kind, name)
        assert np.count_nonzero(cost.param_flops[kind]) == len(products)


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_the_units_of_every_kind_of_recurrent_layer_can_be_left_out(layer: type[nn.RNNBase]) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer(5, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _, final = self.layer(x.squeeze(2).transpose(1, 2))
            return (final[0] if layer is nn.LSTM else final)[0]

    torch.manual_seed(0)
    parts = split_model(nn.Sequential(Last(), nn.Linear(8, 3)), "none")
    cost = count_cost(parts, (5, 1, 6))
    layout = find_channels(parts, cost)
    gates = parts.shapes[0][0] // 8
    assert cost.param_flops["shared"][:2].tolist() == [2 * gates * 8 * 5 * 12, 2 * gates * 8 * 8 * 17]
    kept = (np.arange(8) % 3 != 1,)
    mask, _, shapes = layout.masks(kept)
    x = torch.randn(4, 5, 1, 6)
    entries = parts.shared[torch.from_numpy(mask)]
    with torch.no_grad():
        parts.shared.mul_(torch.from_numpy(mask))
        expected = parts.model(x)
        parts.point(entries, parts.personal, shapes)
        torch.testing.assert_close(parts.model(x), expected)
    predicted = cost.sliced(layout.kept_params(kept)).param_flops["shared"]
    counted = count_cost(replace(parts, shared=entries), (5, 1, 6)).param_flops["shared"]
    np.testing.assert_allclose(predicted, counted, rtol=1e-12)


def test_a_window_is_read_from_its_first_step_to_its_last() -> None:
    model = build_model(config_of(*SMALL["gru"]), (2, 1, 30), 3, seed=0)
    x = torch.randn(1, 2, 1, 30, generator=torch.Generator().manual_seed(0))
    early, late = x.clone(), x.clone()
    early[..., 0] += 1
    late[..., -1] += 1
    with torch.no_grad():
        moved = [float((model(changed) - model(x)).abs().sum()) for changed in (early, late)]
    assert 0 < moved[0] < moved[1] / 10


def test_tokens_are_told_apart_by_their_number_alone() -> None:
    model = build_model(config_of(*TOKENS.split()), MODEL_CASES[TOKENS], 10, seed=0)
    x = model_inputs(TOKENS, 5)
    swapped = torch.where(x == 3, 7.0, torch.where(x == 7, 3.0, x))
    with torch.no_grad():
        before = model(x)
        table = model.get_submodule("embed.1").weight
        table[[3, 7]] = table[[7, 3]]
        torch.testing.assert_close(model(swapped), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("overrides", "shape", "message"),
    [
        (("model=cnn1d",), (1, 8, 8), r"\[1, 8, 8\] are not sequences: model=cnn1d takes windows"),
        (("model=gru",), (1, 8, 8), r"\[1, 8, 8\] are not sequences: model=gru takes windows"),
        (("model=cnn1d",), (3, 1, 7), "windows of 7 steps .* halve 3 times: .* at least 8 steps, or model.channels of at most 2 widths"),
        (("model=cnn1d",), (3, 1, 1), "windows of 1 steps are too short .* or model=mlp"),
        (("model=gru", "model.embedding=4"), (3, 1, 7), "windows of 3 axes are not tokens"),
        (("model=cnn1d", "model.kernel=4"), (3, 1, 9), "model.kernel=4: must be odd, in 1..99"),
        (("model=cnn1d", "model.channels=[]"), (3, 1, 9), r"model.channels=\[\]: must be a list of 1 to 8"),
        (("model=gru", "model.hidden=[4,4,4]"), (3, 1, 9), r"must be one or two widths"),
        (("model=gru", "model.vocabulary=4"), (3, 1, 9), r"model.vocabulary=4: must be null without model.embedding"),
        (("model=gru", "model.embedding=0"), (3, 1, 9), r"model.embedding=0: must be in 1..100000 or null"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    overrides: tuple[str, ...], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config_of(*overrides), shape, 10, seed=0)


def test_the_shortest_window_that_is_allowed_fits() -> None:
    assert build_model(config_of("model=cnn1d"), (3, 1, 8), 5, seed=0)(torch.zeros(2, 3, 1, 8)).shape == (2, 5)


def test_tokens_beyond_the_vocabulary_and_numbers_that_are_none_are_refused() -> None:
    model = build_model(config_of(*SMALL["tokens"]), (1, 1, 4), 10, seed=0)
    inputs = np.full((3, 1, 1, 4), 16, dtype=np.uint8)
    require_tokens(model, inputs, as_they_are=True)
    with pytest.raises(ConfigError, match=r"knows 17 tokens, 0 to 16, .* token 17: allowed is model.vocabulary=18"):
        require_tokens(model, inputs + 1, as_they_are=True)
    for wrong, as_they_are in ((inputs, False), (inputs.astype(np.float32), True)):
        with pytest.raises(ConfigError, match=r"model.embedding=6 is for tokens"):
            require_tokens(model, wrong, as_they_are)
    require_tokens(build_model(config_of("model=gru"), (1, 1, 4), 10, seed=0), inputs + 1, as_they_are=True)
