import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import capsjax
import capsjax.run
import capsjax.viz

FUNCTIONS = {
    "length": "(x, axis=-1, *, keepdims=False)",
    "squash": "(s, axis=-1)",
    "squash_exp": "(s, axis=-1)",
    "primary_capsules": ("(x, kernel, bias, *, dim, strides=2, grouping='channels', coupling=1.0)"),
    "predictions": "(u, weight)",
    "dense_capsules": f"(u, weight, routing={capsjax.routing!r}, **options)",
    "routing": "(votes, routings=3, *, bias=None, leak=False, stop_gradient=True)",
    "routing_state": "(votes, routings=3, *, bias=None, leak=False, stop_gradient=True)",
    "uniform_routing": "(votes, *, bias=None)",
    "random_routing": "(key, votes, *, bias=None)",
    "self_attention_routing": "(votes, *, bias=None)",
    "attention_routing": "(votes, routings=2, *, scale=None, offset=None)",
    "em_routing": (
        "(votes, activations, *, beta_u, beta_a, routings=3, inverse_temperature=0.01, "
        "min_variance=0.0001, mass=None, over_windows=None)"
    ),
    "variational_routing": (
        "(votes, activations, *, routings=3, prior_counts=1.0, prior_mean_counts=1.0, "
        "prior_scale=1.0, over_windows=None)"
    ),
    "extract_windows": "(u, size, strides=1)",
    "logsumexp_over_windows": "(logs, size, strides=1)",
    "self_routing": "(votes, activations, logits)",
    "mask": "(capsules, labels=None)",
    "perturb": "(capsules, offsets)",
    "decode": "(params, x)",
    "margin_loss": "(lengths, labels, *, m_plus=0.9, m_minus=0.1, down_weight=0.5)",
    "spread_loss": "(activations, labels, margin)",
    "cross_entropy": "(logits, labels)",
    "reconstruction_loss": "(reconstruction, images)",
    "caps_loss": "(y_true, y_pred, x, x_recon, lam_recon)",
    "predict": "(model, images)",
}
MODULES = {
    capsjax.nn.PrimaryCaps: (
        "(self, in_channels, out_channels, dim_caps, *, kernel_size=9, strides=2, "
    ),
    capsjax.nn.DenseCaps: (
        "(self, in_num_caps, in_dim_caps, out_num_caps, out_dim_caps, routings=3, *, "
    ),
    capsjax.CapsNet: "(self, image_shape=(28, 28, 1), num_classes=10, routings=None, *, config=",
}
TUPLES = {
    capsjax.RoutingState: ("logits", "couplings", "capsules"),
    capsjax.Capsules: ("poses", "activations"),
    capsjax.EMState: ("poses", "activations", "variances", "responsibilities"),
    capsjax.VariationalState: ("poses", "evidence", "responsibilities"),
    capsjax.Output: ("scores", "capsules", "reconstruction"),
    capsjax.Prediction: ("predicted", "scores", "reconstruction"),
}
DIAGNOSTICS = {
    "dead": "(activations, *, threshold=0.01)",
    "score_histogram": "(scores, labels, *, bins=50)",
    "active": "(couplings)",
    "coupling_entropy": "(couplings)",
    "bonding": "(couplings)",
    "dynamics": "(couplings)",
    "observe": "(model, images)",
    "diagnose": "(model, images, labels, *, batch_size=50)",
}
PUBLIC = {
    **{name: getattr(capsjax, name) for name in FUNCTIONS},
    **{module.__name__: module for module in MODULES},
    "load": capsjax.data.load,
    **{name: getattr(capsjax.weights, name) for name in ("save", "from_torch", "export")},
    **{name: getattr(capsjax.diagnostics, name) for name in DIAGNOSTICS},
}


def signature(function) -> str:
    """The signature without its types."""
    bare = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in bare.parameters.values()]
    return str(bare.replace(parameters=parameters, return_annotation=empty))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_called_as_the_design_says(name):
    assert isinstance(getattr(capsjax, name), FunctionType)
    assert signature(getattr(capsjax, name)) == FUNCTIONS[name]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_module_is_made_as_the_design_says(module):
    made = signature(module.__init__)
    assert made.startswith(MODULES[module])
    assert ", rngs" in made


@pytest.mark.parametrize("result", TUPLES, ids=lambda result: result.__name__)
def test_a_result_has_the_fields_that_the_design_says(result):
    assert result._fields == TUPLES[result]


def test_data_load_takes_a_name_and_a_folder():
    assert signature(capsjax.data.load).startswith("(name='mnist', data_dir=None")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("save", "(model, path, notes=None, *, dtype='float32')"),
        ("describe", "(path)"),
        ("load", "(path, *, image_shape=None, routings=None)"),
        ("from_torch", "(state_dict, *, image_shape=None, routings=3)"),
        ("to_torch", "(model)"),
        ("export", "(model, path, platforms=('cpu', 'cuda', 'tpu'))"),
    ],
)
def test_weights_go_in_and_out_as_the_design_says(name, parameters):
    assert signature(getattr(capsjax.weights, name)) == parameters


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_a_diagnostic_is_called_in_this_way(name):
    assert signature(getattr(capsjax.diagnostics, name)) == DIAGNOSTICS[name]


def test_the_public_names_are_these_and_there():
    names = {"Agreement", "CapsNet", "NETWORKS", "Network", "ROUTINGS", "Routing", "data", "tasks"}
    assert names | {*FUNCTIONS} <= set(capsjax.__all__)
    assert all(hasattr(capsjax, name) for name in capsjax.__all__)


@pytest.mark.parametrize(
    "package", [capsjax, capsjax.data, capsjax.diagnostics, capsjax.run, capsjax.viz]
)
def test_no_public_module_has_the_name_of_a_function(package):
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    functions = {
        name for name in package.__all__ if isinstance(getattr(package, name), FunctionType)
    }
    assert functions
    assert not modules & functions


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_has_a_docstring_with_an_example(name):
    text = inspect.getdoc(PUBLIC[name])
    assert text
    assert "Args:" in text
    assert ">>>" in text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_returns_and_raises(name):
    text = inspect.getdoc(getattr(capsjax, name))
    assert text
    assert "Returns:" in text
    assert "Raises:" in text


@pytest.mark.parametrize("result", TUPLES, ids=lambda result: result.__name__)
def test_a_result_has_a_docstring_of_its_own(result):
    assert result.__doc__
    assert not result.__doc__.startswith(f"{result.__name__}(")  # what NamedTuple writes


def test_importing_capsjax_loads_nothing_heavy():
    heavy = ["tensorflow", "tensorflow_datasets", "matplotlib", "orbax", "capsjax.run"]
    program = f"import sys, capsjax; print([m for m in {heavy} if m in sys.modules])"
    folder = Path(capsjax.__path__[0]).parent
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
