"""MultiMNIST: the pairs, both drawings, both errors, and a run from its command line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import capsjax
import multi_mnist
from capsjax.networks import CapsNetConfig, CNNConfig
from capsjax.tasks import Batch
from data_files import digits, load_mnist, write_npz
from multi_mnist import MULTI_MNIST, Options, Overlapping, make_task
from tiny_run import read_json, read_rows, run_command

TASK = Overlapping(0.5, shift_pixels=4, test_pairs=150)
SMALL = CapsNetConfig(channels=4, kernel_size=9, types=1, dim_class=4, hidden=(8,))


@pytest.fixture(scope="module")
def data():
    full = load_mnist()
    return jnp.asarray(full.x_test[:100]), jnp.asarray(full.y_test[:100])


@pytest.fixture(scope="module")
def test_batch():
    return jax.jit(TASK.test_batch)


@pytest.fixture(scope="module")
def net():
    return SMALL.build((36, 36, 1), 10, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_test_pair_is_the_same_in_every_batch_and_its_base_returns_with_another_top(
    data, test_batch
):
    whole = test_batch(*data, jnp.arange(150))
    part = test_batch(*data, jnp.array([149, 3]))
    for ours, all_of_them in zip(part, whole, strict=True):
        np.testing.assert_array_equal(ours, all_of_them[jnp.array([149, 3])])
    assert TASK.count_tests(100) == 150
    again = whole.images[100:] != whole.images[:50]  # the same bases
    assert again.any((1, 2, 3)).all()
    with jax.default_prng_impl("rbg"):
        # Traced anew, not taken from the cache of the other jit.
        same = jax.jit(lambda *arrays: TASK.test_batch(*arrays))(*data, jnp.array([149, 3]))
    np.testing.assert_array_equal(same.images, part.images)
    labels = np.asarray(data[1])
    assert (np.asarray(whole.labels)[np.arange(150), np.tile(labels, 2)[:150]] == 1).all()


@pytest.mark.parametrize("which", ["train", "test"])
def test_both_digits_stand_in_the_order_of_their_classes_and_overlap_to_the_image(data, which):
    indices = jnp.arange(20)
    batch = (
        jax.jit(TASK.train_batch)(jax.random.key(0), *data, indices)
        if which == "train"
        else TASK.test_batch(*data, indices)
    )
    assert batch.images.shape == (20, 36, 36, 1)
    assert batch.targets.shape == (20, 2, 36, 36, 1)
    assert (batch.labels.sum(1) == 2).all()
    np.testing.assert_allclose(batch.targets.sum(1).clip(max=1), batch.images, atol=1e-6)
    images, labels = (np.asarray(a) for a in data)
    if which == "train":  # the tops are of the batch, too
        images, labels = images[:20], labels[:20]
    inks = {int(image.sum()): label for image, label in zip(images, labels, strict=True)}
    for targets, present in zip(np.asarray(batch.targets), batch.labels, strict=True):
        classes = [inks[round(float(255 * target.sum(dtype=float)))] for target in targets]
        assert classes == np.flatnonzero(present).tolist()


@pytest.mark.slow
def test_each_capsule_is_drawn_by_itself_that_of_the_lower_class_first(data, test_batch, net):
    batch = test_batch(*data, jnp.arange(6))
    classes = np.sort(np.argsort(-np.asarray(batch.labels), 1, kind="stable")[:, :2], 1)
    for output in (TASK.forward(net, batch, batch.labels), TASK.forward(net, batch, None)):
        for n in range(2):
            expected = net.decode(output.capsules, classes[:, n])
            np.testing.assert_allclose(output.reconstruction[:, n], expected, rtol=1e-5, atol=1e-6)


def test_the_errors_of_both_drawings_add_up_and_an_answer_is_right_if_both_classes_are():
    scores = jnp.array([[0.9, 0.1, 0.8], [0.9, 0.8, 0.1], [0.1, 0.9, 0.2]])
    labels = jnp.array([[1.0, 0, 1], [1, 0, 1], [1, 0, 1]])  # both, one and one are found
    targets = jnp.zeros((3, 2, 4, 4, 1))
    drawn = targets.at[0, 0].set(1).at[0, 1].set(0.5)
    batch, step = Batch(targets[:, 0], labels, targets), jnp.array(0)
    losses = TASK.losses(capsjax.Output(scores, None, drawn), batch, step)
    np.testing.assert_allclose(losses["reconstruction"], [1 + 0.25, 0, 0])
    np.testing.assert_allclose(losses["margin"], capsjax.margin_loss(scores, labels))
    total = losses["margin"] + 0.5 * losses["reconstruction"]
    np.testing.assert_allclose(losses["loss"], total, rtol=1e-6)
    np.testing.assert_allclose(losses["digit_error"], [0, 50, 50])
    assert TASK.correct(capsjax.Output(scores, None, drawn), batch).tolist() == [True, False, False]
    without = TASK.losses(capsjax.Output(scores, None, None), batch, step)
    np.testing.assert_array_equal(without["loss"], losses["margin"])
    assert "reconstruction" not in without


def test_six_pairs_are_drawn_with_a_class_that_is_not_there():
    there = np.array([[n % 9, n % 9 + 1] for n in range(40)])
    read = there.copy()
    read[30:, 1] = (read[30:, 1] + 2) % 10
    chosen, classes, marks = multi_mnist.choose_pairs(there, read)
    assert marks == [""] * 18 + ["*"] * 6
    assert chosen.tolist() == [*range(12), *range(30, 36), *range(12, 18)]
    np.testing.assert_array_equal(classes[:18], read[chosen[:18]])
    for pair, drawn in zip(there[chosen[18:]], classes[18:], strict=True):
        assert len({*pair} & {*drawn}) == 1
        assert drawn[0] < drawn[1]
    few, *_ = multi_mnist.choose_pairs(there[:2], read[:2])
    assert few.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"rotation": 5}, "--rotation must be 0: digits are only shifted, got 5"),
        ({"shift_pixels": 5}, "--shift-pixels must be 0, 1, 2, 3 or 4, got 5"),
        ({"batch_size": 1}, "--batch-size must be 20 or more"),
        ({"validation": 10}, "--validation: pairs are made for training and for tests only"),
        ({"dataset": "letters"}, "images of 28×28×1 in 10 classes, got (28, 28, 1) in 3"),
    ],
    ids=str,
)
def test_what_makes_no_pairs_is_refused_in_words(flags, words, tmp_path):
    arrays = digits(60, 20)
    if "dataset" in flags:
        arrays |= {name: arrays[name] % 3 for name in ("y_train", "y_test")}
    source = write_npz(tmp_path / "digits.npz", arrays)
    flags = {"data_dir": source, "save_dir": tmp_path / "run", "batch_size": 20} | flags
    refused = run_command(MULTI_MNIST, **flags)
    assert refused.status == 2
    assert words in refused.err


@pytest.mark.parametrize(("flag", "value"), [("zoom", 0.1), ("elastic", 1)])
def test_digits_are_only_shifted(flag, value):
    training = dataclasses.replace(MULTI_MNIST.presets["best"].training, lam_recon=1.0)
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')}"):
        make_task(dataclasses.replace(training, **{flag: value}), Options())


def shrink(preset, network):
    training = dataclasses.replace(preset.training, epochs=1, batch_size=20)
    return dataclasses.replace(preset, network=network, training=training)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best", "cnn-paper"])
def test_a_run_reports_both_errors_and_draws_what_there_is_to_draw(name, tmp_path):
    network = {
        "best": SMALL,
        "cnn-paper": CNNConfig(channels=(4, 4), kernel_sizes=(5, 3), hidden=(8,)),
    }[name]
    preset = shrink(MULTI_MNIST.presets[name], network)
    experiment = dataclasses.replace(MULTI_MNIST, presets={name: preset})
    source = write_npz(tmp_path / "digits.npz", digits(40, 20))
    flags = {"data_dir": source, "test_pairs": 50, "save_dir": tmp_path / "run", "devices": 1}
    run = run_command(experiment, **flags)
    assert run.status == 0, run.err
    assert run.out.endswith("of 50)\n")
    assert read_json(run.folder)["settings"]["options"] == {"test_pairs": 50}
    (row,) = read_rows(run.folder)
    assert 0 <= float(row["test_digit_error"]) <= float(row["test_error"])
    assert f"{float(row['test_digit_error']):.2f} % of all digits are misread" in run.out
    pictures = {path.name for path in run.folder.glob("*.png")}
    assert pictures == {"curves.png"} | ({"pairs.png"} if name == "best" else set())
    if name == "best":
        with Image.open(run.folder / "pairs.png") as picture:
            assert min(picture.size) > 200
    else:
        assert "no pairs: this network has no decoder" in run.out


def test_the_sizes_are_those_of_the_paper():
    for name, count in (("best", 11_361_808), ("cnn-paper", 24_563_978)):
        config = MULTI_MNIST.presets[name].network
        net = nnx.eval_shape(lambda config=config: config.build((36, 36, 1), 10, rngs=nnx.Rngs(0)))
        size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param)))
        assert size == count
