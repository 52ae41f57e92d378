"""Layers of poses and activations: the paper's loops, the competition of positions, memory."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
import reference_poses as reference
from capsjax import EM, Capsules, MatrixVotes
from capsjax.nn import ConvEMCaps, EMCaps, PrimaryEMCaps

N, J, D = 2, 3, 4  # types of input and output capsules, numbers of a pose


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def draw(rng, *lead: int, types: int = N, dim: int = D) -> Capsules:
    """Draws poses and activations."""
    poses = jnp.asarray(rng.normal(size=(*lead, types, dim)), jnp.float32)
    return Capsules(poses, jnp.asarray(rng.uniform(0.1, 1, size=(*lead, types)), jnp.float32))


def apply(layer, capsules):
    """Calls a layer jitted: op by op, it compiles every operation."""
    graphdef, params = nnx.split(layer)
    return jax.jit(lambda params, capsules: nnx.merge(graphdef, params)(capsules))(params, capsules)


def make(kind: Any, *types: int, **options: Any):
    """Makes a layer whose β differ from type to type."""
    options = {"side": 2, "routing": EM(3, inverse_temperature=0.05), **options}
    layer = kind(*types, rngs=nnx.Rngs(0), **options)
    beta = jnp.linspace(-0.5, 0.5, types[1])
    layer.beta_u[...], layer.beta_a[...] = beta, 2 * beta
    return layer


def route_in_loops(layer, poses, activations, size, strides):
    """Routes one example by the paper's loops, with the parameters of a layer."""
    weight, beta_u, beta_a = (float64(p[...]) for p in (layer.weight, layer.beta_u, layer.beta_a))
    mass = 100 * len(weight) / (size * size * poses.shape[-2])
    routing = layer.routing
    return reference.conv_em_routing(
        *(float64(poses), float64(activations), weight, size, strides, beta_u, 100 * beta_a),
        *(routing.iterations, routing.inverse_temperature, 1e-4, mass),
    )


@pytest.mark.parametrize(("size", "strides"), [(2, 1), (3, 2), (1, 2)])
def test_a_layer_equals_the_papers_loops(rng, size, strides):
    layer = make(ConvEMCaps, N, J, kernel_size=size, strides=strides)
    inputs = draw(rng, 2, 4, 6)  # of 6 columns, windows of 3 with a stride of 2 leave one out
    poses, activations = apply(layer, inputs)
    for n in range(2):
        expected = route_in_loops(layer, inputs.poses[n], inputs.activations[n], size, strides)
        np.testing.assert_allclose(poses[n], expected[0], rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(activations[n], expected[1], rtol=2e-3)


@pytest.mark.slow
def test_a_child_shares_itself_out_whole_among_the_parents_that_see_it(rng):
    size, strides, inputs = 3, 2, draw(rng, 2, 7, 6)
    cut = partial(capsjax.extract_windows, size=size, strides=strides)
    weight = jnp.asarray(rng.normal(size=(J, size * size * N, 2, 2)), jnp.float32)
    state = jax.jit(
        partial(
            capsjax.em_routing,
            beta_u=jnp.zeros(J),
            beta_a=jnp.zeros(J),
            over_windows=partial(capsjax.logsumexp_over_windows, size=size, strides=strides),
        )
    )(MatrixVotes(cut(inputs.poses), weight), cut(inputs.activations[..., None])[..., 0])
    sums = np.zeros((2, 7, 6, N))
    shares = float64(state.responsibilities).reshape(2, 3, 2, J, size, size, N)
    for y, x, p, q in itertools.product(range(3), range(2), range(size), range(size)):
        sums[:, strides * y + p, strides * x + q] += shares[:, y, x, :, p, q].sum(1)
    np.testing.assert_allclose(sums[:, :, :5], 1, rtol=1e-5)
    assert not sums[:, :, 5].any()  # no window sees the last column


@pytest.mark.slow
def test_with_windows_of_one_position_a_layer_is_em_at_each_of_them(rng):
    layer, inputs = make(ConvEMCaps, N, J, kernel_size=1), draw(rng, 2, 3, 2)
    poses, activations = apply(layer, inputs)
    betas = {"beta_u": layer.beta_u[...], "beta_a": 100 * layer.beta_a[...]}
    for y, x in itertools.product(range(3), range(2)):
        votes = MatrixVotes(inputs.poses[:, y, x], layer.weight[...])
        state = layer.routing(jnp.asarray(votes), inputs.activations[:, y, x], **betas)
        np.testing.assert_allclose(poses[:, y, x], state.poses, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(activations[:, y, x], state.activations, rtol=1e-4)


def test_the_order_of_types_does_not_matter(rng):
    layer, inputs = make(ConvEMCaps, N, J), draw(rng, 5, 4)
    i, j = np.array([1, 0]), rng.permutation(J)
    mixed = make(ConvEMCaps, N, J)
    weight = layer.weight[...].reshape(J, 9, N, 2, 2)[j][:, :, i]
    mixed.weight[...] = weight.reshape(J, 9 * N, 2, 2)
    for name in ("beta_u", "beta_a"):
        getattr(mixed, name)[...] = getattr(layer, name)[...][j]
    poses, activations = apply(layer, inputs)
    outputs = apply(mixed, Capsules(inputs.poses[..., i, :], inputs.activations[..., i]))
    np.testing.assert_allclose(outputs.poses, poses[..., j, :], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(outputs.activations, activations[..., j], rtol=1e-4)


def test_a_shift_of_the_input_by_a_stride_shifts_the_output_far_from_the_border(rng):
    layer = make(ConvEMCaps, N, J, strides=2, routing=EM(2))
    inputs = draw(rng, 17, 5)
    part = lambda n: jax.tree.map(lambda x: x[n : n + 15], inputs)  # noqa: E731
    (here, _), (there, _) = (apply(layer, part(n)) for n in (0, 2))
    # At first a border leaves the outermost row's inputs fewer parents; after a second iteration
    # the next row, which competes with it, differs as well.
    np.testing.assert_allclose(here[3:5], there[2:4], rtol=1e-4, atol=1e-5)
    assert np.abs(here[5] - there[4]).max() > 1e-3


def test_class_capsules_share_matrices_and_know_where_a_vote_comes_from(rng):
    layer, inputs = make(EMCaps, N, J, routing=EM(1)), draw(rng, 2, 3, 2)
    poses, _ = apply(layer, inputs)
    weight = float64(layer.weight[...])
    expected = np.zeros((2, J, D))
    for n, y, x, i, j in np.ndindex(2, 3, 2, N, J):
        matrix = float64(inputs.poses[n, y, x, i]).reshape(2, 2).T @ weight[j, i]
        matrix[:, 1] += [(y + 0.5) / 3, (x + 0.5) / 2]  # the right-hand column
        expected[n, j] += float64(inputs.activations[n, y, x, i]) * matrix.T.ravel()
    expected /= float64(inputs.activations).sum((1, 2, 3))[:, None, None]
    np.testing.assert_allclose(poses, expected, rtol=1e-4, atol=1e-6)


def test_primary_capsules_are_linear_in_the_channels(rng):
    layer = PrimaryEMCaps(5, N, D, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    poses, activations = layer(x)
    flat = float64(x) @ float64(layer.poses[...])
    np.testing.assert_allclose(poses, flat.reshape(2, 3, 4, N, D), rtol=1e-4, atol=1e-5)
    logits = float64(x) @ float64(layer.activations[...])
    np.testing.assert_allclose(activations, 1 / (1 + np.exp(-logits)), rtol=1e-4, atol=1e-6)
    pixels = jnp.asarray(10 * x, jnp.int32)
    for of_integers, of_floats in zip(layer(pixels), layer(jnp.float32(pixels)), strict=True):
        np.testing.assert_array_equal(of_integers, of_floats)


def test_layers_keep_bfloat16_poses_and_float32_activations(rng):
    layer, inputs = make(ConvEMCaps, N, J), draw(rng, 4, 4)
    outputs = apply(layer, inputs._replace(poses=inputs.poses.astype(jnp.bfloat16)))
    assert (outputs.poses.dtype, outputs.activations.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(outputs.activations, apply(layer, inputs).activations, rtol=0.05)


@pytest.mark.slow
def test_gradients_are_finite_at_equal_votes_and_extreme_activations():
    layer = make(ConvEMCaps, N, J, kernel_size=2)
    graphdef, params = nnx.split(layer)

    @jax.jit
    def differentiate(params, capsules):
        def total(params, capsules):
            outputs = nnx.merge(graphdef, params)(capsules)
            return sum(jnp.sum(jnp.sin(output)) for output in outputs)

        return jax.value_and_grad(total, (0, 1))(params, capsules)

    for value, active in itertools.product([0.0, 1.0, 1e3], [0.0, 1.0, 1e-30]):
        capsules = Capsules(jnp.full((3, 3, N, D), value), jnp.full((3, 3, N), active))
        for leaf in jax.tree.leaves(differentiate(params, capsules)):
            assert np.isfinite(leaf).all(), (value, active)


@pytest.mark.slow
def test_memory_holds_the_votes_of_one_output_capsule():
    positions, types, outputs = 6, 4, 32
    layer = nnx.eval_shape(lambda: ConvEMCaps(types, outputs, routing=2, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(layer)
    shape = (16, positions + 2, positions + 2, types)
    capsules = Capsules(
        jax.ShapeDtypeStruct((*shape, 16), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    step = jax.grad(lambda params, x: nnx.merge(graphdef, params)(x).poses.sum(), (0, 1))
    memory: Any = jax.jit(step).lower(params, capsules).compile().memory_analysis()
    votes = 4 * 16 * positions**2 * outputs * 9 * types * 16  # as an array they take ten times that
    assert 0 < memory.temp_size_in_bytes < 0.7 * votes


@pytest.mark.parametrize("kind", [ConvEMCaps, EMCaps])
@pytest.mark.parametrize(
    "shapes", [((4, 4, N + 1, D), (4, 4, N + 1)), ((4, N, D), (4, N)), ((4, 4, N, D), (4, 4, J))]
)
def test_capsules_that_do_not_fit_are_refused_in_words(kind, shapes):
    words = rf"{kind.__name__}: expected poses \[\.\.\., y, x, {N}, {D}\].* got \[4, "
    with pytest.raises(ValueError, match=words):
        make(kind, N, J)(Capsules(*map(jnp.ones, shapes)))


def test_settings_without_sense_are_refused_in_words():
    with pytest.raises(ValueError, match="EMCaps: side is 2 or more, for two coordinates, got 1"):
        EMCaps(N, J, side=1, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="inverse_temperature is a number above 0 and finite, got nan"
    ):
        EM(inverse_temperature=float("nan"))
    with pytest.raises(ValueError, match="inverse_temperature is a number above 0 and finite"):
        EM(inverse_temperature=float("inf"))
    with pytest.raises(ValueError, match="EM: iterations is an int of 1 or more, got 0"):
        EM(0)
