"""Valid convolution that is fast on the platform it is lowered for.

On a GPU or a TPU that is the platform's own convolution. XLA's on a CPU is slow, its gradients
above all, so there a convolution becomes matrix products. The direct way takes the patches under
the kernel as one matrix and the kernel as the other. Where far fewer multiplications do, it is
a product of polynomials instead (Toom 1963, Cook 1966; for convolutions Winograd 1980):

- With stride s, output h reads the inputs s h + tap. The taps s i + phase meet inputs of the same
  phase only, so the phases become channels of a convolution with stride 1: 9×9 taps with stride 2
  on 20×20×256 are 5×5 taps on 10×10×1024, the last ones zero.
- Along one axis, 6 outputs of 5 taps read 10 inputs. A polynomial of 5 coefficients times one of 6
  is known by its values at 10 points: evaluate, multiply value by value, interpolate. Transposed,
  the three matrices give the convolution, y = A [(B x) · (C w)]: 10 products replace 6 · 5 = 30.
- Points are 0, ∞ (the highest coefficient) and pairs ±a. More than 8 real ones cost digits, so the
  last two are ±i. Their values are conjugates: one complex product, or three real ones (Gauss).
- 11 products along rows, 11 along columns and 4 phases make 484 for each pair of an input and an
  output channel. They replace 36 · 81 = 2,916.

What is left are matrix products over the channels, one for each pair of points, between cheap
linear maps. The gradients are the same with the maps transposed.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def conv(x: Array, kernel: Array, bias: Array, *, strides: int | tuple[int, int] = 1) -> Array:
    """Convolves images with a kernel, without padding, and adds a bias.

    y[..., h, w, o] = bias[o] + Σ_{p,q,c} x[..., s h + p, s w + q, c] kernel[p, q, c, o]

    Args:
      x: images `[..., H, W, C]`, any number of leading axes.
      kernel: `[P, Q, C, O]`.
      bias: `[O]`.
      strides: step between neighbouring outputs, one for both axes or (rows, columns).

    Returns:
      `[..., (H - P) // s + 1, (W - Q) // s + 1, O]` in the dtype of `x`; sums run in float32.

    Raises:
      ValueError: a shape or a stride does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> conv(jnp.ones((2, 28, 28, 1)), jnp.ones((9, 9, 1, 256)), jnp.zeros(256)).shape
      (2, 20, 20, 256)
    """
    steps = (strides, strides) if isinstance(strides, int) else tuple(strides)
    _check(x, kernel, bias, steps)
    lead, image = x.shape[:-3], x.shape[-3:]
    x = x.reshape(math.prod(lead), *image)
    y: Array = _conv(steps, *_vary_alike(x, kernel.astype(x.dtype), bias.astype(x.dtype)))
    return y.reshape(*lead, *y.shape[1:])


def _check(x, kernel, bias, strides) -> None:
    if x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floats [..., H, W, C], got {x.dtype} of shape {x.shape}")
    if kernel.ndim != 4:
        raise ValueError(f"kernel must be [rows, columns, in, out], got shape {kernel.shape}")
    if bias.shape != kernel.shape[3:]:
        raise ValueError(
            f"bias must be {list(kernel.shape[3:])} for a kernel of shape {list(kernel.shape)}, "
            f"got {list(bias.shape)}"
        )
    if x.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"x {x.shape} has {x.shape[-1]} channels, kernel {kernel.shape} reads {kernel.shape[2]}"
        )
    if not all(1 <= k <= n for k, n in zip(kernel.shape[:2], x.shape[-3:-1], strict=True)):
        raise ValueError(
            f"a kernel of {kernel.shape[0]}x{kernel.shape[1]} does not fit into images of "
            f"{x.shape[-3]}x{x.shape[-2]}: take a smaller kernel or larger images"
        )
    if len(strides) != 2 or min(strides) < 1:
        raise ValueError(f"strides must be one or two integers >= 1, got {strides}")


def _vary_alike(*arrays):
    """Inside shard_map: gradients of what is not split along an axis as others are get summed."""
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    every = frozenset().union(*axes)
    return [
        lax.pcast(array, tuple(every - varying), to="varying")
        for array, varying in zip(arrays, axes, strict=True)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(strides, x: Array, w: Array, b: Array) -> Array:
    return lax.platform_dependent(
        x,
        w,
        b,
        cpu=functools.partial(_matrix_conv, strides),
        default=functools.partial(_platform_conv, strides),
    )


def _conv_fwd(strides, x, w, b):
    return _conv(strides, x, w, b), (x, w, b)


def _conv_bwd(strides, residuals, dy):
    # Inside the rule, for what is lowered for a GPU must hold nothing of the CPU's algorithm.
    return lax.platform_dependent(
        *residuals,
        dy,
        cpu=functools.partial(_matrix_conv_bwd, strides),
        default=functools.partial(_platform_conv_bwd, strides),
    )


_conv.defvjp(_conv_fwd, _conv_bwd)


def _platform_conv(strides, x, w, b):
    y = lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + jnp.broadcast_to(b, y.shape)


def _platform_conv_bwd(strides, x, w, b, dy):
    return jax.vjp(functools.partial(_platform_conv, strides), x, w, b)[1](dy)


def _matrix_conv(strides, x, w, b):
    axes = _plan(x.shape[1:3], w.shape, strides, x.dtype.name)
    y = _toom_cook_conv(axes, x, w) if axes else _patches_conv(strides, x, w)
    return (y + jnp.broadcast_to(b, y.shape)).astype(x.dtype)


def _matrix_conv_bwd(strides, x, w, _, dy):
    axes = _plan(x.shape[1:3], w.shape, strides, x.dtype.name)
    bwd = _toom_cook_conv_bwd if axes else _patches_conv_bwd
    # As a matrix product: XLA's sum of bfloat16 over leading axes takes ten times as long.
    flat = dy.reshape(-1, dy.shape[3])
    db = _dot(jnp.ones(flat.shape[0], dy.dtype), flat, ((0,), (0,)))
    return *bwd(axes or strides, x, w, dy), db.astype(dy.dtype)


def _dot(left, right, contracted, batch=((), ())):
    sums = jnp.promote_types(left.dtype, jnp.float32)
    return lax.dot_general(left, right, (contracted, batch), preferred_element_type=sums)


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
    return _dot(patches, w, ((3, 4, 5), (0, 1, 2)))


def _patches_conv_bwd(strides, x, w, dy):
    patches = jnp.moveaxis(_patches(strides, w.shape[:2], x, 0), 5, 2)  # [P, Q, C, B, H', W']
    dw = _dot(patches, dy, ((3, 4, 5), (0, 1, 2)))
    dpatches = _dot(dy, w, ((3,), (3,)))  # [B, H', W', P, Q, C]
    _, adjoint = jax.vjp(lambda x: _patches(strides, w.shape[:2], x, 3), _wide(x))
    (dx,) = adjoint(dpatches)
    return dx.astype(x.dtype), dw.astype(w.dtype)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# ---- products of polynomials ----

# The real points, and the fewest complex pairs. Each real one more saves products and costs digits:
# these leave 2e-6 of relative error with 1024 channels in float32, 1e-2 in bfloat16.
_POINTS = {
    "float32": ((0, math.inf, 1, -1, 1.8, -1.8, 0.55, -0.55), 0),
    "bfloat16": ((0, math.inf, 0.75, -0.75, 1.33, -1.33), 1),
}
_TAPS = 30  # in longer polynomials the powers of points beyond 1 drown the others


class _Axis(NamedTuple):
    """How one axis is convolved: in tiles, each y = A [(B x) · (C w)]."""

    stride: int
    outputs: int
    tiles: int
    A: np.ndarray  # [outputs of a tile, products]
    B: np.ndarray  # [products, inputs of a tile]
    C: np.ndarray  # [products, taps]


def _plan(image, kernel, strides, dtype: str) -> tuple[_Axis, _Axis] | None:
    """How to convolve rows and columns, None where patches times kernel is the faster way."""
    taps = max(-(-n // s) for n, s in zip(kernel[:2], strides, strict=True))
    if dtype not in _POINTS or taps > _TAPS:
        return None
    sizes = zip(image, kernel[:2], strides, strict=True)
    rows, columns = (_axis(*size, *_POINTS[dtype]) for size in sizes)
    products = math.prod(axis.stride * axis.tiles * len(axis.B) for axis in (rows, columns))
    direct = rows.outputs * columns.outputs * kernel[0] * kernel[1]
    # The maps' own work pays only where many channels share it.
    channels = min(rows.stride * columns.stride * kernel[2], kernel[3])
    return (rows, columns) if 2 * products <= direct and channels >= 64 else None


def _axis(size: int, taps: int, stride: int, real: tuple[float, ...], pairs: int) -> _Axis:
    outputs, taps = (size - taps) // stride + 1, -(-taps // stride)
    choices = [
        _Axis(stride, outputs, -(-outputs // n), *_toom_cook(n, taps, real, pairs))
        for n in range(1, min(outputs, 8) + 1)
    ]
    return min(choices, key=lambda axis: axis.tiles * len(axis.B))


@functools.cache
def _toom_cook(outputs: int, taps: int, real: tuple[float, ...], pairs: int):
    """The A, B, C of y = A [(B x) · (C w)] for `outputs` outputs of `taps` taps."""
    points = _points(outputs + taps - 1, real, pairs)
    # Of two conjugates one is enough, for y is real.
    kept = [i for i, p in enumerate(points) if p.imag >= 0]
    # B is interpolation transposed, which is the inverse of evaluation.
    B = np.linalg.inv(_powers(points, len(points))).T[kept]
    C, A = _powers(points, taps)[kept], _powers(points, outputs)[kept]
    # Rows of one length in B and in C keep all values of a similar size: fewer digits are lost.
    B_length, C_length = (np.linalg.norm(m, axis=1, keepdims=True) for m in (B, C))
    A, B, C = A * B_length * C_length, B / B_length, C / C_length
    products = [
        product
        for i, a, b, c in zip(kept, A, B, C, strict=True)
        for product in (_gauss(2 * a, b, c) if points[i].imag else [(a.real, b.real, c.real)])
    ]
    A, B, C = (np.array(m, np.float32) for m in zip(*products, strict=True))
    return A.T, B, C


def _points(n: int, real: tuple[float, ...], pairs: int) -> list[complex]:
    """n points: real ones as far as they go, the others in pairs on the unit circle."""
    pairs = min(n // 2, max(pairs, -(-(n - len(real)) // 2)))
    circle = np.exp(1j * math.pi * np.arange(1, pairs + 1) / (pairs + 1))
    return [complex(p) for p in (*real[: n - 2 * pairs], *circle, *circle.conj())]


def _powers(points, n):
    """[points, n] of p^0 … p^(n-1); at ∞ only the highest power counts."""
    return np.array([np.eye(n)[-1] if math.isinf(p.real) else p ** np.arange(n) for p in points])


def _gauss(a, b, c):
    """Re(a (b x) (c w)) by three real products."""
    return [
        (a.real + a.imag, b.real, c.real),
        (a.imag - a.real, b.imag, c.imag),
        (-a.imag, b.real + b.imag, c.real + c.imag),
    ]


def _toom_cook_conv(axes, x, w):
    X, W = _values(axes, x, w)
    y = _transform([axis.A for axis in axes], _product(X, W, 2))
    return _join(axes, y, x.shape[0])


def _toom_cook_conv_bwd(axes, x, w, dy):
    X, W = _values(axes, x, w)
    dy, A = _split(axes, _wide(dy)), [axis.A.T for axis in axes]
    # XLA's fast product contracts the left operand over its last axis, and a transpose of dY would
    # be folded into the product: so each product has a dY of its own, in the order it needs.
    dX = _product(_transform(A, dy).astype(x.dtype), W, 3)  # [.., .., B', C']
    dW = _product(_transform(A, dy.swapaxes(2, 3)).astype(x.dtype), X, 2)  # [.., .., O, C']
    _, x_adjoint = jax.vjp(functools.partial(_tiles, axes), _wide(x))
    _, w_adjoint = jax.vjp(functools.partial(_taps, axes), _wide(w))
    (dx,) = x_adjoint(_transform([axis.B.T for axis in axes], dX))
    (dw,) = w_adjoint(_transform([axis.C.T for axis in axes], dW).swapaxes(2, 3))
    # Whole in memory once: else each reader, three of an optimizer, gathers it anew.
    return dx.astype(x.dtype), lax.optimization_barrier(dw.astype(w.dtype))


def _values(axes, x, w):
    """Images [.., .., B', C'] and kernel [.., .., C', O] at each pair of points.

    B' counts the tiles of all images, C' the channels of all phases.
    """
    X = _transform([axis.B for axis in axes], _wide(_tiles(axes, x)))
    W = _transform([axis.C for axis in axes], _wide(_taps(axes, w)))
    return X.astype(x.dtype), W.astype(w.dtype)


def _product(left, right, axis):
    return _dot(left, right, ((3,), (axis,)), ((0, 1), (0, 1)))


def _transform(matrices, t):
    """Applies a matrix to the rows and one to the columns of [rows, columns, ...]."""
    rows, columns = matrices
    t = _dot(jnp.asarray(rows), t, ((1,), (0,)))
    columns = jnp.broadcast_to(columns, (len(rows), *columns.shape))
    return _dot(columns, t, ((2,), (1,)), ((0,), (0,)))


def _tiles(axes, x):
    """[B, H, W, C] -> [rows, columns, B', C'], the inputs of a tile."""
    rows, columns = axes
    x = _cut(x, 2, columns, columns.B.shape[1], columns.stride)
    x = _cut(x, 1, rows, rows.B.shape[1], rows.stride)
    return _gather(x)


def _split(axes, dy):
    """[B, H', W', O] -> [rows, columns, B', O], the outputs of a tile."""
    rows, columns = axes
    dy = _cut(dy, 2, columns, columns.A.shape[0], 1)
    dy = _cut(dy, 1, rows, rows.A.shape[0], 1)
    return _gather(dy)


def _cut(x, dim, axis, length, phases):
    """Cuts dimension `dim` into [tiles, length, phases]; tiles of inputs overlap."""
    step = axis.A.shape[0] * phases
    length *= phases
    pads = [(0, 0, 0)] * x.ndim
    pads[dim] = (0, (axis.tiles - 1) * step + length - x.shape[dim], 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), pads)
    tiles = [lax.slice_in_dim(x, i * step, i * step + length, axis=dim) for i in range(axis.tiles)]
    x = jnp.stack(tiles, dim)
    return x.reshape(*x.shape[: dim + 1], length // phases, phases, *x.shape[dim + 2 :])


def _gather(x):
    """[B, tiles, rows, phases, tiles, columns, phases, C] -> [rows, columns, B', C']."""
    b, s, n, p, t, m, q, c = x.shape
    return x.transpose(2, 5, 0, 1, 4, 3, 6, 7).reshape(n, m, b * s * t, p * q * c)


def _join(axes, y, batch):
    """[rows, columns, B', O] -> [B, H', W', O], as `_split` takes it apart."""
    rows, columns = axes
    n, m, _, out = y.shape
    y = y.reshape(n, m, batch, rows.tiles, columns.tiles, out).transpose(2, 3, 0, 4, 1, 5)
    y = y.reshape(batch, rows.tiles * n, columns.tiles * m, out)
    return y[:, : rows.outputs, : columns.outputs]


def _taps(axes, w):
    """[P, Q, C, O] -> [rows, columns, C', O], the taps of a phase."""
    (s, n), (t, m) = ((axis.stride, axis.C.shape[1]) for axis in axes)
    p, q, c, out = w.shape
    w = jnp.pad(w, ((0, n * s - p), (0, m * t - q), (0, 0), (0, 0)))
    return w.reshape(n, s, m, t, c, out).transpose(0, 2, 1, 3, 4, 5).reshape(n, m, s * t * c, out)
