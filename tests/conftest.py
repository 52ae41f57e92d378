"""Gives every test eight CPU devices, a home of its own, and errors for rank promotion."""

import itertools
import os
import re

# Before jax starts. Tests compare with float64 and place arrays on eight devices: a CPU's work.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most programs are compiled to run a few times on a few numbers.
jax.config.update("jax_disable_most_optimizations", True)

# The first example of a shape compiles: no deadline. The same examples on every machine.
hypothesis.settings.register_profile(
    "capsjax",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("capsjax")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """Makes a folder of this session, the same in every worker."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _matplotlib_folder(shared_folder):
    """Gives all tests and their processes one folder, in which matplotlib lists the fonts once."""
    os.environ["MPLCONFIGDIR"] = str(shared_folder / "matplotlib")


@pytest.fixture(scope="session", autouse=True)
def _compiled_programs(shared_folder):
    """Keeps what took long to compile for tests of the same shapes in other files."""
    jax.config.update("jax_compilation_cache_dir", str(shared_folder / "compiled"))
    jax.config.update("jax_compilation_cache_max_size", 2**32)  # with a limit JAX locks the cache
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_collection_modifyitems(items):
    """Makes long tests of the examples in docstrings, which run one operation after another."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def _homes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _home(_homes, monkeypatch):
    """Hides what the user keeps at home."""
    home = next(_homes)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(home / "tensorflow_datasets"))


@pytest.fixture
def rng() -> np.random.Generator:
    """Makes random numbers, the same in every run."""
    return np.random.default_rng(0)


# Not all combinations, since each is compiled.
FORMS = [("eager", (3, 2)), ("jit", ()), ("jit", (2,)), ("jit", (3, 2)), ("vmap", (3, 2))]


def pytest_generate_tests(metafunc):
    """Tests each form in float32 and one of them in bfloat16; without forms, both dtypes."""
    marks = metafunc.definition.iter_markers("parametrize")
    given = {name for mark in marks for name in _split(mark.args[0])}
    names = [name for name in ("_form", "dtype") if name in {*metafunc.fixturenames} - given]
    cases = {
        "_form": [(form,) for form in FORMS],
        "dtype": [(jnp.float32,), (jnp.bfloat16,)],
        "_form dtype": [*((form, jnp.float32) for form in FORMS), (FORMS[3], jnp.bfloat16)],
    }
    if names:
        metafunc.parametrize(names, cases[" ".join(names)], ids=_name, indirect=True)


def _split(names) -> list[str]:
    return re.findall(r"\w+", names) if isinstance(names, str) else list(names)


def _name(value) -> str:
    if isinstance(value, tuple):
        return f"{value[0]}-{len(value[1])}-leading-axes"
    return value.__name__


@pytest.fixture
def dtype(request):
    """Returns a float dtype."""
    return request.param


@pytest.fixture
def _form(request):
    return request.param


@pytest.fixture
def lead(_form) -> tuple[int, ...]:
    """Returns the leading axes."""
    return _form[1]


@pytest.fixture
def call(_form):
    """Calls a function, plain, jitted or mapped, on arrays that all begin with the axes `lead`."""
    how, _ = _form
    transform = {"eager": lambda f: f, "jit": jax.jit, "vmap": lambda f: jax.jit(jax.vmap(f))}[how]
    return lambda function, *arrays: transform(function)(*arrays)
