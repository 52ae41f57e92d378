"""Weights of XifengGuo/CapsNet-Pytorch: their conversion both ways, and their pickles."""

import os
import pickle
import sys
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import capsjax
import reference
import tiny
from capsjax import Agreement, weights
from capsjax.networks import CapsNetConfig
from capsjax.weights import WeightsError

IMAGE = (8, 10, 3)


def predict(model):
    """Predicts two random images: the images and the prediction."""
    images = np.random.default_rng(1).random((2, *model.image_shape)).astype(np.float32)
    return images, capsjax.predict(model, images)


def draw_state_dict(image=IMAGE, num_classes=3, prefix=""):
    """Draws weights as XifengGuo/CapsNet-Pytorch's modules hold them."""
    height, width, depth = image
    rng = np.random.default_rng(0)
    inputs = ((height - 2 - 3) // 2 + 1) * ((width - 2 - 3) // 2 + 1) * 2
    shapes = {
        "conv1.weight": (4, depth, 3, 3),
        "conv1.bias": (4,),
        "primarycaps.conv2d.weight": (8, 4, 3, 3),
        "primarycaps.conv2d.bias": (8,),
        "digitcaps.weight": (num_classes, inputs, 16, 4),
        "decoder.0.weight": (6, 16 * num_classes),
        "decoder.0.bias": (6,),
        "decoder.2.weight": (5, 6),
        "decoder.2.bias": (5,),
        "decoder.4.weight": (height * width * depth, 5),
        "decoder.4.bias": (height * width * depth,),
    }
    return {prefix + n: rng.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}


def compute_by_hand(weights, x, routings):
    """Computes what the PyTorch code does of x [C, H, W]: lengths [j] and pixels [C, H, W]."""
    kernels = [
        weights[f"{n}.weight"].transpose(2, 3, 1, 0) for n in ("conv1", "primarycaps.conv2d")
    ]
    h = np.maximum(reference.conv(x.transpose(1, 2, 0), kernels[0], 1) + weights["conv1.bias"], 0)
    s = reference.conv(h, kernels[1], 2) + weights["primarycaps.conv2d.bias"]
    u = reference.squash(s.transpose(2, 0, 1).reshape(-1, 4))  # .view(batch, -1, 8) there
    u_hat = reference.predictions(u, weights["digitcaps.weight"])
    _, _, v = reference.routing_state(u_hat, routings)
    lengths = np.sqrt((v**2).sum(-1))
    layers = [(weights[f"decoder.{n}.weight"].T, weights[f"decoder.{n}.bias"]) for n in (0, 2, 4)]
    kept = np.where(np.arange(len(v))[:, None] == lengths.argmax(), v, 0)
    return lengths, reference.decode(layers, kept.ravel()).reshape(x.shape)


@pytest.mark.parametrize("image", [IMAGE, (9, 9, 1)], ids=str)
def test_weights_of_pytorch_give_its_outputs(image):
    theirs = draw_state_dict(image)
    shape = None if image[0] == image[1] else image
    model = weights.from_torch(theirs, image_shape=shape, routings=2)
    images, actual = predict(model)
    for n, x in enumerate(images):
        lengths, pixels = compute_by_hand(theirs, x.transpose(2, 0, 1), 2)
        np.testing.assert_allclose(actual.scores[n], lengths, rtol=1e-5, atol=1e-6)
        drawn = pixels.transpose(1, 2, 0)
        np.testing.assert_allclose(actual.reconstruction[n], drawn, rtol=1e-5, atol=1e-6)


def test_weights_go_to_pytorch_and_back_to_the_bit():
    theirs = draw_state_dict()
    model = weights.from_torch(theirs, image_shape=IMAGE)
    back = weights.to_torch(model)
    assert list(back) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array)


def test_names_of_a_network_that_trained_on_several_gpus_are_taken():
    model = weights.from_torch(draw_state_dict(prefix="module."), image_shape=IMAGE)
    assert model.image_shape == IMAGE


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs PyTorch, the extra torch")


def test_a_tensor_of_pytorch_is_taken(torch):
    theirs = {n: torch.from_numpy(a).requires_grad_() for n, a in draw_state_dict().items()}
    back = weights.to_torch(weights.from_torch(theirs, image_shape=IMAGE))
    np.testing.assert_array_equal(back["conv1.bias"], theirs["conv1.bias"].detach())


@pytest.mark.parametrize("file", ["net.safetensors", "net.pt", "net.pth", "net.pkl"])
def test_a_file_of_pytorch_is_read(tmp_path, request, file):
    theirs = draw_state_dict((9, 9, 1))
    if file.endswith("safetensors"):
        save_file(theirs, tmp_path / file)
    else:
        torch = request.getfixturevalue("torch")
        torch.save({n: torch.from_numpy(a) for n, a in theirs.items()}, tmp_path / file)
    model: Any = weights.load(tmp_path / file)
    expected = weights.from_torch(theirs)
    assert model.class_caps.routing.iterations == 3
    for ours, their in zip(predict(model)[1], predict(expected)[1], strict=True):
        np.testing.assert_array_equal(ours, their)
    assert weights.describe(tmp_path / file) is None


def test_a_file_of_pytorch_does_not_say_that_its_images_are_no_squares(tmp_path):
    save_file(draw_state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match="give image_shape"):
        weights.load(tmp_path / "net.safetensors")
    model: Any = weights.load(tmp_path / "net.safetensors", image_shape=IMAGE, routings=2)
    assert (model.image_shape, model.class_caps.routing.iterations) == (IMAGE, 2)


class Hostile:
    """An object that makes a file when Python unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("saved_by", ["pickle", "torch"])
def test_a_hostile_pickle_runs_nothing(tmp_path, torch, saved_by):
    trap = Hostile(tmp_path / "trapped")
    pickle.loads(pickle.dumps(trap))
    (tmp_path / "trapped").unlink()  # it does work
    content = {n: torch.from_numpy(a) for n, a in draw_state_dict().items()} | {"conv1.bias": trap}
    if saved_by == "torch":
        torch.save(content, tmp_path / "net.pkl")
    else:
        (tmp_path / "net.pkl").write_bytes(pickle.dumps(trap))
    with pytest.raises(WeightsError, match=r"net\.pkl is refused: .* more than weights"):
        weights.load(tmp_path / "net.pkl")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", ["truncated", "empty", "a list", "text"])
def test_a_pickle_without_sound_weights_is_refused_in_words(tmp_path, torch, content):
    path = tmp_path / "net.pt"
    torch.save({n: torch.from_numpy(a) for n, a in draw_state_dict().items()}, path)
    if content == "a list":
        torch.save([torch.zeros(3)], path)
    else:
        part = {"truncated": path.read_bytes()[:-100], "empty": b"", "text": b"no pickle"}
        path.write_bytes(part[content])
    with pytest.raises(WeightsError, match=r"net\.pt is refused"):
        weights.load(path)


def test_without_pytorch_a_pickle_is_not_read_and_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    trap = Hostile(tmp_path / "trapped")
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(trap))
    with pytest.raises(WeightsError, match=r"pip install 'capsjax\[torch\]'"):
        weights.load(tmp_path / "net.pkl")
    assert not (tmp_path / "trapped").exists()


def test_routings_that_are_no_number_of_iterations_are_refused(tmp_path):
    save_file(draw_state_dict((9, 9, 1)), tmp_path / "net.safetensors")
    for read in (
        lambda: weights.load(tmp_path / "net.safetensors", routings=0),
        lambda: weights.from_torch(draw_state_dict((9, 9, 1)), routings=0),
    ):
        with pytest.raises(WeightsError, match="int of 1 or more, got 0"):
            read()


@pytest.mark.parametrize(
    ("change", "shape", "words"),
    [
        ({"conv1.bias": None}, IMAGE, "missing: .'conv1.bias'"),
        ({"extra": np.zeros(1)}, IMAGE, "left over: .'extra'"),
        ({"conv1.weight": np.zeros((4, 3, 3))}, IMAGE, "conv1.weight with 4 axes"),
        ({"conv1.bias": np.zeros(5)}, IMAGE, "expected conv1.bias as .4., got .5."),
        ({}, (8, 8, 3), "no image of"),
        ({}, None, "give image_shape"),
        ({}, (8, 30), "give image_shape"),
        ({}, (1, 80, 3), "no network has these sizes: .*at least 5×5 pixels"),
        ({"conv1.bias": np.zeros(0)}, IMAGE, "conv1.bias with 1 axes, none of size 0, got .0."),
        ({"digitcaps.weight": np.zeros((3, 12, 16, 0))}, IMAGE, "digitcaps.weight with 4 axes"),
        ({"digitcaps.weight": np.zeros((3, 12, 16, 9))}, IMAGE, "no network has these sizes"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, shape, words):
    theirs = {n: a for n, a in {**draw_state_dict(), **change}.items() if a is not None}
    with pytest.raises(WeightsError, match=words):
        weights.from_torch(theirs, image_shape=shape)


PLAIN = {"kernel_size": 3, "channels": 4, "types": 2, "dim_primary": 4, "hidden": (6, 5)}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"grouping": "channels"}, "only grouping='flat', this network has 'channels'"),
        ({"routing": Agreement(bias=True)}, "only bias=False, this network has True"),
        ({"routing": Agreement(leak=True)}, "only leak=False, this network has True"),
        ({"primary_coupling": 0.5}, "only primary_coupling=1.0, this network has 0.5"),
        ({"routing": Agreement(stop_gradient=False)}, "only stop_gradient=True"),
        ({"hidden": (5,)}, r"a decoder of 2 hidden layers, got \[5\]"),
    ],
)
def test_a_network_that_pytorch_has_no_place_for_is_refused(sizes, words):
    config = CapsNetConfig(**{**PLAIN, "grouping": "flat", **sizes})
    model = tiny.draw_arrays(lambda: config.build(IMAGE, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(WeightsError, match=words):
        weights.to_torch(model)


def test_a_network_of_another_kind_is_refused_by_its_name():
    with pytest.raises(WeightsError, match="only CapsNet, got NormalisedNetwork"):
        weights.to_torch(tiny.make_normalised())
