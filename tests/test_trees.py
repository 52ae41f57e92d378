"""The arrays of a tree by name."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from capsjax._trees import WeightsError, fill, named_leaves


def test_leaves_are_named_by_their_path():
    names = dict(named_leaves(tiny.make_state()))
    assert {
        "step",
        "params.conv1.kernel",
        "params.primary.conv.bias",
        "params.class_caps.weight",
        "params.decoder.0.kernel",
        "sums.losses.margin",
        "sums.correct",
    } <= names.keys()
    assert [*dict(named_leaves({"a": [1, 2]}, "x."))] == ["x.a.0", "x.a.1"]


def test_fill_names_the_first_array_that_differs(tmp_path):
    def arrays(tree):
        return dict(named_leaves(tree, "params."))

    ours = {"conv1": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "last": np.zeros(1)}
    ones = jax.tree.map(np.ones_like, ours)
    filled = fill(ours, {**arrays(ones), "step": np.zeros(3)}, "params.")
    chex.assert_trees_all_equal(filled, ones)
    for theirs, message in (
        (
            {**ours, "conv1": {"kernel": np.zeros((2, 4)), "bias": np.zeros(4)}},
            r"expected params.conv1.bias as \[3\], got \[4\]",
        ),
        (
            {**ours, "conv1": {"kernel": np.zeros((2, 4)), "bias": np.zeros(3)}},
            r"expected params.conv1.kernel as \[2, 3\], got \[2, 4\]",
        ),
        (
            {"conv1": ours["conv1"]},
            r"expected params.last as \[1\], got no such array",
        ),
        (
            {**ours, "more": np.zeros((2, 2))},
            r"expected params.more as no such array, got \[2, 2\]",
        ),
    ):
        with pytest.raises(WeightsError, match=f"weights of another network: {message}"):
            fill(ours, arrays(theirs), "params.")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_fill_refuses_what_is_not_finite(value, dtype):
    ours = {"conv1": {"kernel": np.zeros((2, 3), dtype)}}
    with pytest.raises(WeightsError, match=r"conv1\.kernel holds values that are not finite"):
        fill(ours, {"conv1.kernel": np.array([[0, 1, 2], [3, value, 5]], dtype)})


def test_fill_gives_each_leaf_the_dtype_of_its_place():
    filled = fill({"a": np.zeros(2, np.float32)}, {"a": np.ones(2)})
    assert filled["a"].dtype == np.float32
