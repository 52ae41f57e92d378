"""Windows: which capsules each holds, and what those that overlap tell each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsjax

# Windows that overlap, that touch, that leave gaps, and one that leaves a row over. Each compiles.
windows = pytest.mark.parametrize(("size", "strides"), [(3, 1), (2, 2), (1, 3), (2, 3), (3, 2)])


def count(positions: int, size: int, strides: int) -> int:
    return (positions - size) // strides + 1


@windows
def test_a_window_holds_the_capsules_of_its_positions_row_by_row(size, strides, rng):
    u = rng.normal(size=(2, 6, 4, 2, 3)).astype(np.float32)
    found = capsjax.extract_windows(u, size, strides)
    shape = count(6, size, strides), count(4, size, strides)
    assert found.shape == (2, *shape, size * size * 2, 3)
    for n, y, x in np.ndindex(2, *shape):
        at = strides * y, strides * x
        expected = u[n, at[0] : at[0] + size, at[1] : at[1] + size].reshape(-1, 3)
        np.testing.assert_array_equal(found[n, y, x], expected)


@windows
@pytest.mark.parametrize("scale", [0, 1, 1e3])
def test_the_sum_over_windows_is_that_over_all_that_hold_the_capsule(size, strides, scale, rng):
    rows, columns, i = 6, 4, 2
    shape = count(rows, size, strides), count(columns, size, strides)
    logs = (scale * rng.normal(size=(*shape, size * size * i))).astype(np.float32)
    sums = np.full((rows, columns, i), -np.inf)
    places = [
        (strides * y + p, strides * x + q)
        for y, x, p, q in itertools.product(*map(range, (*shape, size, size)))
    ]
    flat = logs.astype(np.float64).reshape(-1, i)
    for place, log in zip(places, flat, strict=True):
        sums[place] = np.logaddexp(sums[place], log)
    found = capsjax.logsumexp_over_windows(logs, size, strides)
    expected = np.stack([sums[place] for place in places]).reshape(logs.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_sum_is_the_share_of_each_window(rng):
    logs = jnp.asarray(rng.normal(size=(2, 2, 9)), jnp.float32)
    told = lambda logs: capsjax.logsumexp_over_windows(logs, 3)[0, 0, 4]  # noqa: E731  of (1, 1)
    gradient = jax.jit(jax.grad(told))(logs)
    # Four windows of 3 × 3 hold position (1, 1): at (1, 1), (1, 0), (0, 1) and (0, 0) of each.
    holders = {(0, 0, 4), (0, 1, 3), (1, 0, 1), (1, 1, 0)}
    values = np.array([logs[at] for at in sorted(holders)], np.float64)
    shares = np.exp(values) / np.exp(values).sum()
    for at in np.ndindex(2, 2, 9):
        expected = shares[sorted(holders).index(at)] if at in holders else 0
        np.testing.assert_allclose(gradient[at], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "size", "strides", "words"),
    [
        ((3, 3, 2), 1, 1, r"capsules \[\.\.\., y, x, i, k\], got \[3, 3, 2\]"),
        ((3, 3, 2, 4), 4, 1, "windows of 4 × 4 with a stride of 1 do not fit into 3 × 3"),
        ((3, 3, 2, 4), 0, 1, "windows of 0 × 0"),
        ((3, 3, 2, 4), 1, 0, "a stride of 0"),
    ],
)
def test_windows_that_do_not_fit_are_refused_in_words(shape, size, strides, words):
    with pytest.raises(ValueError, match=words):
        capsjax.extract_windows(np.zeros(shape, np.float32), size, strides)


@pytest.mark.parametrize(("shape", "size"), [((2, 2, 8), 3), ((9,), 3), ((2, 2, 9), 0)])
def test_logarithms_that_are_not_of_windows_are_refused_in_words(shape, size):
    with pytest.raises(ValueError, match="logsumexp_over_windows: expected logs"):
        capsjax.logsumexp_over_windows(np.zeros(shape, np.float32), size)
