"""The README tells the truth: its code runs, its flags and files exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

import ablation
import affnist
import benchmark
import capsjax
import draw
import mnist
import multi_mnist
import perturb
import small_norb
from capsjax.run import Experiment, main
from data_files import digits, write_npz

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
FUNCTIONS, NETWORK, OWN_ROUTING, OWN_NETWORK = BLOCKS


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    """What a block registers is forgotten after its test."""
    monkeypatch.setattr(capsjax, "ROUTINGS", dict(capsjax.ROUTINGS))
    monkeypatch.setattr(capsjax, "NETWORKS", dict(capsjax.NETWORKS))


def run(block: str) -> dict:
    """Runs a block of code as a module that is imported, and returns its names."""
    names: dict = {"__name__": "block"}
    exec(block, names)
    return names


@pytest.mark.parametrize("block", [FUNCTIONS, NETWORK], ids=["functions", "network"])
def test_a_block_of_python_runs_and_its_shapes_are_as_its_comments_say(block):
    names = run(block)
    for name, shape in re.findall(r"^(\w+) = .*#.*= (\[[\d, ]+\])$", block, re.MULTILINE):
        assert str(list(names[name].shape)) == shape, name


def test_the_first_block_tells_three_shapes():
    assert len(re.findall(r"= \[[\d, ]+\]$", FUNCTIONS, re.MULTILINE)) == 3


def test_a_routing_of_ones_own_routes():
    names = run(OWN_ROUTING)
    layer = capsjax.nn.DenseCaps(5, 2, 3, 4, names["MeanRouting"](), rngs=nnx.Rngs(0))
    u = jnp.ones((5, 2))
    expected = capsjax.squash(capsjax.predictions(u, layer.weight[...]).mean(-2))
    assert jnp.allclose(layer(u), expected)
    assert capsjax.predict(names["net"], jnp.zeros((28, 28))).scores.shape == (10,)


@pytest.mark.slow
def test_a_network_of_ones_own_trains_from_the_command_line(tmp_path, capsys):
    small = run(OWN_NETWORK)["SMALL"]
    data = write_npz(tmp_path / "digits.npz", digits(40, 20))
    flags = {"data-dir": data, "epochs": 1, "batch-size": 20, "save-dir": tmp_path / "run"}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    main(small, words)
    assert re.search(r"test error: \d+\.\d\d % \(\d+ of 20\)", capsys.readouterr().out)


def test_every_command_names_a_file_and_flags_that_exist():
    flags = {
        "mnist.py": list_flags(mnist.MNIST),
        "multi_mnist.py": list_flags(multi_mnist.MULTI_MNIST),
        "affnist.py": list_flags(affnist.AFFNIST),
        "small_norb.py": list_flags(small_norb.SMALL_NORB),
        "ablation.py": [field.name for field in dataclasses.fields(ablation.Ablation)],
        "draw.py": [field.name for field in dataclasses.fields(draw.Draw)],
        "benchmark.py": [field.name for field in dataclasses.fields(benchmark.Benchmark)],
        "perturb.py": [field.name for field in dataclasses.fields(perturb.Perturb)],
        "table.py": [],
        "drawing/picture.py": [],
    }
    commands = re.findall(r"python experiments/([\w./]+)([^`#\n]*)", README)
    assert len(commands) > 5
    for script, rest in commands:
        assert script in flags
        words = shlex.split(rest.removesuffix("-->"))
        given = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
        assert set(given) <= {*flags[script], "help"}, (script, rest)


def list_flags(experiment: Experiment) -> list[str]:
    groups = filter(None, vars(experiment.settings()).values())
    return [field.name for group in groups for field in dataclasses.fields(group)]


def test_every_file_and_folder_of_the_tree_exists():
    (tree,) = re.findall(r"^capsjax/\n.*?^```", README, re.MULTILINE | re.DOTALL)
    named = re.findall(r"^  +((?:\w+(?:\.py|/) +)+)", tree, re.MULTILINE)
    paths = [name for names in named for name in names.split()]
    assert len(paths) > 14
    for path in paths:
        assert (ROOT / "capsjax" / path).exists(), path
    (listed,) = re.findall(r"^experiments/ (.*?)^tests/", README, re.MULTILINE | re.DOTALL)
    scripts = re.findall(r"\w+\.py", listed)
    assert sorted(scripts) == sorted(path.name for path in (ROOT / "experiments").glob("*.py"))


def test_every_linked_file_exists():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert len(links) > 4
    for link in links:
        assert (ROOT / link).is_file(), link


@pytest.mark.slow
def test_a_picture_of_perturbations_is_drawn(tmp_path, monkeypatch, capsys):
    net = capsjax.CapsNet(channels=4, types=1, hidden=(8,), rngs=nnx.Rngs(0))
    capsjax.weights.save(net, tmp_path / "net.safetensors")
    out = tmp_path / "perturb.png"
    monkeypatch.setattr(
        "sys.argv", ["perturb.py", str(tmp_path / "net.safetensors"), "--out", str(out)]
    )
    perturb.main()
    assert out.stat().st_size > 1000
    for flags, words in (("--images 10000", "from 0 to 9999"), ("--out none/a.png", "a folder")):
        monkeypatch.setattr("sys.argv", ["perturb.py", *flags.split()])
        with pytest.raises(SystemExit):
            perturb.main()
        assert words in capsys.readouterr().err
