"""The arrays of a tree by name, as files hold them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


class WeightsError(ValueError):
    """Arrays or a file that are no network of the kind that was expected."""


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path, as `params.conv1.kernel`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield prefix + jax.tree_util.keystr(path, simple=True, separator="."), leaf


def fill(template: Any, arrays: Mapping[str, np.ndarray], prefix: str = "") -> Any:
    """Puts arrays into a tree of the same names and shapes.

    Args:
      template: the tree, whose leaves have shapes and dtypes.
      arrays: by their path.
      prefix: the path of `template` itself within `arrays`, with its dot, as `params.`.

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
                f"weights of another network: {name} is {ours} here and {theirs} there"
            )
        if not np.isfinite(found[name]).all():
            raise WeightsError(f"{name} holds values that are not finite numbers")
    leaves = [found[name].astype(leaf.dtype) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
