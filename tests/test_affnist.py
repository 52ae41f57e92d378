"""affNIST: the canvas, the synthetic set, the file, and runs from the command line."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.io
from flax import nnx

import affnist
from affnist import AFFNIST, Options
from capsjax import data
from capsjax.networks import CapsNetConfig, CNNConfig
from data_files import digits, load_mnist, write_npz
from tiny_run import read_json, read_rows, run_command

SMALL = {
    "seed": CapsNetConfig(channels=4, kernel_size=9, types=1, dim_class=4, hidden=(8,)),
    "cnn": CNNConfig(channels=(4, 4), kernel_sizes=(5, 3), hidden=(8,)),
}


@pytest.fixture(scope="module")
def mnist():
    full = load_mnist()
    return dataclasses.replace(
        full,
        x_train=full.x_train[:50],
        y_train=full.y_train[:50],
        x_test=full.x_test[:30],
        y_test=full.y_test[:30],
    )


def interpolate(image: np.ndarray, row: float, column: float) -> float:
    """Reads an image between its pixels; outside it is 0."""
    value, (top, left) = 0.0, (int(np.floor(row)), int(np.floor(column)))
    for r, c in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= r < image.shape[0] and 0 <= c < image.shape[1]:
            value += (1 - abs(row - r)) * (1 - abs(column - c)) * image[r, c]
    return value


def test_a_digit_is_moved_by_a_map_of_the_ranges_and_all_its_ink_stays(mnist):
    images = mnist.x_test[:6]
    moved = affnist.move(images, np.random.default_rng(3))
    again = np.random.default_rng(3)
    for image, result in zip(images[..., 0], moved[..., 0], strict=True):
        matrix = affnist.draw_matrix(again)
        reached = (np.argwhere(image) - 13.5) @ matrix.T + 19.5
        shift = again.uniform(-reached.min(0), 39 - reached.max(0))
        assert (reached + shift > -1e-9).all()
        assert (reached + shift < 39 + 1e-9).all()
        expected = np.zeros((40, 40))
        for pixel in itertools.product(range(40), repeat=2):
            source = np.linalg.solve(matrix, np.array(pixel) - 19.5 - shift) + 13.5
            if (source >= 0).all() and (source <= 27).all():
                expected[pixel] = interpolate(image, *source)
        np.testing.assert_allclose(result, expected, atol=0.51)


def test_the_maps_fill_their_ranges():
    rng = np.random.default_rng(0)
    angles, slants, zooms = [], [], []
    for _ in range(2000):
        matrix = affnist.draw_matrix(rng)
        # R(θ) (1, s)ᵀ z_r and R(θ) (0, 1)ᵀ z_c are the columns of the matrix.
        down, right = matrix.T
        angles.append(np.degrees(np.arctan2(-right[0], right[1])))
        zooms += [np.linalg.norm(right), np.linalg.det(matrix) / np.linalg.norm(right)]
        slants.append(down @ right / np.linalg.norm(right) / zooms[-1])
    for drawn, limits in ((angles, (-20, 20)), (slants, (-0.2, 0.2)), (zooms, (0.8, 1.2))):
        low, high = limits
        assert low - 1e-9 <= min(drawn) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(drawn) <= high + 1e-9
        assert abs(np.mean(drawn) - (low + high) / 2) < 0.03 * (high - low)


def test_an_image_without_ink_is_left_empty():
    assert not affnist.move(np.zeros((1, 28, 28, 1), np.uint8), np.random.default_rng(0)).any()


def test_digits_to_train_on_lie_in_the_middle_and_those_held_out_are_shifted_whole(mnist):
    prepared = affnist.prepare(mnist, np.arange(30, 50), Options())
    assert prepared.image_shape == (40, 40, 1)
    np.testing.assert_array_equal(prepared.x_train[:30, 6:34, 6:34], mnist.x_train[:30])
    starts = set()
    for image, original in zip(prepared.x_train[30:], mnist.x_train[30:], strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(image, (28, 28, 1))[:, :, 0]
        found = np.argwhere((windows == original).all((2, 3, 4)))
        assert len(found) == 1
        starts.add(tuple(found[0]))
    assert len(starts) > 10
    assert {0, 12} <= {start for pair in starts for start in pair} <= set(range(13))
    assert prepared.x_train.sum(dtype=int) == mnist.x_train.sum(dtype=int)
    with jax.default_prng_impl("rbg"):  # the same, whichever generator JAX is set to
        again = affnist.prepare(mnist, np.arange(30, 50), Options())
    np.testing.assert_array_equal(again.x_train, prepared.x_train)
    np.testing.assert_array_equal(again.x_test, prepared.x_test)
    assert "synthetic" in prepared.source
    np.testing.assert_array_equal(prepared.y_test, mnist.y_test)


def write_affnist(path: Path, images: np.ndarray, labels: np.ndarray, **changed) -> Path:
    """Writes a file in affNIST's format: eight fields, a column for each image."""
    number = len(labels)
    fields = {
        "affine_matrix": np.zeros((6, number)),
        "inverse_matrix": np.zeros((6, number)),
        "image": images.reshape(number, -1).T,
        "id_in_affNIST": np.arange(1, number + 1, dtype=np.uint32)[None],
        "label_one_of_n": np.eye(10, dtype=np.uint8)[labels].T,
        "label_int": labels[None].astype(np.uint8),
        "human_readable_transform": np.zeros((6, number)),
        "id_in_original_MNIST": np.arange(1, number + 1, dtype=np.uint32)[None],
    }
    scipy.io.savemat(path, {"affNISTdata": fields | changed})
    return path


@pytest.mark.parametrize("number", [1, 7])
def test_a_file_of_affnist_is_read_as_it_was_written(mnist, tmp_path, number):
    images = affnist.move(mnist.x_test[:number], np.random.default_rng(0))
    path = write_affnist(tmp_path / "test.mat", images, mnist.y_test[:number])
    prepared = affnist.prepare(mnist, np.arange(0), Options(affnist=path))
    np.testing.assert_array_equal(prepared.x_test, images)
    np.testing.assert_array_equal(prepared.y_test, mnist.y_test[:number])
    assert str(path) in prepared.source
    assert "synthetic" not in prepared.source


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image": np.zeros((784, 2), np.uint8)}, r"got uint8 \[2, 784\] and 2 labels"),
        ({"image": np.zeros((1600, 3), np.uint8)}, r"got uint8 \[3, 1600\] and 2 labels"),
        ({"image": np.zeros((1600, 2))}, "got float64"),
        ({"label_int": np.array([[3, 10]])}, "with labels from 0 to 9"),
    ],
)
def test_a_file_with_other_arrays_is_refused(tmp_path, changed, words):
    images, labels = np.zeros((2, 40, 40, 1), np.uint8), np.array([3, 4])
    path = write_affnist(tmp_path / "test.mat", images, labels, **changed)
    with pytest.raises(data.DataError, match=words):
        affnist.read_affnist(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "text.mat").write_text("no matrices")
    scipy.io.savemat(tmp_path / "other.mat", {"x": np.zeros(3)})
    scipy.io.savemat(tmp_path / "fields.mat", {"affNISTdata": {"image": np.zeros(3)}})
    for name in ("text.mat", "other.mat", "fields.mat", "absent.mat"):
        with pytest.raises(data.DataError, match=f"{name}: expected a .mat file of affNIST"):
            affnist.read_affnist(tmp_path / name)


def test_a_file_of_affnist_for_other_images_is_refused(mnist, tmp_path):
    images = affnist.move(mnist.x_test[:5], np.random.default_rng(0))
    path = write_affnist(tmp_path / "test.mat", images, mnist.y_test[:5])
    larger = dataclasses.replace(mnist, x_train=np.zeros((50, 32, 32, 3), np.uint8))
    with pytest.raises(data.DataError, match=r"of 28×28×1 in 10 classes, got \(32, 32, 3\) in 10"):
        affnist.prepare(larger, np.arange(0), Options(affnist=path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seed", "cnn"])
def test_a_run_stops_at_the_target_and_is_tested_on_a_file_afterwards(name, mnist, tmp_path):
    preset = AFFNIST.presets[name]
    training = dataclasses.replace(preset.training, epochs=3, batch_size=20, target=1)
    preset = dataclasses.replace(preset, network=SMALL[name], training=training)
    experiment = dataclasses.replace(AFFNIST, presets={name: preset})
    source = write_npz(tmp_path / "digits.npz", digits(120, 20))
    flags = {"data_dir": source, "validation": 80, "devices": 1}
    run = run_command(experiment, save_dir=tmp_path / "run", **flags)
    assert run.status == 0, run.err
    assert "40 training, 80 validation and 20 test images of 40×40×1" in run.out
    assert len(read_rows(run.folder)) == 1
    assert read_json(run.folder)["settings"]["options"] == {"affnist": None}
    images = affnist.move(mnist.x_test[:9], np.random.default_rng(0))
    file = write_affnist(tmp_path / "test.mat", images, mnist.y_test[:9])
    folder = tmp_path / "tested"
    tested = run_command(
        experiment, testing=True, weights=run.folder, affnist=file, save_dir=folder
    )
    assert tested.out.endswith("of 9)\n"), tested.err
    assert json.loads((folder / "test.json").read_text())["data"].endswith(f"tests: {file}")


def test_both_networks_are_of_one_size():
    sizes = []
    for preset in AFFNIST.presets.values():
        build = preset.network.build
        net = nnx.eval_shape(lambda build=build: build((40, 40, 1), 10, rngs=nnx.Rngs(0)))
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))))
    assert sizes == [13_475_648, 13_531_530]
