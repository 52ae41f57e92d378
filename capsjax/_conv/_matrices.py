"""The three Toom-Cook matrices of a tile, and the interpolation points that they rest on."""

import functools
import math

import numpy as np

# The real points, and the least number of complex pairs. Each further real point saves products
# and costs digits: with these, CapsNet's second convolution has a relative error of 4e-6 in float32
# and 6e-3 in bfloat16.
POINTS = {
    "float32": ((0, math.inf, 1, -1, 1.8, -1.8, 0.55, -0.55), 0),
    "bfloat16": ((0, math.inf, 0.75, -0.75, 1.33, -1.33), 1),
}
# In longer polynomials the highest powers of points beyond 1 dominate all others.
MAX_TAPS = 30


@functools.cache
def build_matrices(
    outputs: int, taps: int, real: tuple[float, ...], pairs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns A, B, C of y = A [(B x) · (C w)] for a tile of `outputs` outputs."""
    points = _choose_points(outputs + taps - 1, real, pairs)
    # One of two conjugate points is enough, since y is real.
    kept = [i for i, p in enumerate(points) if p.imag >= 0]
    # B is interpolation transposed, and interpolation is the inverse of evaluation.
    B = np.linalg.inv(_compute_powers(points, len(points))).T[kept]
    C, A = _compute_powers(points, taps)[kept], _compute_powers(points, outputs)[kept]
    # Rows of one length in B and in C: all values have a similar size, so that small ones do not
    # underflow. The powers of 1.8 reach 1e7, and B holds their inverses.
    B_norms, C_norms = (np.linalg.norm(m, axis=1, keepdims=True) for m in (B, C))
    A, B, C = A * B_norms * C_norms, B / B_norms, C / C_norms
    products = [
        product
        for i, a, b, c in zip(kept, A, B, C, strict=True)
        for product in (
            _expand_complex_product(2 * a, b, c) if points[i].imag else [(a.real, b.real, c.real)]
        )
    ]
    A, B, C = (np.array(m, np.float32) for m in zip(*products, strict=True))
    return A.T, B, C


def _choose_points(n: int, real: tuple[float, ...], pairs: int) -> list[complex]:
    """Returns n points: real ones as far as they go, the others in pairs on the unit circle."""
    pairs = min(n // 2, max(pairs, -(-(n - len(real)) // 2)))
    circle = np.exp(1j * math.pi * np.arange(1, pairs + 1) / (pairs + 1))
    return [complex(p) for p in (*real[: n - 2 * pairs], *circle, *circle.conj())]


def _compute_powers(points, n):
    """Returns p^0 … p^(n-1) of each point p, [points, n]; of ∞ only the highest power counts."""
    return np.array([np.eye(n)[-1] if math.isinf(p.real) else p ** np.arange(n) for p in points])


def _expand_complex_product(a, b, c):
    """Writes Re(a (b x) (c w)) as three real products (Gauss)."""
    return [
        (a.real + a.imag, b.real, c.real),
        (a.imag - a.real, b.imag, c.imag),
        (-a.imag, b.real + b.imag, c.real + c.imag),
    ]
