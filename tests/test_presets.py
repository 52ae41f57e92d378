import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax.presets import PAPER, PRESETS, SEED, Model

# Every array of CapsNet for 28×28×1 and 10 classes.
SHAPES = {
    "conv1.kernel": (9, 9, 1, 256),
    "conv1.bias": (256,),
    "primary.conv.kernel": (9, 9, 256, 256),
    "primary.conv.bias": (256,),
    "classes.weight": (10, 1152, 16, 8),
    "decoder.0.kernel": (160, 512),
    "decoder.0.bias": (512,),
    "decoder.1.kernel": (512, 1024),
    "decoder.1.bias": (1024,),
    "decoder.2.kernel": (1024, 784),
    "decoder.2.bias": (784,),
}


def arrays(model) -> dict:
    """The parameters by path, as `classes.weight`."""
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def network(preset, **options):
    model = {**dataclasses.asdict(preset.model), **options}
    return capsjax.nn.CapsNet(**model, rngs=nnx.Rngs(0))


def test_the_defaults_of_the_network_are_those_of_the_model():
    signature = inspect.signature(capsjax.nn.CapsNet.__init__).parameters
    model = dataclasses.asdict(Model())
    assert {name: signature[name].default for name in model} == model


@pytest.mark.parametrize(
    ("preset", "more", "count"),
    [(SEED, {}, 8_215_568), (PAPER, {"classes.bias": (10, 16)}, 8_215_728)],
    ids=["seed", "paper"],
)
def test_every_array_has_its_shape_and_all_their_number(preset, more, count):
    found = arrays(nnx.eval_shape(lambda: network(preset)))
    assert {path: leaf.shape for path, leaf in found.items()} == SHAPES | more
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(jnp.float32)}
    assert sum(leaf.size for leaf in found.values()) == count


def test_both_presets_are_there_by_name():
    assert PRESETS == {"seed": SEED, "paper": PAPER}


def test_the_defaults_of_capsnet_are_the_seed_preset():
    default = nnx.eval_shape(lambda: capsjax.nn.CapsNet(rngs=nnx.Rngs(0)))
    assert nnx.graphdef(default) == nnx.graphdef(nnx.eval_shape(lambda: network(SEED)))


def test_the_recipes_are_the_published_ones():
    assert (SEED.lr, SEED.lr_decay, SEED.lr_staircase, SEED.lr_floor) == (1e-3, 0.9, True, 0)
    assert (PAPER.lr, PAPER.lr_decay, PAPER.lr_staircase) == (1e-3, None, False)
    assert PAPER.lr_floor == 1e-6
    assert PAPER.lr_total_decay == pytest.approx(0.96 ** (300_000 / 2000))
    assert (SEED.batch_size, SEED.epochs, SEED.shift_pixels) == (100, 50, 2)
    assert (PAPER.batch_size, PAPER.epochs, PAPER.shift_pixels) == (128, 640, 2)
    assert SEED.recon_per_pixel * 784 == pytest.approx(0.392)
    assert PAPER.recon_per_pixel * 784 == pytest.approx(7.84)
    assert (SEED.model.stop_gradient, SEED.model.routing_bias) == (True, False)
    assert (PAPER.model.stop_gradient, PAPER.model.routing_bias) == (False, True)
    assert (SEED.model.primary_coupling, PAPER.model.primary_coupling) == (1, 1 / 32)


@pytest.mark.parametrize("preset", [SEED, PAPER], ids=["seed", "paper"])
def test_a_preset_does_not_change(preset):
    assert hash(preset) == hash(dataclasses.replace(preset))
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.model.types = 1


SMALLER = {"channels": 32, "types": 8, "hidden": (64, 128)}
FAN_IN = {"conv1": 81, "primary": 81 * 32, "decoder.0": 160, "decoder.1": 64, "decoder.2": 128}


def drawn(preset) -> dict:
    """The first values of a smaller network, compiled at once."""
    return jax.tree.map(np.asarray, jax.jit(lambda: arrays(network(preset, **SMALLER)))())


def test_the_seed_begins_as_pytorch_does():
    found = drawn(SEED)
    weight = found.pop("classes.weight")
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
    found = drawn(PAPER)
    for path, values in found.items():
        if path.endswith("bias"):
            np.testing.assert_array_equal(values, np.float32(0.1), err_msg=path)
            continue
        stddev = 0.05 if path == "conv1.kernel" else 0.1
        assert 1.9 * stddev < np.abs(values).max() <= 2 * stddev, path
        # Cut off at two standard deviations, a normal distribution keeps 0.88 of its own.
        assert np.std(values) == pytest.approx(0.8796 * stddev, rel=0.02), path
