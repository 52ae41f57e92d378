"""One network in one file: what `save` writes, `load` and `describe` read."""

import dataclasses
import json
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import capsjax
import tiny
from capsjax import Agreement, weights
from capsjax.networks import CapsNetConfig
from capsjax.weights import WeightsError

IMAGE = (8, 10, 3)
SIZES: dict[str, Any] = {
    "kernel_size": 3,
    "channels": 4,
    "types": 2,
    "dim_primary": 4,
    "hidden": (6, 5),
}


def make_network(image_shape=IMAGE, num_classes=3, **sizes):
    """Makes a small CapsNet."""
    config = CapsNetConfig(**{**SIZES, **sizes})
    return tiny.draw_arrays(
        lambda: config.build(image_shape, num_classes, rngs=nnx.Rngs(0)), scale=0.3
    )


def predict(model):
    """Predicts two random images: the images and the prediction."""
    images = np.random.default_rng(1).random((2, *model.image_shape)).astype(np.float32)
    return images, capsjax.predict(model, images)


def assert_same_network(ours, theirs) -> None:
    """Asserts that two networks have one graph and give the same bits, and ours evaluates."""
    theirs = nnx.clone(theirs)
    theirs.eval()
    assert nnx.split(ours)[0] == nnx.split(theirs)[0]
    chex.assert_trees_all_equal(weights.arrays_of(ours), weights.arrays_of(theirs))


NETWORKS: dict[str, dict[str, Any]] = {
    "as tiny": {},
    "paper": {
        "primary_coupling": 0.5,
        "routing": Agreement(2, bias=True, stop_gradient=False),
        "init": "truncated_normal",
    },
    "flat, deep": {"grouping": "flat", "hidden": (7, 6, 5)},
    "no hidden layer": {"hidden": ()},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_alone_rebuilds_the_network_to_the_bit(tmp_path, name):
    model = make_network(**NETWORKS[name])
    weights.save(model, tmp_path / "net.safetensors")
    assert_same_network(weights.load(tmp_path / "net.safetensors"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def read_entry(path):
    with safe_open(path, "numpy") as file:
        assert list(file.metadata()) == ["capsjax"]
        return json.loads(file.metadata()["capsjax"])


@pytest.mark.parametrize("preset", ["seed", "paper"])
def test_the_metadata_hold_name_config_image_shape_class_count_and_notes(tmp_path, preset):
    config: Any = capsjax.presets.PRESETS[preset].network
    config = dataclasses.replace(config, **SIZES)
    net = tiny.draw_arrays(lambda: config.build((17, 18, 1), 2, rngs=nnx.Rngs(0)))
    notes = {"preset": preset, "test error": 0.25, "files": ["ü", None]}
    weights.save(net, tmp_path / "net.safetensors", notes)
    entry = read_entry(tmp_path / "net.safetensors")
    assert isinstance(entry.pop("crc32"), int)
    of_paper = preset == "paper"
    routing = {"iterations": 3, "bias": of_paper, "leak": False, "stop_gradient": not of_paper}
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert entry == {
        "version": 2,
        "network": {
            "name": "capsnet",
            **sizes,
            "hidden": [6, 5],
            "routing": {"name": "agreement", **routing},
        },
        "image_shape": [17, 18, 1],
        "num_classes": 2,
        "notes": notes,
    }


def test_the_description_of_a_file_is_what_save_was_given(tmp_path):
    model, notes = make_network(types=3), {"preset": "seed", "error": 0.01}
    weights.save(model, tmp_path / "net.safetensors", notes)
    assert weights.describe(tmp_path / "net.safetensors") == (model.config, IMAGE, 3, notes)
    weights.save(model, tmp_path / "net.safetensors")
    about = weights.describe(tmp_path / "net.safetensors")
    assert about is not None
    assert about.notes == {}


def test_the_same_network_makes_the_same_file(tmp_path):
    for name in ("a", "b"):
        weights.save(make_network(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def rewrite(path, **changes) -> None:
    """Changes entries of a file, or removes them by None, with a checksum that fits."""
    arrays = load_file(path)
    about = {**read_entry(path), **changes, "crc32": None}
    about = {name: value for name, value in about.items() if value is not None}
    entry = json.dumps({**about, "crc32": weights._digest(arrays, about)})
    save_file(arrays, path, {"capsjax": entry})


def test_notes_are_read_back_as_json_has_them(tmp_path):
    path = tmp_path / "net.safetensors"
    weights.save(make_network(), path, {"error by epoch": {9: 0.1, 10: 0.2}, "shape": (3, 4)})
    assert_same_network(weights.load(path), make_network())
    notes = {"error by epoch": {"9": 0.1, "10": 0.2}, "shape": [3, 4]}
    about: Any = weights.describe(path)
    assert about.notes == notes


def test_sizes_of_numpy_are_saved_as_integers(tmp_path):
    model = make_network(types=np.int64(2), hidden=np.array([6, 5]))
    weights.save(model, tmp_path / "net.safetensors")
    about: Any = weights.describe(tmp_path / "net.safetensors")
    assert about.config == make_network().config


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "bogus"])
def test_a_dtype_that_cannot_hold_the_weights_is_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"dtype is float32 or float16, got '{dtype}'"):
        weights.save(make_network(), tmp_path / "net.safetensors", dtype=dtype)
    assert not any(tmp_path.iterdir())


def test_an_ensemble_is_no_network_of_one_file(tmp_path):
    ensemble = capsjax.networks.Ensemble([make_network()])
    with pytest.raises(TypeError, match="the members are saved one by one"):
        weights.save(ensemble, tmp_path / "net.safetensors")


def test_a_file_of_a_later_version_says_that_capsjax_is_to_be_updated(tmp_path):
    path = tmp_path / "net.safetensors"
    weights.save(make_network(), path)
    rewrite(path, version=3)
    message = "is of version 3, this capsjax reads version 2: update capsjax"
    with pytest.raises(WeightsError, match=message):
        weights.load(path)


def test_a_file_of_version_1_says_that_it_is_to_be_written_again(tmp_path):
    path = tmp_path / "net.safetensors"
    weights.save(make_network(), path)
    architecture = {"image_shape": [8, 10, 3], "classes": 3, "routings": 3, "channels": 4}
    changes = dict.fromkeys(("network", "image_shape", "num_classes", "notes"))
    rewrite(path, version=1, preset="seed", architecture=architecture, **changes)
    assert read_entry(path).keys() == {"version", "preset", "architecture", "crc32"}
    message = r"net\.safetensors is of version 1, this capsjax reads version 2: write it again"
    with pytest.raises(WeightsError, match=message):
        weights.load(path)
    assert weights.describe(path) is None


@dataclasses.dataclass(frozen=True)
class ScaledRouting:
    """A routing of one's own: the scaled sum of the votes, weighted by a bias [j, i]."""

    name: ClassVar[str] = "scaled"
    scale: float = 1.0
    exponents: tuple[tuple[int, int], ...] = ((1, 2),)

    def initial_bias(self, j, i, d):
        return jnp.full((j, i), 0.1)

    def __call__(self, u, weight, bias=None):
        u_hat = capsjax.predictions(u, weight)
        return capsjax.squash(self.scale * jnp.einsum("...jid,ji->...jd", u_hat, bias))


def test_a_routing_of_ones_own_is_read_by_its_name(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    model = make_network(routing=ScaledRouting(2.5, ((3, 4), (5, 6))))
    weights.save(model, path)
    with pytest.raises(WeightsError, match=r"expected one of agreement, .*, got 'scaled'"):
        weights.load(path)
    assert weights.describe(path) is None
    monkeypatch.setitem(capsjax.ROUTINGS, "scaled", ScaledRouting)
    assert_same_network(weights.load(path), model)
    about: Any = weights.describe(path)
    assert about.config.routing == ScaledRouting(2.5, ((3, 4), (5, 6)))


def test_a_network_of_ones_own_is_read_by_its_name(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    weights.save(tiny.make_normalised(), path)
    with pytest.raises(WeightsError, match=r"net\.safetensors holds .* got 'normalised'; import"):
        weights.load(path)
    monkeypatch.setitem(capsjax.NETWORKS, "normalised", tiny.NormalisedConfig)
    assert_same_network(weights.load(path), tiny.make_normalised())


@dataclasses.dataclass(frozen=True)
class LaterConfig(CapsNetConfig):
    """The config of a later version, with a field that this one does not have."""

    later: bool = False


@dataclasses.dataclass(frozen=True)
class LaterAgreement(Agreement):
    """The routing of a later version."""

    later: bool = False


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LaterConfig(**SIZES), "capsnet has other fields: .*'later'"),
        (CapsNetConfig(**SIZES, routing=LaterAgreement()), "agreement has other fields: .*'later'"),
    ],
    ids=["config", "routing"],
)
def test_a_field_that_is_not_known_is_an_error_in_words(tmp_path, config, message):
    model = tiny.draw_arrays(lambda: config.build(IMAGE, 3, rngs=nnx.Rngs(0)))
    weights.save(model, tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match=rf"net\.safetensors holds a network .*{message}"):
        weights.load(tmp_path / "net.safetensors")


def test_a_config_out_of_range_is_an_error_in_words(tmp_path):
    path = tmp_path / "net.safetensors"
    weights.save(make_network(), path)
    rewrite(path, network={**read_entry(path)["network"], "types": 0})
    with pytest.raises(WeightsError, match="sizes are integers of 1 or more, got types = 0"):
        weights.load(path)
    weights.save(make_network(), path)
    rewrite(path, image_shape=[4, 4, 3])
    with pytest.raises(WeightsError, match=r"no network has these sizes: .*at least 5×5"):
        weights.load(path)


@pytest.mark.parametrize("name", ["network", "image_shape", "num_classes", "notes"])
def test_a_file_without_one_of_the_entries_is_an_error_in_words(tmp_path, name):
    path = tmp_path / "net.safetensors"
    weights.save(make_network(), path)
    rewrite(path, **{name: None})
    with pytest.raises(WeightsError, match=rf"net\.safetensors holds a network .*'{name}'"):
        weights.load(path)


def test_any_flipped_bit_is_found(tmp_path):
    path = tmp_path / "net.safetensors"
    weights.save(make_network(), path, {"preset": "seed"})
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for position in [*rng.permutation(len(content))[:60], 0, 8, 40, len(content) - 1]:
        altered = bytearray(content)
        altered[position] ^= 1 << rng.integers(8)
        path.write_bytes(altered)
        with pytest.raises(WeightsError, match=r"net\.safetensors"):
            weights.load(path)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_found(tmp_path, length):
    path = tmp_path / "net.safetensors"
    weights.save(make_network(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match="is no safetensors file, or damaged"):
        weights.load(path)


def test_another_dtype_in_the_header_is_found(tmp_path):
    path = tmp_path / "net.safetensors"
    weights.save(make_network(), path)
    path.write_bytes(path.read_bytes().replace(b"F32", b"I32", 1))
    with pytest.raises(WeightsError, match="was altered"):
        weights.load(path)


def test_a_file_that_cannot_be_written_is_an_os_error_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        weights.save(make_network(), tmp_path / "folder")
    with pytest.raises(OSError, match="none"):
        weights.save(make_network(), tmp_path / "none" / "net.safetensors")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_a_bfloat16_network_is_saved_in_float32(tmp_path):
    graphdef, params = nnx.split(make_network())
    low = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    weights.save(low, tmp_path / "net.safetensors")
    for ours, theirs in zip(
        jax.tree.leaves(nnx.split(weights.load(tmp_path / "net.safetensors"))[1]),
        jax.tree.leaves(nnx.split(low)[1]),
        strict=True,
    ):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, theirs.astype(jnp.float32))


def test_float16_halves_the_file_and_rounds_to_11_bits(tmp_path):
    net = make_network()
    weights.save(net, tmp_path / "whole")
    weights.save(net, tmp_path / "half", dtype="float16")
    ours, half = weights.arrays_of(net), weights.arrays_of(weights.load(tmp_path / "half"))
    for name, array in ours.items():
        assert load_file(tmp_path / "half")[name].dtype == np.float16
        assert half[name].dtype == np.float32
        np.testing.assert_allclose(half[name], array, rtol=2**-11, atol=2**-25)
    sizes = [sum(a.nbytes for a in load_file(tmp_path / n).values()) for n in ("whole", "half")]
    assert sizes[0] == 2 * sizes[1]


def test_a_number_beyond_float16_is_refused_and_nothing_is_written(tmp_path):
    net = make_network()
    net.conv1.kernel[...] = net.conv1.kernel[...].at[0, 0, 0, 0].set(7e4)
    with pytest.raises(WeightsError, match=r"conv1\.kernel holds numbers beyond .* float16"):
        weights.save(net, tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_a_safetensors_file_of_another_origin_is_refused(tmp_path):
    save_file({"weight": np.zeros(3)}, tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match="was not written by capsjax"):
        weights.load(tmp_path / "net.safetensors")
    assert weights.describe(tmp_path / "net.safetensors") is None


def test_iterations_of_routing_may_differ_from_the_files(tmp_path):
    path = tmp_path / "net.safetensors"
    model = make_network(routing=Agreement(2, bias=True, stop_gradient=False))
    weights.save(model, path)
    for asked, expected in ((None, 2), (5, 5)):
        loaded: Any = weights.load(path, routings=asked)
        assert loaded.class_caps.routing == Agreement(expected, bias=True, stop_gradient=False)
    with pytest.raises(ValueError, match="int of 1 or more, got 0"):
        weights.load(path, routings=0)


@pytest.mark.parametrize("network", ["without routing", "with another routing"])
def test_iterations_of_a_network_that_has_none_are_refused(tmp_path, monkeypatch, network):
    path = tmp_path / "net.safetensors"
    monkeypatch.setitem(capsjax.NETWORKS, "normalised", tiny.NormalisedConfig)
    monkeypatch.setitem(capsjax.ROUTINGS, "scaled", ScaledRouting)
    without = network == "without routing"
    weights.save(tiny.make_normalised() if without else make_network(routing=ScaledRouting()), path)
    with pytest.raises(ValueError, match=r"--routings 5: the .*(takes no routing|no iterations)"):
        weights.load(path, routings=5)


def test_the_folder_of_a_run_is_refused_and_its_file_named(tmp_path):
    with pytest.raises(OSError, match=r"is a folder; give a file, such as .*/weights\.safetensors"):
        weights.load(tmp_path)
    assert weights.describe(tmp_path) is None


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="none"):
        weights.load(tmp_path / "none.safetensors")
    assert weights.describe(tmp_path / "none.safetensors") is None
