"""Laws of datasets: inputs and labels of one form, the same each time, that a round can be trained on."""

from __future__ import annotations

import functools

import numpy as np

from fedprune_cli.config.build import build_experiment
from fedprune_cli.contracts.parts import TABLES, configured, each, has_field, make_setup, steps_of
from fedprune_cli.world.datasets import Dataset

AT_HAND = ("digits", "patches")  # of those built in, what needs no file and no network
each_dataset = each("datasets", without=[name for name in TABLES["datasets"].own if name not in AT_HAND])


def load(name: str) -> Dataset:
    return build_experiment(configured(f"data={name}")).data.load()


loaded = functools.cache(load)


@each_dataset
def test_inputs_are_of_one_form(name: str) -> None:
    dataset = loaded(name)
    assert dataset.name == name
    assert dataset.inputs.ndim == 4, f"inputs must be [N, C, H, W], and are {dataset.inputs.shape}"
    assert dataset.inputs.dtype in (np.uint8, np.float32), (
        f"inputs must be uint8 or float32, and are {dataset.inputs.dtype}"
    )
    assert np.isfinite(dataset.inputs).all(), "an input is not finite"
    channels = dataset.inputs.shape[1]
    assert len(dataset.mean) == len(dataset.std) == channels, "mean and std must have a number for each channel"
    assert np.isfinite([dataset.scale, *dataset.mean, *dataset.std]).all()
    assert min(dataset.scale, *dataset.std) > 0, "scale and std must be above 0: they are divided by"


@each_dataset
def test_every_sample_has_a_label_of_a_class(name: str) -> None:
    dataset = loaded(name)
    assert dataset.labels.shape == (len(dataset.inputs),), "labels must be [N], one for each input"
    assert dataset.labels.dtype == np.int64, f"labels must be int64, and are {dataset.labels.dtype}"
    assert dataset.num_classes >= 2
    assert dataset.labels.min() >= 0, "a label is negative"
    assert dataset.labels.max() < dataset.num_classes, "a label is not below num_classes"


@each_dataset
def test_what_its_source_says_is_of_its_samples(name: str) -> None:
    dataset, source = loaded(name), loaded(name).source
    for values in (source.owner, source.held_out, source.group):
        assert values is None or values.shape == dataset.labels.shape
    if source.owner is not None:
        assert source.owner.min() >= 0
        assert source.owner.max() < len(source.owner_names), "an owner has no name"
    assert source.held_out is None or source.held_out.dtype == bool
    assert len(source.label_names) in (0, dataset.num_classes)


@each_dataset
def test_it_is_the_same_each_time_and_its_hash_says_so(name: str) -> None:
    one, other = loaded(name), load(name)
    np.testing.assert_array_equal(
        one.inputs, other.inputs, "other inputs: randomness must come from rng.stream or a fixed seed"
    )
    np.testing.assert_array_equal(
        one.labels, other.labels, "other labels: randomness must come from rng.stream or a fixed seed"
    )
    assert one.sha256 == other.sha256
    assert len(one.sha256) == 64, "sha256 must be the hexadecimal SHA-256 of the content"


@each_dataset
def test_a_round_is_trained_on_it(name: str) -> None:
    """Of the perceptron, on the first samples of what has a limit."""
    limit = ["data.limit=400"] * has_field("datasets", name, "limit")
    step = steps_of(make_setup(f"data={name}", "model=mlp", *limit), 1)[0]
    assert step.record.train_loss is not None
    assert np.isfinite(step.record.train_loss), "the loss is not finite"
    assert np.isfinite(step.after.shared).all()
