"""--routing and --network: both are chosen by their names."""

import pytest
from flax import nnx

import capsjax
from capsjax import SelfAttention, Uniform, weights
from hooks import after_step, kill
from tiny_run import EXPERIMENT, STEPS, have_same_bits, read_arrays, read_json, run_command

pytestmark = pytest.mark.slow


def test_the_routing_that_is_asked_for_is_trained_and_tested(trained, base, tmp_path):
    run = trained(routing="uniform")
    config = read_json(run.folder)
    assert config["network"]["routing"] == {"name": "uniform"}
    assert config["settings"]["recipe"]["routing"] == "uniform"
    assert config["settings"]["recipe"]["routings"] is None
    assert weights.load(run.folder / "weights.safetensors").config.routing == Uniform()
    for source in (run.folder, run.folder / "weights.safetensors"):
        flags = {"data_dir": base["data_dir"]} if source.is_file() else {}
        tested = run_command(testing=True, weights=source, save_dir=tmp_path, **flags)
        assert tested.out.splitlines()[-1] == run.out.splitlines()[-1]


def test_a_run_with_another_routing_goes_on_and_begins_another(trained, start, tmp_path):
    with after_step(STEPS + 1, kill), pytest.raises(MemoryError):
        start(routing="self_attention", checkpoint_steps=1)
    other = run_command(resume=tmp_path / "run", routing="uniform")
    assert "was trained with self_attention" in other.err
    resumed = run_command(resume=tmp_path / "run", routing="self_attention")
    assert resumed.status == 0, resumed.err
    whole = trained(routing="self_attention", checkpoint_steps=1)
    assert have_same_bits(read_arrays(resumed.folder), read_arrays(whole.folder))
    again = start("again", weights=tmp_path / "run", epochs=1)
    assert again.drawn[0].config.routing == SelfAttention()


def test_the_routing_that_a_preset_has_keeps_its_options(start):
    named = start(routing="agreement", preset="paper", epochs=1)
    assert named.drawn[0].config.routing.bias
    assert not named.drawn[0].config.routing.stop_gradient


@pytest.mark.parametrize(
    ("network", "kind", "pictures"),
    [
        pytest.param(
            "efficient",
            capsjax.EfficientCapsNet,
            {"capsules.png", "reconstructions.png", "perturbations.png"},
            marks=pytest.mark.slow,
        ),
        pytest.param("matrix", capsjax.MatrixCapsNet, {"capsules.png"}, marks=pytest.mark.slow),
        ("cnn", capsjax.CNN, set()),
    ],
)
def test_a_network_brings_its_preset_and_does_all_that_the_others_do(
    trained, base, tmp_path, network, kind, pictures
):
    run = trained(network=network)
    config = read_json(run.folder)
    assert config["network"]["name"] == config["settings"]["recipe"]["preset"] == network
    assert config["settings"]["training"]["average"] == 0.999
    for source in (run.folder, run.folder / "weights.safetensors"):
        flags = {"data_dir": base["data_dir"]} if source.is_file() else {}
        save_dir = tmp_path / source.stem
        tested = run_command(testing=True, weights=source, save_dir=save_dir, **flags)
        assert tested.out.splitlines()[-1] == run.out.splitlines()[-1]
    flags = {"save_dir": tmp_path / "run", "checkpoint_steps": 1}
    with after_step(STEPS + 1, kill), pytest.raises(MemoryError):
        run_command(preset=network, **base, **flags)
    other = run_command(resume=tmp_path / "run", network="capsnet")
    assert f"is {network}" in other.err
    resumed = run_command(resume=tmp_path / "run", network=network, pictures=True)
    assert resumed.out.splitlines()[-1] == run.out.splitlines()[-1]
    assert have_same_bits(read_arrays(resumed.folder), read_arrays(run.folder))
    drawn = {path.name for path in resumed.folder.glob("*.png")}
    assert drawn == {"curves.png", "errors.png"} | pictures
    loaded = weights.load(resumed.folder / "weights.safetensors")
    assert isinstance(loaded, kind)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"network": "best"},
            "--network must be 'capsnet' or 'efficient' or 'matrix' or 'cnn', got 'best'",
        ),
        (
            {"network": "matrix", "routing": "uniform"},
            "--routing uniform does not route the capsules of the network matrix",
        ),
        (
            {"routing": "em"},
            "--routing em does not route the capsules of the network capsnet",
        ),
        (
            {"network": "cnn", "routings": 3},
            "--routings 3: the network cnn takes no routing; leave",
        ),
        ({"network": "cnn", "routing": "uniform"}, "the network cnn takes no routing"),
        ({"network": "efficient", "preset": "best"}, "--network efficient, but the network of --p"),
        (
            {"routing": "best"},
            "--routing is one of agreement, uniform, random, self_attention, em, got",
        ),
        (
            {"routing": "uniform", "routings": 3},
            "--routings 3: the routing uniform has no iterations; leave --routings out",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(start, flags, words):
    refused = start(**flags)
    assert refused.status == 2
    assert words in refused.err
    assert not refused.folder.exists()


def test_a_file_without_notes_tells_the_preset_by_its_network(start, tmp_path):
    config = EXPERIMENT.presets["efficient"].network
    net = config.build((10, 10, 1), 10, rngs=nnx.Rngs(0))
    weights.save(net, tmp_path / "net.safetensors")
    run = start(weights=tmp_path / "net.safetensors", epochs=1)
    assert read_json(run.folder)["settings"]["recipe"]["preset"] == "efficient"


def test_a_file_of_another_network_is_refused_in_words(plain, start):
    refused = start(weights=plain.folder / "weights.safetensors", network="efficient")
    assert refused.status == 2
    assert "--network efficient, but the network of --preset seed is capsnet" in refused.err


@pytest.mark.parametrize("testing", [False, True])
@pytest.mark.parametrize("source", [".", "weights.safetensors"])
def test_weights_of_another_routing_are_refused_in_words(plain, start, source, testing):
    flags = {"routing": "uniform", "routings": "None"} | ({"testing": True} if testing else {})
    refused = start(weights=plain.folder / source, **flags)
    assert refused.status == 2
    assert "--routing uniform: the network of" in refused.err
    assert "was trained with agreement" in refused.err
