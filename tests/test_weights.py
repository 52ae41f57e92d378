"""One network in one file, weights of PyTorch, exported functions."""

import json
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import capsjax
import reference
import tiny
from capsjax import weights
from capsjax.weights import WeightsError

FLAT = {"kernel_size": 3, "channels": 4, "types": 2, "dim_primary": 4, "hidden": (6, 5)}


def network(image=(8, 10, 3), classes=3, **architecture):
    """A small one, drawn by NumPy."""
    options = {**FLAT, **architecture}
    abstract = nnx.eval_shape(
        lambda: capsjax.nn.CapsNet(image, classes, **options, rngs=nnx.Rngs(0))
    )
    graphdef, shapes = nnx.split(abstract)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)
    return nnx.merge(graphdef, jax.device_put(params))


def outputs(model, number=2):
    images = np.random.default_rng(1).random((number, *model.image_shape)).astype(np.float32)
    return images, capsjax.predict(model, images)


ARCHITECTURES = {
    "as tiny": {},
    "paper": {
        "routings": 2,
        "primary_coupling": 0.5,
        "routing_bias": True,
        "stop_gradient": False,
        "init": "truncated_normal",
    },
    "flat, deep": {"grouping": "flat", "hidden": (7, 6, 5)},
    "no hidden layer": {"hidden": ()},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_alone_rebuilds_the_network_to_the_bit(tmp_path, name):
    model = network(**ARCHITECTURES[name])
    weights.save(model, tmp_path / "net.safetensors")
    again = weights.load(tmp_path / "net.safetensors")
    assert nnx.split(again)[0] == nnx.split(model)[0]
    images, expected = outputs(model)
    for ours, theirs in zip(capsjax.predict(again, images), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("preset", ["seed", "paper"])
def test_the_file_says_which_preset_it_is_of(tmp_path, preset):
    net = network((17, 17, 1), 2, **vars(capsjax.presets.PRESETS[preset].model))
    weights.save(net, tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "numpy") as file:
        about = json.loads(file.metadata()["capsjax"])
    assert about["preset"] == preset
    assert about["architecture"]["image_shape"] == [17, 17, 1]


def test_a_network_of_no_preset_says_so(tmp_path):
    weights.save(network(), tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["capsjax"])["preset"] is None


def test_the_same_network_makes_the_same_file(tmp_path):
    for name in ("a", "b"):
        weights.save(network(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_of_another_version_says_so(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_VERSION", 2)
        weights.save(network(), tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match="of version 2, this capsjax reads version 1"):
        weights.load(tmp_path / "net.safetensors")


def test_any_flipped_bit_is_found(tmp_path):
    path = tmp_path / "net.safetensors"
    weights.save(network(), path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for position in [*rng.permutation(len(content))[:60], 0, 8, 40, len(content) - 1]:
        altered = bytearray(content)
        altered[position] ^= 1 << rng.integers(8)
        path.write_bytes(altered)
        with pytest.raises(WeightsError, match=r"net\.safetensors"):
            weights.load(path)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_cut_short_is_found(tmp_path, length):
    path = tmp_path / "net.safetensors"
    weights.save(network(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match="is no safetensors file, or damaged"):
        weights.load(path)


def test_another_dtype_in_the_header_is_found(tmp_path):
    path = tmp_path / "net.safetensors"
    weights.save(network(), path)
    path.write_bytes(path.read_bytes().replace(b"F32", b"I32", 1))
    with pytest.raises(WeightsError, match="was altered"):
        weights.load(path)


def test_a_file_that_cannot_be_written_is_an_os_error_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        weights.save(network(), tmp_path / "folder")
    with pytest.raises(OSError, match="none"):
        weights.save(network(), tmp_path / "none" / "net.safetensors")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_a_bfloat16_network_is_saved_in_float32(tmp_path):
    graphdef, params = nnx.split(network())
    low = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    weights.save(low, tmp_path / "net.safetensors")
    for ours, theirs in zip(
        jax.tree.leaves(nnx.split(weights.load(tmp_path / "net.safetensors"))[1]),
        jax.tree.leaves(nnx.split(low)[1]),
        strict=True,
    ):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, theirs.astype(jnp.float32))


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"weight": np.zeros(3)}, tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match="was not written by capsjax"):
        weights.load(tmp_path / "net.safetensors")
    assert weights.describe(tmp_path / "net.safetensors") is None


def test_iterations_of_routing_may_differ_from_the_files(tmp_path):
    weights.save(network(routings=2), tmp_path / "net.safetensors")
    assert weights.describe(tmp_path / "net.safetensors") == (None, 2)
    for asked, expected in ((None, 2), (5, 5)):
        model = weights.load(tmp_path / "net.safetensors", routings=asked)
        assert model.classes.routings == expected


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="none"):
        weights.load(tmp_path / "none.safetensors")


def state_dict(image=(8, 10, 3), classes=3, prefix=""):
    """Weights as XifengGuo/CapsNet-Pytorch's modules hold them."""
    height, width, depth = image
    rng = np.random.default_rng(0)
    inputs = ((height - 2 - 3) // 2 + 1) * ((width - 2 - 3) // 2 + 1) * 2
    shapes = {
        "conv1.weight": (4, depth, 3, 3),
        "conv1.bias": (4,),
        "primarycaps.conv2d.weight": (8, 4, 3, 3),
        "primarycaps.conv2d.bias": (8,),
        "digitcaps.weight": (classes, inputs, 16, 4),
        "decoder.0.weight": (6, 16 * classes),
        "decoder.0.bias": (6,),
        "decoder.2.weight": (5, 6),
        "decoder.2.bias": (5,),
        "decoder.4.weight": (height * width * depth, 5),
        "decoder.4.bias": (height * width * depth,),
    }
    return {prefix + n: rng.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}


def seeds_network(weights, x, routings):
    """What the PyTorch code computes of x [C, H, W]: lengths [j] and pixels [C, H, W]."""
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


@pytest.mark.parametrize("image", [(8, 10, 3), (9, 9, 1)], ids=str)
def test_weights_of_pytorch_give_its_outputs(image):
    theirs = state_dict(image)
    shape = None if image[0] == image[1] else image
    model = weights.from_torch(theirs, image_shape=shape, routings=2)
    images, actual = outputs(model)
    for n, x in enumerate(images):
        lengths, pixels = seeds_network(theirs, x.transpose(2, 0, 1), 2)
        np.testing.assert_allclose(actual.lengths[n], lengths, rtol=1e-5, atol=1e-6)
        drawn = pixels.transpose(1, 2, 0)
        np.testing.assert_allclose(actual.reconstruction[n], drawn, rtol=1e-5, atol=1e-6)


def test_weights_go_to_pytorch_and_back_to_the_bit():
    theirs = state_dict()
    model = weights.from_torch(theirs, image_shape=(8, 10, 3))
    back = weights.to_torch(model)
    assert list(back) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array)


def test_names_of_a_network_that_trained_on_several_gpus_are_taken():
    model = weights.from_torch(state_dict(prefix="module."), image_shape=(8, 10, 3))
    assert model.image_shape == (8, 10, 3)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs PyTorch, the extra torch")


def test_a_tensor_of_pytorch_is_taken(torch):
    theirs = {n: torch.from_numpy(a).requires_grad_() for n, a in state_dict().items()}
    back = weights.to_torch(weights.from_torch(theirs, image_shape=(8, 10, 3)))
    np.testing.assert_array_equal(back["conv1.bias"], theirs["conv1.bias"].detach())


@pytest.mark.parametrize("file", ["net.safetensors", "net.pt", "net.pth", "net.pkl"])
def test_a_file_of_pytorch_is_read(tmp_path, request, file):
    theirs = state_dict((9, 9, 1))
    if file.endswith("safetensors"):
        save_file(theirs, tmp_path / file)
    else:
        torch = request.getfixturevalue("torch")
        torch.save({n: torch.from_numpy(a) for n, a in theirs.items()}, tmp_path / file)
    model, expected = weights.load(tmp_path / file), weights.from_torch(theirs)
    assert model.classes.routings == 3
    for ours, their in zip(outputs(model)[1], outputs(expected)[1], strict=True):
        np.testing.assert_array_equal(ours, their)
    assert weights.describe(tmp_path / file) is None


def test_a_file_of_pytorch_does_not_say_that_its_images_are_no_squares(tmp_path):
    save_file(state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match="give image_shape"):
        weights.load(tmp_path / "net.safetensors")
    model = weights.load(tmp_path / "net.safetensors", image_shape=(8, 10, 3), routings=2)
    assert (model.image_shape, model.classes.routings) == ((8, 10, 3), 2)


class Hostile:
    """Unpickled by Python, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("saved_by", ["pickle", "torch"])
def test_a_hostile_pickle_runs_nothing(tmp_path, torch, saved_by):
    trap = Hostile(tmp_path / "trapped")
    pickle.loads(pickle.dumps(trap))
    (tmp_path / "trapped").unlink()  # it does work
    content = {n: torch.from_numpy(a) for n, a in state_dict().items()} | {"conv1.bias": trap}
    if saved_by == "torch":
        torch.save(content, tmp_path / "net.pkl")
    else:
        (tmp_path / "net.pkl").write_bytes(pickle.dumps(trap))
    with pytest.raises(WeightsError, match=r"net\.pkl is refused: .* more than weights"):
        weights.load(tmp_path / "net.pkl")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", ["cut short", "empty", "a list", "text"])
def test_a_pickle_without_sound_weights_is_refused_in_words(tmp_path, torch, content):
    path = tmp_path / "net.pt"
    torch.save({n: torch.from_numpy(a) for n, a in state_dict().items()}, path)
    if content == "a list":
        torch.save([torch.zeros(3)], path)
    else:
        part = {"cut short": path.read_bytes()[:-100], "empty": b"", "text": b"no pickle"}
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


@pytest.mark.parametrize(
    ("change", "shape", "words"),
    [
        ({"conv1.bias": None}, (8, 10, 3), "missing: .'conv1.bias'"),
        ({"extra": np.zeros(1)}, (8, 10, 3), "left over: .'extra'"),
        ({"conv1.weight": np.zeros((4, 3, 3))}, (8, 10, 3), "conv1.weight with 4 axes"),
        ({"conv1.bias": np.zeros(5)}, (8, 10, 3), "conv1.bias is .4. here and .5. there"),
        ({}, (8, 8, 3), "no image of"),
        ({}, None, "give image_shape"),
        ({}, (8, 30), "give image_shape"),
        ({}, (1, 80, 3), "no network has this architecture"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, shape, words):
    theirs = {n: a for n, a in {**state_dict(), **change}.items() if a is not None}
    with pytest.raises(WeightsError, match=words):
        weights.from_torch(theirs, image_shape=shape)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({}, "only grouping='flat'"),
        ({"grouping": "flat", "routing_bias": True}, "only routing_bias=False"),
        ({"grouping": "flat", "primary_coupling": 0.5}, "only primary_coupling=1.0"),
        ({"grouping": "flat", "stop_gradient": False}, "only stop_gradient=True"),
        ({"grouping": "flat", "hidden": (5,)}, "2 hidden layers"),
    ],
)
def test_a_network_that_pytorch_has_no_place_for_is_refused(architecture, words):
    with pytest.raises(WeightsError, match=words):
        weights.to_torch(network(**architecture))


PROGRAM = """
import sys
import jax, numpy as np
function = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
images = np.load(sys.argv[2])
results = function.call(images)
assert not [name for name in sys.modules if name.startswith(("capsjax", "flax"))]
np.savez(sys.argv[3], *results)
print(function.platforms)
"""


def test_an_exported_network_runs_without_capsjax_on_any_number_of_images(tmp_path):
    model = tiny.model()
    weights.export(model, tmp_path / "net.jax")
    for number in (1, 5):
        images, expected = outputs(model, number)
        np.save(tmp_path / "images.npy", images)
        paths = [str(tmp_path / name) for name in ("net.jax", "images.npy", "results.npz")]
        command = [sys.executable, "-c", PROGRAM, *paths]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "('cpu', 'cuda', 'tpu')\n"
        with np.load(tmp_path / "results.npz") as results:
            for ours, theirs in zip(results.values(), expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_an_export_is_for_the_platforms_that_are_asked_for(tmp_path):
    weights.export(tiny.model(), tmp_path / "net.jax", platforms=("cpu",))
    function = jax.export.deserialize(bytearray((tmp_path / "net.jax").read_bytes()))
    assert function.platforms == ("cpu",)
    assert function.call(jnp.zeros((1, *tiny.IMAGE)))[1].shape == (1, tiny.CLASSES)
