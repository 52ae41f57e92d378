"""Convolution as a product of polynomials: the Toom-Cook algorithm.

CapsNet's second convolution, 9×9 taps with stride 2 on 20×20×256, in float32:

- Phases. With stride s, output h reads the inputs s h + tap, and the taps s i + phase read inputs
  of that phase only. So the phases (the polyphase decomposition) become channels of a convolution
  with stride 1: 5×5 taps on 10×10×1024, where zeros fill up the kernel to 10×10.
- Tiles. Along one axis, a tile of 6 outputs of 5 taps reads 10 inputs. The product of a polynomial
  of 5 coefficients and one of 6 is determined by its values at 10 points: evaluate both factors,
  multiply the values, interpolate. The transpose of that is the convolution,
  y = A [(B x) · (C w)], and 10 products replace 6 · 5 = 30.
- Interpolation points are 0, ∞ (the highest coefficient) and pairs ±a. More than 8 real ones cost
  digits, so the last two are ±i. Values at conjugate points are conjugate: one complex product
  gives both, as three real ones (Gauss). So an axis takes 11 products.
- 11 products along rows, 11 along columns and 4 phases are 484 for each pair of an input and an
  output channel. They replace 36 · 81 = 2,916.

The pointwise products are matrix products over the channels, one for each pair of points, and the
transforms around them are cheap. The gradients use the same matrices transposed.

References:
  Toom, 1963; Cook, 1966; for convolutions Winograd, "Arithmetic Complexity of Computations", 1980;
  for neural networks Lavin, Gray, 2015, arXiv:1509.09308.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax._conv._matmul import contract
from capsjax._conv._tiles import join_outputs, split_inputs, split_kernel, split_outputs
from capsjax._conv._tiling import AxisPlan
from capsjax._vectors import at_least_float32

_Axes = tuple[AxisPlan, AxisPlan]


def convolve(axes: _Axes, x: Array, w: Array) -> Array:
    """Convolves images [B, H, W, C] with a kernel [P, Q, C, O]; returns float32 [B, H', W', O]."""
    X, W = _transform_operands(axes, x, w)
    y = _transform([axis.A for axis in axes], _multiply_pointwise(X, W, 2))
    return join_outputs(axes, y, x.shape[0])


def compute_gradients(axes: _Axes, x: Array, w: Array, dy: Array) -> tuple[Array, Array]:
    """Computes the gradients of images and kernel from that of the outputs [B, H', W', O]."""
    X, W = _transform_operands(axes, x, w)
    dy, A = split_outputs(axes, at_least_float32(dy)), [axis.A.T for axis in axes]
    # XLA's fast product contracts the left operand over its last axis, and XLA would fold a
    # transpose of dY into the product: so dY is computed twice, in the order of each product.
    dX = _multiply_pointwise(_transform(A, dy).astype(x.dtype), W, 3)  # [.., .., B', C']
    dY = _transform(A, dy.swapaxes(2, 3)).astype(x.dtype)
    dW = _multiply_pointwise(dY, X, 2)  # [.., .., O, C']
    _, join_inputs = jax.vjp(functools.partial(split_inputs, axes), at_least_float32(x))
    _, join_kernel = jax.vjp(functools.partial(split_kernel, axes), at_least_float32(w))
    (dx,) = join_inputs(_transform([axis.B.T for axis in axes], dX))
    (dw,) = join_kernel(_transform([axis.C.T for axis in axes], dW).swapaxes(2, 3))
    # The barrier writes dw to memory once: else each reader, such as the three of an optimizer,
    # would compute its rearrangement again.
    return dx.astype(x.dtype), lax.optimization_barrier(dw.astype(w.dtype))


def _transform_operands(axes, x, w):
    """Evaluates images [.., .., B', C'] and kernel [.., .., C', O] at each pair of points."""
    X = _transform([axis.B for axis in axes], at_least_float32(split_inputs(axes, x)))
    W = _transform([axis.C for axis in axes], at_least_float32(split_kernel(axes, w)))
    return X.astype(x.dtype), W.astype(w.dtype)


def _multiply_pointwise(left, right, axis):
    """Multiplies matrices point by point, summing over the last axis of `left`."""
    return contract(left, right, ((3,), (axis,)), ((0, 1), (0, 1)))


def _transform(matrices, t):
    """Applies a matrix to the rows and one to the columns of [rows, columns, ...]."""
    rows, columns = matrices
    t = contract(jnp.asarray(rows), t, ((1,), (0,)))
    columns = jnp.broadcast_to(columns, (len(rows), *columns.shape))
    return contract(columns, t, ((2,), (1,)), ((0,), (0,)))
