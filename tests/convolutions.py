"""Convolutions to try, and what they are by definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from capsjax._conv import conv

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

# Images, kernel, strides. The Toom-Cook algorithm convolves these, in one tile or in several.
TOOM_COOK = {
    "primary capsules": ((2, 20, 20, 16), (9, 9, 16, 64), (2, 2)),
    "odd sizes and channels": ((3, 27, 21, 33), (11, 7, 33, 67), (2, 1)),
    "several tiles": ((2, 25, 21, 32), (5, 6, 32, 65), (1, 1)),
    "stride 3": ((1, 38, 41, 8), (17, 14, 8, 64), (3, 3)),
    "a long kernel": ((1, 32, 18, 64), (30, 9, 64, 64), (1, 1)),
    "no images": ((0, 16, 16, 64), (5, 5, 64, 64), (1, 1)),
}
# The platform's own convolution is as good for these.
NATIVE = {
    "small kernel": ((2, 13, 12, 17), (3, 3, 17, 33), (1, 1)),
    "small kernel, stride 2": ((2, 14, 13, 16), (3, 3, 16, 5), (2, 2)),
    "more columns than rows": ((2, 7, 9, 16), (2, 5, 16, 3), (1, 1)),
    "more taps than shifts": ((2, 9, 8, 16), (6, 3, 16, 3), (1, 1)),
    "a row of taps": ((1, 4, 9, 16), (1, 3, 16, 2), (3, 1)),
    "no images of many channels": ((0, 9, 9, 16), (3, 3, 16, 4), (1, 1)),
}
# Patches times kernel convolve these.
PATCHES = {
    "one channel": ((2, 14, 12, 1), (9, 7, 1, 5), (1, 1)),
    "few channels": ((2, 13, 17, 3), (5, 4, 3, 4), (2, 3)),
    "taps as large as the image": ((3, 5, 4, 2), (5, 4, 2, 3), (1, 1)),
    "one tap": ((2, 5, 6, 64), (1, 1, 64, 64), (2, 1)),
    "no images of few channels": ((0, 5, 6, 2), (3, 3, 2, 3), (1, 1)),
}


@st.composite
def sizes(draw):
    """Draws images, kernel and strides of any size; the kernel fits into the images."""
    kernel = [draw(st.integers(1, 11)) for _ in range(2)]
    image = [taps + draw(st.integers(0, 12)) for taps in kernel]
    strides = tuple(draw(st.integers(1, 3)) for _ in range(2))
    channels = draw(st.sampled_from([(1, 3), (7, 65), (16, 64), (65, 64), (64, 1)]))
    batch = draw(st.integers(0, 3))
    return (batch, *image, channels[0]), (*kernel, *channels), strides


def sample(image, kernel, strides, dtype=jnp.float32, seed=0):
    """Draws images, kernel, bias and a cotangent of the outputs."""
    rng = np.random.default_rng(seed)
    size = [(n - k) // s + 1 for n, k, s in zip(image[-3:-1], kernel[:2], strides, strict=True)]
    shapes = image, kernel, kernel[3:], (*image[:-3], *size, kernel[3])
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(strides, x, w, b, dy):
    y, gradients = jax.vjp(functools.partial(conv, strides=strides), x, w, b)
    return y, *gradients(dy)


def definition(strides, x, w, b, dy):
    """Sums over the taps in float64; returns outputs, dx, dw and db."""
    x, w, b, dy = (np.asarray(a).astype(np.float64) for a in (x, w, b, dy))
    y, dx, dw = np.zeros(dy.shape) + b, np.zeros(x.shape), np.zeros(w.shape)
    for p, q in np.ndindex(w.shape[:2]):
        rows, columns = (
            slice(tap, tap + n * s, s)
            for tap, n, s in zip((p, q), dy.shape[1:3], strides, strict=True)
        )
        seen = np.s_[:, rows, columns]
        y += x[seen] @ w[p, q]
        dx[seen] += dy @ w[p, q].T
        dw[p, q] = np.einsum("bhwc,bhwo->co", x[seen], dy)
    return y, dx, dw, dy.sum((0, 1, 2))


def error(actual, expected) -> float:
    """Returns the norm of the difference, relative to the expected norm."""
    actual, expected = (np.asarray(a).astype(np.float64) for a in (actual, expected))
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        assert error(a, b) < tolerance


def platform_conv(strides, x, w, b):
    """Convolves as a user of `jax.lax` does."""
    y = jax.lax.conv_general_dilated(
        x, w, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + jnp.broadcast_to(b, y.shape)


def second_derivative(convolve, x, w, b):
    """Returns the gradient, by the images, of the square of the gradient by the kernel."""
    dw = jax.grad(lambda w, x: jnp.sum(convolve(x, w, b) ** 2))
    return jax.jit(jax.grad(lambda x: jnp.sum(dw(w, x) ** 2)))(x)
