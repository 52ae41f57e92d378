"""One device, two, four or eight: the same training."""

import functools
import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from capsjax import sharding, tasks, train
from capsjax.sharding import make_mesh, replicate, replicate_images, replicated, split

KEY = jax.random.key(3)
BATCHES = tiny.draw_batches(20)
LOSSES = ("margin", "reconstruction")


@functools.cache
def train_twenty_steps(devices: int):
    """Trains twenty steps: both losses of each, and the state after five."""
    mesh = make_mesh(tiny.BATCH, devices)
    data = tiny.place_data(mesh, *tiny.make_images())
    step, _ = tiny.jit_steps(devices)
    state = fifth = jax.device_put(tiny.make_state(), replicated(mesh))
    losses = []
    for number, batch in enumerate(BATCHES, 1):
        state, diagnostics = step(state, KEY, *data, batch[None])
        # Waits: many steps in flight on a mesh of CPU devices abort the process.
        losses.append([float(diagnostics.sums.losses[name]) for name in LOSSES])
        if number == 5:
            fifth = jax.tree.map(jnp.copy, state)
    return np.array(losses) / tiny.BATCH, fifth


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
def test_losses_and_parameters_are_those_of_one_device(devices):
    losses, state = train_twenty_steps(devices)
    expected, alone = train_twenty_steps(1)
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    params, start = flat(alone.params), flat(tiny.make_state().params)
    assert np.linalg.norm(flat(state.params) - params) < 1e-5 * np.linalg.norm(params)
    assert np.linalg.norm(params - start) > 1e-2 * np.linalg.norm(params)


def test_eight_devices_evaluate_as_one_does():
    state, results = jax.device_get(train_twenty_steps(1)[1]), []
    for devices in (1, 8):
        mesh = make_mesh(tiny.BATCH, devices)
        data = tiny.place_data(mesh, *tiny.make_images())
        placed, counted = jax.device_put(state, replicated(mesh)), np.arange(tiny.BATCH) < 11
        results.append(tiny.jit_steps(devices)[1](placed, *data, BATCHES[0], counted))
    (alone, predicted), (together, same) = jax.device_get(results)
    np.testing.assert_array_equal(same, predicted)
    assert together.examples == 11
    chex.assert_trees_all_close(together, alone, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 4, 6, 1), (5, 4, 6, 3)])
def test_placed_images_are_gathered_as_those_of_an_array(rng, shape):
    images = rng.integers(0, 256, shape, np.uint8)
    placed = replicate_images(make_mesh(tiny.BATCH, 8), images)
    assert (placed.shape, placed.dtype) == (shape, np.uint8)
    assert len(placed) == shape[0]
    assert placed.pixels.sharding.is_fully_replicated
    for indices in (np.array([3, 0, 3]), np.array([[1], [4]])):
        gathered = jax.jit(lambda images, i: images[i])(placed, indices)
        np.testing.assert_array_equal(gathered, images[indices])


def test_placed_images_become_an_array_for_all_else(rng):
    images = rng.integers(0, 256, (5, 4, 6, 3), np.uint8)
    placed = replicate_images(make_mesh(tiny.BATCH, 1), images)
    for use in (
        lambda images: images[1:3],
        lambda images: images[np.array([2, 0]), :, 1],
        lambda images: jnp.flip(images, 2),
    ):
        np.testing.assert_array_equal(jax.jit(use)(placed), use(images))


def test_images_lie_one_after_the_other_and_a_tpu_fills_up_their_tiles():
    assert sharding.IMAGE_LAYOUT.major_to_minor == (0, 1, 2)
    images, labels = np.zeros((10, 28, 28), np.uint8), np.zeros(10, np.int32)
    tpu, cpu = (SimpleNamespace(platform=platform) for platform in ("tpu", "cpu"))
    assert sharding._count_bytes(tpu, images) == 10 * 32 * 128
    assert sharding._count_bytes(cpu, images) == images.nbytes
    assert sharding._count_bytes(tpu, labels) == labels.nbytes


def test_each_of_eight_devices_works_on_its_eighth_of_the_batch(monkeypatch):
    seen = {}

    def inspect(name, function):
        def inspected(*args):
            result = function(*args)
            note = lambda placed: seen.update({name: placed.shard_shape(result.shape)})  # noqa: E731
            jax.debug.inspect_array_sharding(result, callback=note)
            return result

        monkeypatch.setattr(tasks, name, inspected)

    for name in ("shift", "to_unit_interval", "margin_loss", "reconstruction_loss"):
        inspect(name, getattr(tasks, name))
    mesh = make_mesh(tiny.BATCH, 8)
    steps: Any = train.jit_steps(tiny.SETUP, mesh)
    data = tiny.place_data(mesh, *tiny.make_images())
    state = jax.device_put(tiny.make_state(), replicated(mesh))
    compiled = steps[0].lower(state, KEY, *data, BATCHES).compile()
    assert seen == {
        "shift": (2, *tiny.IMAGE),
        "to_unit_interval": (2, *tiny.IMAGE),
        "margin_loss": (2,),
        "reconstruction_loss": (2,),
    }
    *_, order = compiled.input_shardings[0]
    assert order.shard_shape(BATCHES.shape) == (len(BATCHES), 2)
    # Devices exchange sums, and never examples.
    assert "all-reduce" in compiled.as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())


def test_indices_are_split_and_the_state_is_whole_on_every_device():
    mesh = make_mesh(tiny.BATCH, 8)
    indices = jax.device_put(BATCHES[0], split(mesh))
    shards = sorted(indices.addressable_shards, key=lambda shard: shard.index)
    np.testing.assert_array_equal([shard.data for shard in shards], BATCHES[0].reshape(8, 2))
    assert len({shard.device for shard in shards}) == 8
    _, state = train_twenty_steps(8)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf)


@pytest.mark.parametrize(
    ("batch_size", "devices"),
    [(128, 8), (100, 5), (64, 8), (36, 6), (28, 7), (10, 5), (9, 3), (13, 1), (1, 1)],
)
def test_by_default_as_many_devices_as_divide_the_batch(batch_size, devices):
    mesh = make_mesh(batch_size)
    assert dict(mesh.shape) == {"data": devices}
    assert list(mesh.devices) == jax.devices()[:devices]


def test_processes_with_different_numbers_of_devices_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 5)
    with pytest.raises(ValueError, match="different numbers of devices"):
        make_mesh(8)


def test_processes_that_train_together_use_all_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    with mock.patch.object(jax, "make_mesh") as make:
        make_mesh(16)
    assert make.call_args.args[0] == (8,)
    with pytest.raises(ValueError, match="8 devices do not divide a batch of 100"):
        make_mesh(100)
    with pytest.raises(ValueError, match="4 devices asked for, but several processes use all 8"):
        make_mesh(16, 4)


@pytest.mark.parametrize("devices", [1, 2, 4, 5])
def test_fewer_devices_may_be_asked_for(devices):
    assert make_mesh(100, devices).size == devices


@pytest.mark.parametrize(
    ("batch_size", "devices", "message"),
    [
        (100, 8, "8 devices do not divide a batch of 100 images evenly"),
        (100, 9, r"9 devices asked for, 8 found \(cpu\)"),
        (1024, 16, "set JAX_NUM_CPU_DEVICES=16 to split it"),
        (100, 0, "0 devices asked for"),
        (100, -1, "-1 devices asked for"),
    ],
)
def test_devices_that_are_not_there_or_do_not_divide_are_an_error_in_words(
    batch_size, devices, message
):
    with pytest.raises(ValueError, match=message):
        make_mesh(batch_size, devices)


def test_replicate_puts_the_whole_array_on_every_device(rng):
    array = rng.integers(0, 256, (5, 3, 3, 1), np.uint8)  # five images on eight devices
    placed = replicate(make_mesh(tiny.BATCH, 8), array)
    assert placed.dtype == np.uint8
    assert len(placed.addressable_shards) == 8
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, array)


@pytest.mark.parametrize(("devices", "size"), [(1, r"4\.5 GiB"), (8, r"36\.0 GiB")])
def test_images_larger_than_the_memory_are_refused_with_both_sizes(monkeypatch, devices, size):
    monkeypatch.setattr(sharding, "_find_memory", lambda device: 3 * 2**30)
    images = np.broadcast_to(np.uint8(0), (4608, 1024, 1024, 1))  # takes one byte
    with pytest.raises(ValueError, match=f"{size} and cpu has 3.0 GiB.*--train-size"):
        replicate(make_mesh(8, devices), images)


def test_images_that_just_fit_are_not_refused(monkeypatch):
    monkeypatch.setattr(sharding, "_find_memory", lambda device: 8 * 100)
    mesh = make_mesh(8, 8)
    assert replicate(mesh, np.zeros((10, 10), np.uint8)).shape == (10, 10)
    with pytest.raises(ValueError, match="GiB"):
        replicate(mesh, np.zeros((10, 11), np.uint8))


def test_other_devices_than_cpus_hold_one_copy_each_in_memory_of_their_own(monkeypatch):
    device = SimpleNamespace(
        platform="gpu", device_kind="H100", memory_stats=lambda: {"bytes_limit": 100}
    )
    mesh: Any = SimpleNamespace(local_devices=[device] * 8)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, part: part(...))
    monkeypatch.setattr(sharding, "replicated", lambda mesh: None)
    assert replicate(mesh, np.zeros(100, np.uint8)).nbytes == 100
    with pytest.raises(ValueError, match="H100"):
        replicate(mesh, np.zeros(101, np.uint8))


def test_the_memory_of_a_cpu_is_the_hosts():
    assert 2**30 < sharding._find_memory(jax.devices()[0]) < 2**50
