"""The votes of pose matrices, against products in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsjax
from capsjax import MatrixVotes

J, N, SIDE = 3, 5, 2


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def draw(rng, lead=(), dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    shapes = (*lead, N, SIDE**2), (J, N, SIDE, SIDE), (N, SIDE**2)
    poses, weight, offset = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return poses, weight, offset


def multiply(poses, weight, offset) -> np.ndarray:
    """Makes the votes of one example; a pose is a matrix, column by column."""
    votes = np.zeros((J, N, SIDE**2))
    for j, i in np.ndindex(J, N):
        matrix = float64(poses[i]).reshape(SIDE, SIDE).T @ float64(weight[j, i])
        votes[j, i] = matrix.T.ravel() + float64(offset[i])
    return votes


def test_votes_are_products_of_matrices(rng, lead, dtype, call):
    poses, weight, offset = draw(rng, lead, dtype)
    votes = call(lambda poses: jnp.asarray(MatrixVotes(poses, weight, offset)), poses)
    assert votes.shape == MatrixVotes(poses, weight, offset).shape == (*lead, J, N, SIDE**2)
    for at in np.ndindex(lead):
        expected = multiply(poses[at], weight, offset)
        np.testing.assert_allclose(float64(votes[at]), expected, rtol=1e-5, atol=1e-5)


def test_sums_agreements_and_their_gradients_are_those_of_the_array(rng):
    poses, weight, offset = draw(rng, (2, 3))
    couplings = jnp.asarray(rng.uniform(size=(2, 3, J, N)), jnp.float32)
    vectors = jnp.asarray(rng.normal(size=(2, 3, J, SIDE**2)), jnp.float32)

    def use(votes):
        return votes.weighted_sum(couplings), votes.agreement(vectors), votes.weighted_sum()

    def use_array(votes):
        votes = jnp.asarray(votes)
        weighted = jnp.sum(couplings[..., None] * votes, -2)
        return weighted, jnp.sum(votes * vectors[..., None, :], -1), jnp.sum(votes, -2)

    def total(use):
        @jax.jit
        def differentiate(*arrays):
            loss = lambda *a: sum(jnp.sum(jnp.sin(x)) for x in use(MatrixVotes(*a)))  # noqa: E731
            return use(MatrixVotes(*arrays)), jax.grad(loss, (0, 1, 2))(*arrays)

        return differentiate(poses, weight, offset)

    pairs = zip(*map(jax.tree.leaves, (total(use), total(use_array))), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_em_routing_takes_votes_that_are_never_made(rng):
    votes = MatrixVotes(*draw(rng, (2,)))
    activations = jnp.asarray(rng.uniform(0.1, 1, (2, N)), jnp.float32)
    beta = {"beta_u": jnp.zeros(J), "beta_a": jnp.zeros(J)}
    route = jax.jit(lambda votes: capsjax.em_routing(votes, activations, **beta))
    np.testing.assert_allclose(np.asarray(votes), jnp.asarray(votes))
    for found, expected in zip(route(votes), route(jnp.asarray(votes)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("poses", "weight", "offset", "words"),
    [
        ((N, 5), (J, N, 2, 2), None, "d being a square number, got"),
        ((4,), (J, N, 2, 2), None, r"poses \[\.\.\., i, d\]"),
        ((N, 4), (J, N + 1, 2, 2), None, r"weight \[j, i, √d, √d\] = \[j, 5, 2, 2\]"),
        ((N, 4), (J, N, 4), None, r"got \[3, 5, 4\]"),
        ((N, 4), (J, N, 2, 2), (N, 2), r"offset \[i, d\] = \[5, 4\], got \[5, 2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_words(poses, weight, offset, words):
    with pytest.raises(ValueError, match=words):
        MatrixVotes(
            np.zeros(poses, np.float32),
            np.zeros(weight, np.float32),
            None if offset is None else np.zeros(offset, np.float32),
        )
