"""What the README says runs, and is so."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import benchmark
from settings import Settings

README = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["functions", "network"])
def test_a_block_of_python_runs_and_its_shapes_are_as_its_comments_say(block):
    names: dict = {}
    exec(block, names)
    for name, shape in re.findall(r"^(\w+) = .*#.*= (\[[\d, ]+\])$", block, re.MULTILINE):
        assert str(list(names[name].shape)) == shape, name


def test_the_first_block_tells_three_shapes():
    assert len(re.findall(r"= \[[\d, ]+\]$", BLOCKS[0], re.MULTILINE)) == 3


def test_every_command_names_a_file_and_flags_that_are_there():
    flags = {
        "mnist.py": [f for g in dataclasses.fields(Settings) for f in group_fields(g)],
        "benchmark.py": [field.name for field in dataclasses.fields(benchmark.Benchmark)],
    }
    commands = re.findall(r"python experiments/([\w.]+)([^`#\n]*)", README)
    assert len(commands) > 5
    for script, rest in commands:
        assert script in flags
        given = [word[2:].replace("-", "_") for word in shlex.split(rest) if word.startswith("--")]
        assert set(given) <= {*flags[script], "help"}, (script, rest)


def group_fields(group: dataclasses.Field) -> list[str]:
    return [field.name for field in dataclasses.fields(group.default_factory)]


def test_every_file_of_the_tree_is_there():
    (tree,) = re.findall(r"^capsjax/\n.*?^```", README, re.MULTILINE | re.DOTALL)
    named = re.findall(r"^  +((?:\w+\.py +)+)", tree, re.MULTILINE)
    files = [name for names in named for name in names.split()]
    assert len(files) > 10
    for name in files:
        assert Path(__file__).parent.parent.joinpath("capsjax", name).is_file(), name
