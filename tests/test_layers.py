"""Who may import whom: a room imports only rooms that stand above it in the list."""

import ast
import sys
from pathlib import Path

import pytest

import capsjax

PACKAGE = Path(capsjax.__path__[0])
EXPERIMENTS = PACKAGE.parent / "experiments"
# A room is a file or a sub-package of capsjax; those on one line may not import each other.
ORDER = [
    {"_files", "_labels", "_host_memory", "_pixels", "_relu", "_trees", "_vectors"},
    {"_conv", "_windows"},
    {"_decoder", "_losses", "_primary"},
    {"_routing", "data", "sharding"},
    {"nn"},
    {"networks"},
    {"diagnostics", "presets", "tasks"},
    {"viz"},
    {"train", "_torch"},
    {"checkpoint", "weights"},
    {"_pretrained"},
    {"__init__"},
    {"run"},
    {"experiments"},
]
FLOOR = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
MATHEMATICS = [
    *("_conv", "_decoder", "_labels", "_losses", "_pixels", "_primary", "_relu", "_routing"),
    *("_vectors", "_windows"),
]


def find_room(file: Path) -> str:
    """Returns the room in which a file stands."""
    if file.is_relative_to(EXPERIMENTS):
        return "experiments"
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def list_imports(file: Path) -> set[str]:
    """Returns the dotted names that a file imports, inside functions as well."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def list_rooms(file: Path) -> set[str]:
    """Returns the rooms of capsjax that a file imports; `import capsjax` is its __init__."""
    rooms = set()
    for root, *rest in (name.split(".") for name in list_imports(file)):
        if root == "capsjax":
            rooms.add(rest[0] if rest and rest[0] in FLOOR else "__init__")
    return rooms


FILES = sorted([*PACKAGE.rglob("*.py"), *EXPERIMENTS.rglob("*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE.parent)))
def test_a_file_imports_only_what_stands_above_its_room(file):
    room = find_room(file)
    for imported in list_rooms(file) - {room}:
        assert FLOOR[imported] < FLOOR[room], f"{room} imports {imported}"


def test_every_room_has_its_place_in_the_order():
    assert {find_room(file) for file in FILES} == set(FLOOR)


@pytest.mark.parametrize("room", MATHEMATICS)
def test_the_mathematics_needs_only_jax_and_numpy(room):
    files = [file for file in FILES if find_room(file) == room]
    assert files
    for file in files:
        roots = {name.split(".")[0] for name in list_imports(file)}
        assert roots <= {"capsjax", "jax", "numpy", *sys.stdlib_module_names}, file


def test_only_the_checkpoints_import_orbax():
    users = {find_room(f) for f in FILES if any(n.startswith("orbax") for n in list_imports(f))}
    assert users == {"checkpoint"}
