"""Gives every test eight CPU devices, a home of its own, and errors for rank promotion."""

import os

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


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    """Hides what the user keeps at home."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(home / "tensorflow_datasets"))


@pytest.fixture
def rng() -> np.random.Generator:
    """Makes random numbers, the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture(params=[jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    """Returns a float dtype."""
    return request.param


# Not all pairs, since each is compiled.
FORMS = [("eager", (3, 2)), ("jit", ()), ("jit", (2,)), ("jit", (3, 2)), ("vmap", (3, 2))]


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0]}-{len(form[1])}-leading-axes")
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
