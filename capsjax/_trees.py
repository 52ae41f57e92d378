"""Trees of arrays as names and arrays, which is how files hold them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


class WeightsError(ValueError):
    """Raised when arrays or a file do not hold the network that was expected."""


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every leaf with its path, such as `params.conv1.kernel`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield prefix + jax.tree_util.keystr(path, simple=True, separator="."), leaf


def fill(template: Any, arrays: Mapping[str, np.ndarray], prefix: str = "") -> Any:
    """Fills a tree with arrays of the same names and shapes.

    Args:
      template: a tree whose leaves have shapes and dtypes.
      arrays: by their path.
      prefix: the path of `template` itself within `arrays`, with its dot, such as `params.`.

    Returns:
      A tree like `template`.

    Raises:
      WeightsError: naming the first array that is missing, left over, of another shape, or
        not finite.
    """
    expected = dict(named_leaves(template, prefix))
    found = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    for name in sorted(expected.keys() | found.keys()):
        ours = list(expected[name].shape) if name in expected else "no such array"
        theirs = list(found[name].shape) if name in found else "no such array"
        if ours != theirs:
            raise WeightsError(
                f"weights of another network: expected {name} as {ours}, got {theirs}"
            )
        if not np.isfinite(found[name]).all():
            raise WeightsError(f"{name} holds values that are not finite numbers")
    leaves = [found[name].astype(leaf.dtype) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
