"""Leakage as figures: every view of an update is attacked, and each figure stands beside what a guess has that saw nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from fedprune_cli.audit.leak_views import Case, Scene, Seen, View, observe
from fedprune_cli.errors import ConfigError
from fedprune_cli.learn.client import Learner, samples
from fedprune_cli.learn.parts import Parts
from fedprune_cli.learn.prune import Masks, masks_of_arrays
from fedprune_cli.privacy import leak_attacks as attacks
from fedprune_cli.privacy.leak_matching import Dummies, Steps, matched
from fedprune_cli.privacy.leak_metrics import auc, best_match, jaccard, psnr_db, ssim
from fedprune_cli.rng import stream
from fedprune_cli.round.evaluate import own_test
from fedprune_cli.store.state import Array
from fedprune_cli.world.datasets import Dataset

LEAST_SIDE = 4  # pixels of what is a picture; below, SSIM says nothing
MAX_ORIGINALS = 64  # of a device's own round, that are looked for
MAX_DUMMIES = 8
MAX_DEVICES = 200  # whose models are asked who trained them
BUDGET_FLOPS = 2e10  # of one gradient matching
LEAST_ITERATIONS, MOST_ITERATIONS = 30, 300
MOST_STEPS = 1000  # that are differentiated in one: small models cost time, and no FLOPs to speak of
PASSES = 3  # forward and backward is counted; differentiating it again costs about twice that
SHOWN = 4  # pictures of a cell


@dataclass(frozen=True)
class Frame:
    """What samples look like: every channel's range [C, 1, 1] becomes 0 to 1, of pictures the whole scale.

    guess: the mean of all samples [C, H, W] in that range; picture: whether SSIM says anything of a sample.
    """

    low: Array
    high: Array
    mean: Array
    std: Array
    scale: float
    guess: Array
    picture: bool

    @classmethod
    def of(cls, dataset: Dataset) -> Frame:
        """Returns the frame of a dataset."""
        inputs = dataset.inputs
        picture = min(inputs.shape[2:]) >= LEAST_SIDE
        if picture and inputs.dtype == np.uint8:
            low, high = np.zeros((inputs.shape[1], 1, 1)), np.ones((inputs.shape[1], 1, 1))
        else:
            low, high = (f(inputs, axis=(0, 2, 3))[:, None, None] / dataset.scale for f in (np.min, np.max))
        high = np.where(high > low, high, low + 1)
        mean, std = (np.array(of, dtype=np.float64)[:, None, None] for of in (dataset.mean, dataset.std))
        guess = (inputs.mean(0, dtype=np.float64) / dataset.scale - low) / (high - low)
        return cls(low, high, mean, std, dataset.scale, guess, picture)

    def shown(self, inputs: Array) -> Array:
        """Returns raw samples [n, C, H, W] in the range 0 to 1, float64."""
        return (inputs / self.scale - self.low) / (self.high - self.low)

    def fed(self, shown: torch.Tensor) -> torch.Tensor:
        """Returns what the network sees of samples in the range 0 to 1, float32."""
        low, width, mean, std = (
            torch.from_numpy(of).float() for of in (self.low, self.high - self.low, self.mean, self.std)
        )
        return (shown * width + low - mean) / std

    @property
    def fed_guess(self) -> Array:
        """The mean sample as the network sees it, float64 [C H W]."""
        return ((self.guess * (self.high - self.low) + self.low - self.mean) / self.std).ravel()

    def back(self, fed: Array) -> Array:
        """Returns samples [n, C H W] as the network sees them in the range 0 to 1, cut to it."""
        raw = fed.reshape(-1, *self.guess.shape) * self.std + self.mean
        return np.clip((raw - self.low) / (self.high - self.low), 0, 1)


@dataclass(frozen=True)
class Row:
    """A figure of an attack, a mean over trials, beside what says how much of it is nothing; None where it says nothing.

    samples: None for the device's own round; others_*: for as many samples that were not in the update, of the same guesses; guess_*: of
    the mean sample; chance_jaccard: of labels drawn at random.
    """

    view: str
    samples: int | None
    steps: int
    attack: str
    trials: int
    psnr_db: float | None = None
    others_psnr_db: float | None = None
    guess_psnr_db: float | None = None
    ssim: float | None = None
    guess_ssim: float | None = None
    mse: float | None = None
    others_mse: float | None = None
    guess_mse: float | None = None
    jaccard: float | None = None
    chance_jaccard: float | None = None
    auc: float | None = None


@dataclass(frozen=True)
class Cell:
    """What came of a view and a case: its rows, and a few samples of the first trial with the best attack's guesses, [n, C, H, W]."""

    view: View
    case: Case
    rows: tuple[Row, ...]
    originals: Array
    guesses: Array

    @property
    def best(self) -> Row | None:
        """The row of the attack that rebuilds best, None where none can."""
        return max(
            (row for row in self.rows if row.psnr_db is not None), key=lambda row: row.psnr_db or 0.0, default=None
        )


def attack_all(scene: Scene, views: Sequence[View], cases: Sequence[Case], trials: int) -> Iterator[Cell]:
    """Yields the cells, view by view; raises ConfigError where nothing is shared."""
    if not len(scene.state.shared):
        method = scene.setup.experiment.method
        raise ConfigError(
            f"method={method.name} personalizes {method.personal_part}: nothing is sent, so nothing leaks"
        )
    frame = Frame.of(scene.setup.scenario.dataset)
    for view in views:
        masks = scene.masks(view)
        for case in cases:
            again = trials if case.samples is not None or view.devices > 1 or view.epsilon is not None else 1
            yield _cell(scene, frame, (view, masks), case, again)


def _cell(scene: Scene, frame: Frame, seen_as: tuple[View, Masks], case: Case, trials: int) -> Cell:
    dataset, (view, masks) = scene.setup.scenario.dataset, seen_as
    figures: dict[str, list[Mapping[str, float]]] = {}
    pictures: dict[str, tuple[Array, Array]] = {}
    for trial in range(trials):
        seen = observe(scene, view, masks, case, trial)
        rng = stream(scene.seed, "leak_chance", trial, *case.key)
        which = (
            seen.samples
            if len(seen.samples) <= MAX_ORIGINALS
            else rng.choice(seen.samples, MAX_ORIGINALS, replace=False)
        )
        elsewhere = np.setdiff1d(np.arange(len(dataset.labels)), seen.everybody)
        absent = rng.choice(elsewhere, min(len(which), len(elsewhere)), replace=False)
        originals, strangers = frame.shown(dataset.inputs[which]), frame.shown(dataset.inputs[absent])
        for name, guesses in _reconstruct(scene, frame, seen, (case, trial)).items():
            chosen, errors = best_match(originals, guesses)
            not_there = best_match(strangers, guesses)[1]
            figures.setdefault(name, []).append(
                _compared(frame, originals, guesses[chosen], errors) | _unseen(not_there)
            )
            pictures.setdefault(name, (originals[:SHOWN], guesses[chosen][:SHOWN]))
        labels = dataset.labels[seen.everybody]
        for name, found in _labels(seen, dataset.num_classes).items():
            drawn = rng.choice(dataset.num_classes, len(found), replace=name == "counts")
            truth = labels.tolist() if name == "counts" else np.unique(labels).tolist()
            figures.setdefault(f"labels, {name}", []).append(
                {"jaccard": jaccard(truth, found.tolist()), "chance_jaccard": jaccard(truth, drawn.tolist())}
            )
    rows = tuple(Row(view.name, case.samples, case.steps, name, trials, **_means(of)) for name, of in figures.items())
    cell = Cell(view, case, rows, *(np.zeros((0, *frame.guess.shape)),) * 2)
    best = cell.best
    return cell if best is None else Cell(view, case, rows, *pictures[best.attack])


def _means(of: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([one[key] for one in of])) for key in of[0]}


def _compared(frame: Frame, originals: Array, guesses: Array, errors: Array) -> dict[str, float]:
    """Returns the figures of guesses, and those of the mean sample, for the same originals."""
    nothing = np.square(originals - frame.guess).reshape(len(originals), -1).mean(1)
    found = {
        "psnr_db": float(psnr_db(errors, 1.0).mean()),
        "guess_psnr_db": float(psnr_db(nothing, 1.0).mean()),
        "mse": float(errors.mean()),
        "guess_mse": float(nothing.mean()),
    }
    if frame.picture:
        found["ssim"] = float(np.mean([ssim(a, b, 1.0) for a, b in zip(originals, guesses, strict=True)]))
        found["guess_ssim"] = float(np.mean([ssim(a, frame.guess, 1.0) for a in originals]))
    return found


def _unseen(errors: Array) -> dict[str, float]:
    """Returns the figures of the same guesses for samples that were not in the update."""
    if not len(errors):
        return {}
    return {"others_psnr_db": float(psnr_db(errors, 1.0).mean()), "others_mse": float(errors.mean())}


def _reconstruct(scene: Scene, frame: Frame, seen: Seen, which: tuple[Case, int]) -> dict[str, Array]:
    """Returns by attack the samples that it makes of an update, in the range 0 to 1 [m, C, H, W]; nothing where inputs are tokens."""
    if any(isinstance(module, nn.Embedding) for module in seen.parts.model.modules()):
        return {}
    layer = first_layer(seen, frame.guess.size)
    if layer is None:
        return {"matching": _match(scene, frame, seen, *which)}
    fill = frame.fed_guess
    if len(seen.everybody) == 1:
        found = {"quotient": attacks.strongest(layer, fill), "completion": attacks.completed(layer, fill)}
    else:
        found = {"quotient": attacks.quotients(layer, fill)}
    return {name: frame.back(guesses if len(guesses) else fill[None]) for name, guesses in found.items()}


def pieces(seen: Seen, values: Array) -> dict[str, Array]:
    """Returns `values` [U] cut by the names of the shared parameters."""
    shared = seen.parts.names[: len(seen.parts.shared_params)]
    cuts = np.split(values, np.cumsum([size for _, size in shared])[:-1])
    return {name: cut for (name, _), cut in zip(shared, cuts, strict=True)}


def first_layer(seen: Seen, inputs: int) -> attacks.FirstLayer | None:
    """Returns the gradient of the first layer where it is linear, sees the samples as they are and is shared, else None."""
    name = next(name for name, _ in seen.parts.model.named_parameters()).rpartition(".")[0]
    layer = seen.parts.model.get_submodule(name)
    gradient, known = pieces(seen, seen.gradient), pieces(seen, seen.known)
    weight, bias = f"{name}.weight", f"{name}.bias"
    if not isinstance(layer, nn.Linear) or layer.in_features != inputs or not {weight, bias} <= gradient.keys():
        return None
    shape = (-1, inputs)
    return attacks.FirstLayer(
        gradient[weight].reshape(shape), gradient[bias], known[weight].reshape(shape), known[bias]
    )


def _head_bias(seen: Seen, classes: int) -> Array | None:
    """Returns the gradient of the head's bias [classes], None where it is not sent, whole."""
    name = [name for name, module in seen.parts.model.named_modules() if isinstance(module, nn.Linear)][-1:]
    bias = f"{''.join(name)}.bias"
    gradient, known = pieces(seen, seen.gradient), pieces(seen, seen.known)
    if bias not in gradient or len(gradient[bias]) != classes or not known[bias].all():
        return None
    return gradient[bias]


def _labels(seen: Seen, classes: int) -> dict[str, Array]:
    """Returns by attack the labels that it reads in the head's bias: which there are, and how many of each; nothing where none was sent."""
    bias = _head_bias(seen, classes)
    if bias is None:
        return {}
    return {"signs": attacks.signed_labels(bias), "counts": attacks.counted_labels(bias, len(seen.everybody))}


def _match(scene: Scene, frame: Frame, seen: Seen, case: Case, trial: int) -> Array:
    """Returns what gradient matching finds, with labels from the head where it is sent, and else its own, beside its own v."""
    parts, classes = seen.parts, scene.setup.scenario.dataset.num_classes
    parts.make_whole()
    names, count = tuple(name for name, _ in parts.names), min(len(seen.everybody), MAX_DUMMIES)

    def logits(shared: tuple[torch.Tensor, ...], personal: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
        return functional_call(parts.model, dict(zip(names, (*shared, *personal), strict=True)), (x,))

    flops = PASSES * sum(scene.setup.blueprint.cost.flops["both"]) * count
    steps = max(seen.steps, 1) if flops * seen.steps * LEAST_ITERATIONS <= BUDGET_FLOPS else 1
    most = min(int(BUDGET_FLOPS / max(flops * steps, 1.0)), MOST_STEPS // steps, MOST_ITERATIONS)
    iterations = max(most, LEAST_ITERATIONS)
    start, keep, gradient = (
        parts.shared_views(torch.from_numpy(of.astype(np.float32))) for of in (seen.start, seen.known, seen.gradient)
    )
    guess = _cut_personal(parts, scene.setup.initial.personal.initial)
    bias = _head_bias(seen, classes) if len(seen.everybody) == count else None
    rng = stream(scene.seed, "leak_dummies", trial, *case.key)
    pixels = torch.from_numpy(rng.normal(0.0, 0.5, (count, *frame.guess.shape)).astype(np.float32))
    labels = None if bias is None else torch.from_numpy(attacks.counted_labels(bias, count))
    known = Steps(logits, start, guess, keep, gradient, scene.setup.experiment.training.lr, steps)
    found = matched(known, Dummies(pixels, labels, classes, frame.fed, iterations))
    return found.astype(np.float64)


def _cut_personal(parts: Parts, values: Array) -> tuple[torch.Tensor, ...]:
    """Returns the first personal part that every device began with, cut like the model's; nothing where nothing is personal."""
    if not parts.personal_params:
        return ()
    cuts = torch.split(torch.from_numpy(values.copy()), [param.numel() for param in parts.personal_params])
    shapes = parts.shapes[len(parts.shared_params) :]
    views = [cut.view(shape) for cut, shape in zip(cuts, shapes, strict=True)]
    return tuple(view.permute(0, 3, 1, 2) if view.dim() == 4 else view for view in views)


def membership(scene: Scene) -> tuple[Row, ...]:
    """Returns how well the loss of devices' own models tells who trained them from their test samples: of all, and of the attacked one."""
    setup, state = scene.setup, scene.state
    masks = masks_of_arrays(state.masks, setup.blueprint.layout, setup.scenario.num_devices)
    if masks is None:
        raise ConfigError("the masks of the last round are of another model")
    of_device, weights = dict[int, float](), dict[int, int]()
    for device in {*range(min(setup.scenario.num_devices, MAX_DEVICES)), scene.device}:
        own, test = setup.scenario.partition.train[device], setup.scenario.partition.test[device]
        if len(own) and len(test):
            task = own_test(state, masks, device)
            task.kept.load(scene.learner.parts, scene.learner.layout, task.shared, task.personal)
            of_device[device] = auc(-_losses(scene.learner, own), -_losses(scene.learner, test))
            weights[device] = len(own)
    mean = math.fsum(of_device[device] * weights[device] for device in of_device) / max(sum(weights.values()), 1)
    rows = [Row("own model, all devices", None, 0, "membership by loss", len(of_device), auc=mean)] if of_device else []
    if scene.device in of_device:
        rows.append(Row("own model, this device", None, 0, "membership by loss", 1, auc=of_device[scene.device]))
    return tuple(rows)


def _losses(learner: Learner, indices: Array) -> Array:
    """Returns the cross entropy of samples in the model that the learner holds, float64 [n]."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(indices), 128):
            x, y = samples(learner, indices[start : start + 128])
            found.append(torch.nn.functional.cross_entropy(learner.parts.model(x), y, reduction="none").cpu().numpy())
    return np.concatenate(found).astype(np.float64)


def cases_of(sizes: Sequence[int], steps: Sequence[int]) -> tuple[Case, ...]:
    """Returns the cases: as many samples and steps as asked, and the device's own round."""
    return (*(Case(n, s) for s, n in itertools.product(steps, sizes)), Case(None, 0))
