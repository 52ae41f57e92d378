"""Valid convolution that is fast on the platform it is lowered for.

On a GPU or a TPU that is the platform's own convolution. XLA's on a CPU is slow, its weight gradient
above all, so there a convolution becomes matrix products. The direct way takes the patches under the
kernel as one matrix and the kernel as the other. Where it needs far fewer multiplications, the
convolution of polynomials is used instead (Toom 1963, Cook 1966; Winograd 1980):

- With stride s, output h reads the inputs s h + p. The taps p = s i + phase of one phase meet the
  inputs of the same phase only, so the phases become channels of a convolution with stride 1:
  9x9 taps with stride 2 on 20x20x256 are 5x5 taps on 10x10x1024, the last ones zero.
- Along one axis, 6 outputs from 5 taps read 10 inputs. Multiplying a polynomial of 5 coefficients by
  one of 6 needs their values at 10 points only: evaluate, multiply value by value, interpolate. The
  transpose of that is the convolution, y = A [(B x) * (C w)]. Points at 0, infinity, +-1, +-1/2 and
  +-2 cost a product each. Ten such would cost digits, so two are the complex +-i, whose values are
  conjugate: one complex product, or three real ones (Gauss). 11 products replace 6 * 5 = 30.
- Image and kernel have two axes, so A, B and C act on both: 11 * 11 products for each of 4 phases,
  484 for each pair of an input and an output channel, replace 36 * 81 = 2,916.

The products over channels are matrix products, one for each pair of points. All the rest is linear:
the gradients are the same products between the transposed transforms.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def conv(x: Array, kernel: Array, *, strides: int | tuple[int, int] = 1) -> Array:
    """Convolves images with a kernel, without padding.

    y[..., h, w, o] = Σ_{p,q,c} x[..., s h + p, s w + q, c] kernel[p, q, c, o]

    Args:
      x: images `[..., H, W, C]`, any number of leading axes.
      kernel: `[P, Q, C, O]`.
      strides: step between neighbouring outputs, one for both axes or (rows, columns).

    Returns:
      `[..., (H - P) // s + 1, (W - Q) // s + 1, O]` in the dtype of `x`; sums run in float32.

    Raises:
      ValueError: a shape or a stride does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> conv(jnp.ones((2, 28, 28, 1)), jnp.ones((9, 9, 1, 256))).shape
      (2, 20, 20, 256)
    """
    strides = (strides, strides) if isinstance(strides, int) else tuple(strides)
    _check(x.shape, kernel.shape, strides)
    lead, image = x.shape[:-3], x.shape[-3:]
    x = x.reshape(math.prod(lead), *image)
    y = _conv(strides, *_vary_alike(x, kernel.astype(x.dtype)))
    return y.reshape(*lead, *y.shape[1:])


def _check(x: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...]) -> None:
    if len(x) < 3:
        raise ValueError(f"x must be [..., H, W, C], got shape {x}")
    if len(kernel) != 4:
        raise ValueError(f"kernel must be [rows, columns, in, out], got shape {kernel}")
    if x[-1] != kernel[2]:
        raise ValueError(f"x {x} has {x[-1]} channels, kernel {kernel} reads {kernel[2]}")
    if kernel[0] > x[-3] or kernel[1] > x[-2] or min(kernel[:2]) < 1:
        raise ValueError(
            f"kernel of {kernel[0]}x{kernel[1]} does not fit into an image of {x[-3]}x{x[-2]}: "
            "take a smaller kernel or larger images"
        )
    if len(strides) != 2 or min(strides) < 1:
        raise ValueError(f"strides must be one or two integers >= 1, got {strides}")


def _vary_alike(x, w):
    """Inside shard_map: the gradient of what only one of the two is split along is then summed."""
    x_axes, w_axes = (jax.typeof(a).manual_axis_type.varying for a in (x, w))
    return (
        lax.pcast(x, tuple(w_axes - x_axes), to="varying"),
        lax.pcast(w, tuple(x_axes - w_axes), to="varying"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(strides, x, w):
    return lax.platform_dependent(
        x,
        w,
        cpu=functools.partial(_matrix_conv, strides),
        default=functools.partial(_platform_conv, strides),
    )


def _conv_fwd(strides, x, w):
    return _conv(strides, x, w), (x, w)


def _conv_bwd(strides, residuals, dy):
    # Inside the rule, for what is lowered for a GPU must hold nothing of the CPU's algorithm.
    return lax.platform_dependent(
        *residuals,
        dy,
        cpu=functools.partial(_matrix_conv_bwd, strides),
        default=lambda x, w, dy: jax.vjp(functools.partial(_platform_conv, strides), x, w)[1](dy),
    )


_conv.defvjp(_conv_fwd, _conv_bwd)


def _platform_conv(strides, x, w):
    return lax.conv_general_dilated(
        x, w, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _matrix_conv(strides, x, w):
    axes = _plan(x.shape[1:], w.shape, strides, x.dtype == jnp.float32)
    return _bilinear_conv(axes, x, w) if axes else _patches_conv(strides, x, w)


def _matrix_conv_bwd(strides, x, w, dy):
    axes = _plan(x.shape[1:], w.shape, strides, x.dtype == jnp.float32)
    return _bilinear_conv_bwd(axes, x, w, dy) if axes else _patches_conv_bwd(strides, x, w, dy)


# ---- patches times kernel ----


def _patches(strides, taps, x, at):
    """What each tap sees of x: [P, Q, B, H', W', C] at 0, [B, H', W', P, Q, C] at 3."""
    for axis in (1, 0):
        n, s = taps[axis], strides[axis]
        dim = axis + 1 if at else axis - 3
        length = (x.shape[dim] - n) // s * s + 1
        seen = [lax.slice_in_dim(x, i, i + length, s, axis=dim) for i in range(n)]
        x = jnp.stack(seen, at)
    return x


def _patches_conv(strides, x, w):
    patches = _patches(strides, w.shape[:2], x, 3)
    y = lax.dot_general(
        patches, w, (((3, 4, 5), (0, 1, 2)), ((), ())), preferred_element_type=jnp.float32
    )
    return y.astype(x.dtype)


def _patches_conv_bwd(strides, x, w, dy):
    patches = jnp.moveaxis(_patches(strides, w.shape[:2], x, 0), 5, 2)  # [P, Q, C, B, H', W']
    dw = lax.dot_general(
        patches, dy, (((3, 4, 5), (0, 1, 2)), ((), ())), preferred_element_type=jnp.float32
    )
    dpatches = lax.dot_general(
        dy, w, (((3,), (3,)), ((), ())), preferred_element_type=jnp.float32
    )
    _, scatter = jax.vjp(lambda x: _patches(strides, w.shape[:2], x, 3), x.astype(jnp.float32))
    (dx,) = scatter(dpatches)
    return dx.astype(x.dtype), dw.astype(w.dtype)


# ---- products of polynomials ----


class _Axis(NamedTuple):
    """How one axis is convolved: in `tiles` tiles of `outputs` outputs, each y = A [Bx * Cw]."""

    stride: int
    tiles: int
    A: np.ndarray  # [outputs, products]
    B: np.ndarray  # [products, inputs]
    C: np.ndarray  # [products, taps]


def _plan(image, kernel, strides, exact) -> tuple[_Axis, _Axis] | None:
    """The algorithms for rows and columns, None where patches times kernel is the faster way."""
    sizes = list(zip(image[:2], kernel[:2], strides, strict=True))
    rows, columns = (_axis(*size, n) for size, n in zip(sizes, (10, 8) if exact else (8, 6)))
    products = math.prod(axis.stride * axis.tiles * len(axis.B) for axis in (rows, columns))
    direct = math.prod(taps * ((size - taps) // stride + 1) for size, taps, stride in sizes)
    # The transforms' own work pays only where many channels share it.
    channels = min(rows.stride * columns.stride * kernel[2], kernel[3])
    return (rows, columns) if 2 * products <= direct and channels >= 64 else None


def _axis(size: int, taps: int, stride: int, real: int) -> _Axis:
    total, taps = (size - taps) // stride + 1, -(-taps // stride)
    axes = []
    for outputs in range(1, min(total, 8) + 1):
        axes.append(_Axis(stride, -(-total // outputs), *_toom_cook(outputs, taps, real)))
    return min(axes, key=lambda axis: axis.tiles * len(axis.B))


# The fewer are real, the more products, and the smaller the rounding errors.
_REAL_POINTS = {
    6: (0, math.inf, 0.75, -0.75, 1.33, -1.33),
    8: (0, math.inf, 1, -1, 1.8, -1.8, 0.55, -0.55),
    10: (0, math.inf, 0.8, -0.8, 1.25, -1.25, 0.42, -0.42, 2.4, -2.4),
}


@functools.cache
def _toom_cook(outputs: int, taps: int, real: int):
    """A, B, C with y = A [Bx * Cw] for `outputs` outputs of a convolution with `taps` taps."""
    points = _points(outputs + taps - 1, real)
    conjugates = [p.conjugate() for p in points if p.imag]
    # x -> Bx is the transpose of interpolation, so its matrix is the inverse transpose of evaluation.
    B = np.linalg.inv(_powers(points + conjugates, len(points + conjugates))).T[: len(points)]
    C, A = _powers(points, taps), _powers(points, outputs)
    # Rows of unit length: no digits are lost to one value's being larger than the others.
    B_scale, C_scale = (np.linalg.norm(m, axis=1, keepdims=True) for m in (B, C))
    rows = [
        row
        for point, a, b, c in zip(points, A * B_scale * C_scale, B / B_scale, C / C_scale)
        for row in (_gauss(2 * a, b, c) if point.imag else [(a.real, b.real, c.real)])
    ]
    A, B, C = (np.stack(m).astype(np.float32) for m in zip(*rows))
    return A.T, B, C


def _points(n: int, real: int) -> list[complex]:
    """n points, at most `real` of them real; of two conjugates the first only."""
    pairs = max(0, -(-(n - real) // 2))
    angles = math.pi * np.arange(1, pairs + 1) / (pairs + 1)
    return [complex(p) for p in (*_REAL_POINTS[real][: n - 2 * pairs], *np.exp(1j * angles))]


def _powers(points, n):
    """[points, n] of point^0 … point^(n-1); at infinity only the highest power counts."""
    return np.array([np.eye(n)[-1] if math.isinf(p.real) else p ** np.arange(n) for p in points])


def _gauss(a, b, c):
    """Re(a (b x) (c w)) by three real products."""
    return [
        (a.real + a.imag, b.real, c.real),
        (a.imag - a.real, b.imag, c.imag),
        (-a.imag, b.real + b.imag, c.real + c.imag),
    ]


def _bilinear_conv(axes, x, w):
    X, W = _values(axes, x, w)
    y = _transform([axis.A for axis in axes], _product(X, W, 2))
    return _join(axes, y, x.shape, w.shape).astype(x.dtype)


def _bilinear_conv_bwd(axes, x, w, dy):
    X, W = _values(axes, x, w)
    dY = _transform([axis.A.T for axis in axes], _split(axes, dy))  # [.., .., B', O]
    dX = _product(dY.astype(x.dtype), W, 3)
    # The left operand is contracted over its last axis: otherwise XLA leaves its fast products.
    dW = _product(dY.swapaxes(2, 3).astype(x.dtype), X, 2)  # [.., .., O, C']
    _, x_adjoint = jax.vjp(functools.partial(_tiles, axes), x.astype(jnp.float32))
    _, w_adjoint = jax.vjp(functools.partial(_taps, axes), w.astype(jnp.float32))
    (dx,) = x_adjoint(_transform([axis.B.T for axis in axes], dX))
    (dw,) = w_adjoint(_transform([axis.C.T for axis in axes], dW).swapaxes(2, 3))
    return dx.astype(x.dtype), dw.astype(w.dtype)


def _values(axes, x, w):
    """Image [rows, columns, B', C'] and kernel [rows, columns, C', O] at all pairs of points.

    B' counts the tiles of all images, C' the channels of all phases.
    """
    X = _transform([axis.B for axis in axes], _tiles(axes, x).astype(jnp.float32))
    W = _transform([axis.C for axis in axes], _taps(axes, w).astype(jnp.float32))
    return X.astype(x.dtype), W.astype(x.dtype)


def _product(left, right, axis):
    return lax.dot_general(
        left, right, (((3,), (axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )


def _transform(matrices, t):
    """[r, c, ...] -> [r', c', ...] by a matrix [r', r] for the rows, [c', c] for the columns."""
    rows, columns = matrices
    t = lax.dot_general(jnp.asarray(rows), t, (((1,), (0,)), ((), ())))
    columns = jnp.broadcast_to(columns, (len(rows), *columns.shape))
    return lax.dot_general(columns, t, (((2,), (1,)), ((0,), (0,))))


def _tiles(axes, x):
    """[B, H, W, C] -> [n, m, B', C']: the inputs of each tile, phases beside the channels."""
    rows, columns = axes
    x = _windows(x, 2, columns, columns.B.shape[1] * columns.stride, columns.stride)
    x = _windows(x, 1, rows, rows.B.shape[1] * rows.stride, rows.stride)
    B, S, n, s, T, m, t, C = x.shape
    return x.transpose(2, 5, 0, 1, 4, 3, 6, 7).reshape(n, m, B * S * T, s * t * C)


def _windows(x, axis, plan, length, phases):
    """Splits an axis into the overlapping tiles' `length` inputs, and those into phases."""
    step = plan.A.shape[0] * phases
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (0, (plan.tiles - 1) * step + length - x.shape[axis], 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), pads)
    tiles = [lax.slice_in_dim(x, i * step, i * step + length, axis=axis) for i in range(plan.tiles)]
    x = jnp.stack(tiles, axis)
    return x.reshape(*x.shape[: axis + 1], length // phases, phases, *x.shape[axis + 2 :])


def _taps(axes, w):
    """[P, Q, C, O] -> [p, q, C', O]: the taps of each phase, phases beside the channels."""
    (s, p), (t, q) = ((axis.stride, axis.C.shape[1]) for axis in axes)
    P, Q, C, O = w.shape
    w = jnp.pad(w, ((0, p * s - P), (0, q * t - Q), (0, 0), (0, 0)))
    return w.reshape(p, s, q, t, C, O).transpose(0, 2, 1, 3, 4, 5).reshape(p, q, s * t * C, O)


def _split(axes, dy):
    """[B, H', W', O] -> [h, w, B', O]: the outputs of each tile."""
    rows, columns = axes
    dy = _windows(dy, 2, columns, columns.A.shape[0], 1)
    dy = _windows(dy, 1, rows, rows.A.shape[0], 1)
    B, S, h, _, T, w, _, O = dy.shape
    return dy.transpose(2, 5, 0, 1, 4, 3, 6, 7).reshape(h, w, B * S * T, O).astype(jnp.float32)


def _join(axes, y, image, kernel):
    """[h, w, B', O] -> [B, H', W', O], the other way."""
    (h, w), (S, T), (s, t) = y.shape[:2], *(tuple(getattr(a, n) for a in axes) for n in ("tiles", "stride"))
    y = y.reshape(h, w, image[0], S, T, y.shape[3]).transpose(2, 3, 0, 4, 1, 5)
    y = y.reshape(image[0], S * h, T * w, y.shape[5])
    return y[:, : (image[1] - kernel[0]) // s + 1, : (image[2] - kernel[1]) // t + 1]
