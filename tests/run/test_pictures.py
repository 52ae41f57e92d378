"""The pictures of a run: what each shows, and that it is written whole or not at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure
from PIL import Image

import capsjax
from capsjax.run import pictures

pytestmark = pytest.mark.slow

NAMES = ("curves.png", "reconstructions.png", "perturbations.png", "errors.png", "capsules.png")
ROWS = [{"epoch": "1", "train_error": "4.2", "validation_error": "", "test_error": "3.1"}]


def make_network(shape, num_classes, **sizes):
    """Draws a small network with NumPy, because JAX would compile an initializer per shape."""
    sizes |= {"channels": 4, "types": 1, "hidden": (8,), "kernel_size": 5}
    abstract = nnx.eval_shape(
        lambda: capsjax.CapsNet(shape, num_classes, **sizes, rngs=nnx.Rngs(0))
    )
    graphdef, params = nnx.split(abstract)
    rng = np.random.default_rng(0)
    return nnx.merge(
        graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), params)
    )


def make_images(number, shape):
    return np.random.default_rng(0).integers(0, 256, (number, *shape), dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "num_classes", "number"), [((28, 28, 1), 10, 70), ((18, 25, 3), 47, 3)]
)
def test_each_picture_is_made_and_has_content(tmp_path, shape, num_classes, number):
    x, y = make_images(number, shape), np.arange(number, dtype=np.int32) % num_classes
    names = [f"class name {n}" for n in range(num_classes)]
    wrong = (y + 1) % num_classes
    pictures.write_pictures(tmp_path, make_network(shape, num_classes), x, y, wrong, names, ROWS)
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES)
    for name in NAMES:
        with Image.open(tmp_path / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 100, name
        assert len(np.unique(pixels)) > 30, name


def test_two_classes_and_no_row_of_metrics_make_every_picture_but_the_curves(tmp_path):
    x, y = make_images(2, (16, 16, 1)), np.array([0, 1], np.int32)
    pictures.write_pictures(tmp_path, make_network((16, 16, 1), 2), x, y, y, "01", [])
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES) - {"curves.png"}


def test_a_number_moved_by_nothing_leaves_the_reconstruction():
    model, image = make_network((16, 16, 1), 3), make_images(1, (16, 16, 1))[0]
    moved = pictures.perturbed(model, image, np.array([-0.25, 0.0, 0.25]))
    assert moved.shape == (16, 3, 16, 16, 1)
    expected = capsjax.predict(model, image).reconstruction
    np.testing.assert_allclose(moved[:, 1], np.broadcast_to(expected, (16, 16, 16, 1)), atol=1e-6)


def test_each_number_of_the_longest_capsule_is_moved_by_itself():
    model, image = make_network((16, 16, 1), 3), make_images(1, (16, 16, 1))[0]
    moved = pictures.perturbed(model, image, pictures.OFFSETS)
    capsules = jax.jit(lambda image: model(image).capsules)(jnp.asarray(image / 255, jnp.float32))
    longest = int(capsjax.length(capsules).argmax())
    layers = [(layer.kernel[...], layer.bias[...]) for layer in model.decoder]
    for number, column in [(0, 0), (5, 10), (15, 7)]:
        by_hand = np.zeros((3, 16), np.float32)
        by_hand[longest] = capsules[longest]
        by_hand[longest, number] += -0.25 + 0.05 * column
        expected = capsjax.decode(layers, by_hand.ravel()).reshape(16, 16, 1)
        np.testing.assert_allclose(moved[number, column], expected, atol=1e-6)


def test_the_offsets_are_eleven_from_minus_to_plus_a_quarter():
    np.testing.assert_allclose(pictures.OFFSETS, np.linspace(-0.25, 0.25, 11), atol=1e-12)


class Unwritable(Figure):
    """A figure whose disk is full halfway."""

    def savefig(self, fname, **kwargs):
        fname.write_bytes(b"half")
        raise OSError("no space left on device")


def test_an_interrupted_picture_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "curves.png").write_bytes(b"old")
    with pytest.raises(OSError, match="no space"):
        pictures.write(Unwritable(), tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes() == b"old"


class Drawing(capsjax.CapsNet):
    """Reconstructs, but does not define `decode`."""

    decode = capsjax.Network.decode

    def __call__(self, images, labels=None):
        pixels = jnp.zeros(images.shape)
        capsules = jnp.ones((*images.shape[:-3], self.num_classes, 4))
        return capsjax.Output(capsjax.length(capsules), capsules, pixels)


def test_without_decode_perturbations_are_left_out_and_it_is_said(tmp_path, capsys):
    sizes = {"channels": 4, "types": 1, "hidden": (8,), "kernel_size": 5}
    model = Drawing((16, 16, 1), 2, **sizes, rngs=nnx.Rngs(0))
    x, y = make_images(2, (16, 16, 1)), np.array([0, 1], np.int32)
    pictures.write_pictures(tmp_path, model, x, y, y, "01", ROWS)
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES) - {"perturbations.png"}
    printed = capsys.readouterr().out
    assert "no perturbations: Drawing does not define decode" in printed
    assert "only class capsules: this network has no capsule layer of capsjax.nn" in printed


@dataclasses.dataclass(frozen=True)
class Untold:
    """A routing that does not tell its couplings."""

    name = "untold"

    def initial_bias(self, j, i, d):
        return None

    def __call__(self, u, weight, bias=None):
        return capsjax.uniform_routing(capsjax.DenseVotes(u, weight))


class Plain(capsjax.Network):
    """A network without capsules."""

    def __call__(self, images, labels=None):
        return capsjax.Output(images[..., 0, : self.num_classes, 0], None, None)


def test_what_a_network_does_not_tell_of_its_capsules_is_left_out_and_it_is_said(tmp_path, capsys):
    shape = (16, 16, 1)
    x, y = make_images(2, shape), np.array([0, 1], np.int32)
    untold, plain = make_network(shape, 2, routing=Untold()), Plain(None, shape, 2)
    for model, said, drawn in [
        (untold, "no couplings: the routing of the last capsule layer does not return them", True),
        (plain, "no capsules: this network has none", False),
    ]:
        pictures.write_pictures(tmp_path, model, x, y, y, "01", [])
        assert said in capsys.readouterr().out
        assert (tmp_path / "capsules.png").exists() == drawn
        (tmp_path / "capsules.png").unlink(missing_ok=True)
