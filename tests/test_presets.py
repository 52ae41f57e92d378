"""The recipes: their networks, their first values, and how they are trained."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import capsjax
import tiny
from capsjax import Agreement, weights
from capsjax.networks import CapsNetConfig
from capsjax.presets import (
    BEST,
    CNN,
    CNN_PAPER,
    EFFICIENT,
    MATRIX,
    PAPER,
    PRESETS,
    SEED,
    Preset,
    Training,
)

MNIST = (28, 28, 1)

# Every array of CapsNet for 28×28×1 and 10 classes.
SHAPES = {
    "conv1.kernel": (9, 9, 1, 256),
    "conv1.bias": (256,),
    "primary.conv.kernel": (9, 9, 256, 256),
    "primary.conv.bias": (256,),
    "class_caps.weight": (10, 1152, 16, 8),
    "decoder.0.kernel": (160, 512),
    "decoder.0.bias": (512,),
    "decoder.1.kernel": (512, 1024),
    "decoder.1.bias": (1024,),
    "decoder.2.kernel": (1024, 784),
    "decoder.2.bias": (784,),
}


def list_arrays(model) -> dict[str, Any]:
    """Lists the parameters by path, as `class_caps.weight`, traced or not."""
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def build(preset: Preset, **sizes: Any):
    """Builds a preset's network for MNIST, with sizes that differ."""
    config: Any = preset.network
    return dataclasses.replace(config, **sizes).build(MNIST, 10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("preset", "more", "count"),
    [(SEED, {}, 8_215_568), (PAPER, {"class_caps.bias": (10, 16)}, 8_215_728)],
    ids=["seed", "paper"],
)
def test_every_array_has_its_shape_and_all_their_number(preset, more, count):
    found = list_arrays(nnx.eval_shape(lambda: build(preset)))
    assert {path: leaf.shape for path, leaf in found.items()} == SHAPES | more
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(jnp.float32)}
    assert sum(leaf.size for leaf in found.values()) == count


def test_the_presets_are_there_by_name():
    capsnets = {"seed": SEED, "paper": PAPER, "best": BEST}
    others = {"efficient": EFFICIENT, "matrix": MATRIX}
    assert capsnets | others | {"cnn": CNN, "cnn-paper": CNN_PAPER} == PRESETS


def test_best_trains_the_seeds_network_on_warped_images_and_averages_its_weights():
    training = BEST.training
    assert BEST.network == SEED.network
    assert (training.rotation, training.shear, training.zoom) == (7, 5, 0.1)
    assert (training.shift_pixels, training.elastic) == (2, 1)
    assert (training.average, training.batch_size) == (0.999, 128)


@pytest.mark.parametrize("epochs", [1, 20])
def test_the_rate_of_best_is_half_a_cosine_that_ends_at_0(epochs):
    training = dataclasses.replace(BEST.training, epochs=epochs)
    assert BEST.complete(training, MNIST).lr_decay is None
    steps = np.arange(5 * epochs + 1)
    rates = np.asarray(BEST.schedule(training, 5)(steps))
    expected = 1e-3 * (1 + np.cos(np.pi * steps / (5 * epochs))) / 2
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-9)


def test_best_falls_by_a_factor_if_one_is_given():
    rates = BEST.schedule(dataclasses.replace(BEST.training, lr_decay=0.5), 5)(np.arange(11))
    np.testing.assert_allclose(rates[jnp.array([0, 5, 10])], [1e-3, 5e-4, 2.5e-4], rtol=1e-5)


def test_the_defaults_of_capsnet_are_the_seed_preset():
    default = nnx.eval_shape(lambda: capsjax.CapsNet(rngs=nnx.Rngs(0)))
    assert nnx.graphdef(default) == nnx.graphdef(nnx.eval_shape(lambda: build(SEED)))
    assert (SEED.network, SEED.training) == (CapsNetConfig(), Training())


def test_the_recipes_are_the_published_ones():
    seed, paper = SEED.training, PAPER.training
    assert (seed.lr, seed.lr_decay, SEED.lr_staircase, SEED.lr_floor) == (1e-3, 0.9, True, 0)
    assert (paper.lr, paper.lr_decay, PAPER.lr_staircase) == (1e-3, None, False)
    assert PAPER.lr_floor == 1e-6
    assert PAPER.lr_total_decay == pytest.approx(0.96 ** (300_000 / 2000))
    assert (seed.batch_size, seed.epochs, seed.shift_pixels) == (100, 50, 2)
    assert (paper.batch_size, paper.epochs, paper.shift_pixels) == (128, 640, 2)
    assert (seed.average, paper.average) == (None, None)
    assert SEED.recon_per_pixel * 784 == pytest.approx(0.392)
    assert PAPER.recon_per_pixel * 784 == pytest.approx(7.84)
    assert SEED.network == CapsNetConfig(routing=Agreement(3, bias=False, stop_gradient=True))
    assert PAPER.network == CapsNetConfig(
        routing=Agreement(3, bias=True, stop_gradient=False),
        primary_coupling=1 / 32,
        init="truncated_normal",
    )
    assert CapsNetConfig().primary_coupling == 1


@pytest.mark.parametrize("preset", [SEED, PAPER], ids=["seed", "paper"])
def test_a_preset_does_not_change(preset):
    assert hash(preset) == hash(dataclasses.replace(preset))
    for holder, name in ((preset, "lr_floor"), (preset.training, "lr"), (preset.network, "types")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(holder, name, 1)


SMALLER = {"channels": 32, "types": 8, "hidden": (64, 128)}
FAN_IN = {"conv1": 81, "primary": 81 * 32, "decoder.0": 160, "decoder.1": 64, "decoder.2": 128}


def draw_arrays(preset: Preset) -> dict[str, Any]:
    """Draws the first values of a smaller network, compiled at once."""
    return jax.tree.map(np.asarray, jax.jit(lambda: list_arrays(build(preset, **SMALLER)))())


def test_the_seed_begins_as_pytorch_does():
    found = draw_arrays(SEED)
    weight = found.pop("class_caps.weight")
    assert np.std(weight) == pytest.approx(0.01, rel=0.01)
    assert np.abs(weight).max() > 0.04  # a normal distribution that nothing cuts off
    for path, values in found.items():
        (fan_in,) = (size for layer, size in FAN_IN.items() if path.startswith(layer))
        bound = fan_in**-0.5
        assert 0.9 * bound < np.abs(values).max() <= bound, path
        if values.size > 1000:
            assert np.std(values) == pytest.approx(bound / np.sqrt(3), rel=0.03), path
            assert np.mean(values) == pytest.approx(0, abs=0.05 * bound), path


def test_the_paper_begins_with_truncated_normals_and_biases_of_a_tenth():
    found = draw_arrays(PAPER)
    for path, values in found.items():
        if path.endswith("bias"):
            np.testing.assert_array_equal(values, np.float32(0.1), err_msg=path)
            continue
        stddev = 0.05 if path == "conv1.kernel" else 0.1
        assert 1.9 * stddev < np.abs(values).max() <= 2 * stddev, path
        # Cut off at two standard deviations, a normal distribution keeps 0.88 of its own.
        assert np.std(values) == pytest.approx(0.8796 * stddev, rel=0.02), path


def learning_rates(preset: Preset, steps: int = 5, **changes: Any) -> np.ndarray:
    """Computes the learning rates of all steps of a run, [epochs, steps]."""
    training = dataclasses.replace(preset.training, **changes)
    schedule = preset.schedule(preset.complete(training, MNIST), steps)
    return np.asarray(schedule(np.arange(steps * training.epochs))).reshape(-1, steps)


@pytest.mark.parametrize(("lr", "decay"), [(1e-3, 0.9), (0.02, 0.5), (1e-3, 1.0)])
def test_the_seeds_learning_rate_falls_once_an_epoch(lr, decay):
    rates = learning_rates(SEED, epochs=6, lr=lr, lr_decay=decay)
    expected = lr * decay ** np.arange(6)
    np.testing.assert_allclose(rates, np.tile(expected[:, None], 5), rtol=1e-5)


@pytest.mark.parametrize("epochs", [1, 7, 640])
def test_the_papers_learning_rate_falls_by_the_same_factor_over_any_number_of_epochs(epochs):
    rates = learning_rates(PAPER, epochs=epochs).ravel()
    expected = 1e-3 * 0.96 ** (150 * np.arange(5 * epochs) / (5 * epochs))
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


def test_the_papers_learning_rate_has_a_floor():
    rates = learning_rates(PAPER, epochs=4, lr=1e-4).ravel()
    assert rates.min() == rates[-1] == np.float32(1e-6)
    assert rates[0] == np.float32(1e-4)


def test_a_learning_rate_below_the_floor_stays_as_it_is():
    np.testing.assert_allclose(learning_rates(PAPER, epochs=4, lr=1e-7), 1e-7, rtol=1e-5)


def test_a_learning_rate_that_does_not_fall_has_no_floor():
    for lr in (1e-2, 1e-7):
        rates = learning_rates(PAPER, epochs=4, lr=lr, lr_decay=1.0)
        np.testing.assert_allclose(rates, lr, rtol=1e-6)


@pytest.mark.parametrize("preset", [SEED, PAPER], ids=["seed", "paper"])
def test_the_optimizer_is_adam_with_the_schedule(preset):
    training = preset.complete(dataclasses.replace(preset.training, epochs=3), MNIST)
    ours = preset.optimizer(training, 2)
    theirs = optax.adam(preset.schedule(training, 2))
    params = jnp.array([1.0, -2.0])
    states = [optimizer.init(params) for optimizer in (ours, theirs)]
    for gradient in jnp.array([[0.1, 0.2], [0.3, -0.1], [0.0, 0.5]]):
        updates, states[0] = ours.update(gradient, states[0], params)
        expected, states[1] = theirs.update(gradient, states[1], params)
        np.testing.assert_array_equal(updates, expected)


@pytest.mark.parametrize(
    ("preset", "image_shape", "lam_recon"),
    [
        (SEED, MNIST, 0.392),
        (PAPER, MNIST, 7.84),
        (SEED, (32, 32, 3), 1.536),
        (PAPER, (32, 24, 3), 23.04),
    ],
)
def test_a_recipe_is_completed_for_the_size_of_the_images(preset, image_shape, lam_recon):
    complete = preset.complete(preset.training, image_shape)
    assert complete.lam_recon == pytest.approx(lam_recon)
    epochs = preset.training.epochs
    assert complete.lr_decay == (0.9 if preset is SEED else 0.96 ** (150 / epochs))
    changes = {"lam_recon": complete.lam_recon, "lr_decay": complete.lr_decay}
    assert complete == dataclasses.replace(preset.training, **changes)
    assert preset.complete(complete, image_shape) == complete


def test_what_is_given_is_not_completed():
    training = Training(lam_recon=0.0, lr_decay=1.0, average=None)
    for preset in PRESETS.values():
        assert preset.complete(training, MNIST) == training
    assert SEED.complete(Training(lr_decay=None), MNIST).lr_decay is None  # a cosine


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be an integer of 1 or more, got 0"),
        ({"batch_size": 0}, "--batch-size must be an integer of 1 or more, got 0"),
        ({"batch_size": -8}, "--batch-size must be an integer of 1 or more, got -8"),
        ({"margin_steps": 0}, "--margin-steps must be an integer of 1 or more, got 0"),
        ({"batch_size": 1.5}, "--batch-size must be an integer of 1 or more, got 1.5"),
        ({"epochs": None}, "--epochs must be an integer of 1 or more, got None"),
        ({"loss": "hinge"}, "--loss must be one of margin, spread, cross_entropy, got hinge"),
        ({"shift_pixels": -1}, "--shift-pixels must be 0 or more, got -1"),
        *[
            ({"lr": lr}, f"--lr must be a number above 0, got {lr}")
            for lr in (0.0, -1.0, math.inf, math.nan)
        ],
        *[
            ({"lr_decay": decay}, f"--lr-decay must be above 0 and at most 1, got {decay}")
            for decay in (0.0, -0.5, 1.5, math.nan)
        ],
        *[
            ({"lam_recon": lam}, f"--lam-recon must be a number of 0 or more, got {lam}")
            for lam in (-0.1, math.inf, math.nan)
        ],
        *[
            ({"average": decay}, f"--average must be between 0 and 1, got {decay}")
            for decay in (0.0, 1.0, -0.5, 1.5, math.nan)
        ],
    ],
)
def test_training_refuses_what_is_out_of_range_and_names_the_flag(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Training(**changes)


def test_training_takes_the_ends_of_its_ranges():
    Training(epochs=1, batch_size=1, shift_pixels=0, lr_decay=1.0, lam_recon=0.0)
    Training(lr_decay=None, lam_recon=None, average=0.999)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_network_is_read_from_its_file(name, tmp_path):
    config: Any = PRESETS[name].network
    sizes: dict[str, dict[str, Any]] = {"capsnet": SMALLER, "matrix": {}}
    config = dataclasses.replace(config, **sizes.get(config.name, {"hidden": (4,)}))
    model = tiny.draw_arrays(lambda: config.build(MNIST, 10, rngs=nnx.Rngs(0)))
    weights.save(model, tmp_path / "net.safetensors", {"preset": name})
    about = weights.describe(tmp_path / "net.safetensors")
    assert about is not None
    assert about.config == config
    assert about.notes == {"preset": name}
