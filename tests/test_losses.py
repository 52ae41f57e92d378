"""The losses of class scores and reconstructions, and the sum of both."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

import capsjax
import reference

J = 4
PAPER = (0.9, 0.1, 0.5)  # m⁺, m⁻, λ


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


# Each loss of class scores, and what it is as loops.
SCORED = {
    "margin": (
        capsjax.margin_loss,
        lambda lengths, present: reference.margin_loss(lengths, present, *PAPER),
    ),
    "spread": (
        lambda activations, labels: capsjax.spread_loss(activations, labels, 0.5),
        lambda activations, present: reference.spread_loss(activations, present, 0.5),
    ),
    "cross_entropy": (capsjax.cross_entropy, reference.cross_entropy),
}


@pytest.mark.parametrize("name", SCORED)
def test_a_loss_of_scores_equals_the_papers_with_labels_in_every_form(rng, lead, dtype, call, name):
    ours, theirs = SCORED[name]
    scores = jnp.asarray(rng.uniform(size=(*lead, J)), dtype)
    numbers = np.asarray(rng.integers(J, size=lead))
    one_hot = np.eye(J, dtype=np.float32)[numbers]
    k_hot = rng.integers(2, size=(*lead, J))

    def losses(scores, *labels):
        return [ours(scores, form) for form in labels]

    results = call(losses, scores, numbers, one_hot, k_hot, k_hot == 1)
    for loss, present in zip(results, (one_hot, one_hot, k_hot, k_hot), strict=True):
        assert_shape(loss, lead)
        assert loss.dtype == jnp.float32  # also of bfloat16
        np.testing.assert_allclose(loss, theirs(float64(scores), float64(present)), rtol=1e-5)


unit = st.floats(0, 1, width=32)


@given(
    hnp.arrays(np.float32, (3, J), elements=unit),
    hnp.arrays(np.int32, (3, J), elements=st.integers(0, 1)),
    unit,
    unit,
    st.floats(0, 2, width=32),
)
@settings(max_examples=100)
def test_margin_loss_equals_the_paper_at_any_margins(lengths, present, m_plus, m_minus, weight):
    loss = jax.jit(capsjax.margin_loss)(
        lengths, present, m_plus=m_plus, m_minus=m_minus, down_weight=weight
    )
    expected = reference.margin_loss(float64(lengths), present, m_plus, m_minus, weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


def test_a_perfect_answer_costs_nothing():
    assert capsjax.margin_loss(jnp.array([0.95, 0.05, 0.0, 0.1]), 0) == 0


def test_a_margin_that_grows_compiles_the_spread_loss_once(rng):
    activations, labels = jnp.asarray(rng.uniform(size=(3, J)), jnp.float32), np.arange(3)
    spread_loss = jax.jit(chex.assert_max_traces(capsjax.spread_loss, n=1))
    for margin in np.linspace(0.2, 0.9, 5, dtype=np.float32):
        loss = spread_loss(activations, labels, margin)
        expected = reference.spread_loss(float64(activations), np.eye(J)[labels], margin)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_cross_entropy_and_its_gradient_are_finite_at_extreme_logits():
    logits = 1e38 * jnp.array([[1.0, -1, 0, 0], [-1, 1, 1, 1], [-1, -1, -1, -1]])
    loss, gradient = jax.vmap(jax.value_and_grad(capsjax.cross_entropy))(logits, np.zeros(3, int))
    np.testing.assert_allclose(loss, [0, 2e38, np.log(4)], rtol=1e-5)
    expected = [[0, 0, 0, 0], [-1, 1 / 3, 1 / 3, 1 / 3], [-3 / 4, 1 / 4, 1 / 4, 1 / 4]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_a_class_that_is_masked_out_costs_nothing_unless_it_is_present():
    value, gradient = jax.value_and_grad(capsjax.cross_entropy)(jnp.array([0.0, 1.0, -jnp.inf]), 0)
    np.testing.assert_allclose(value, np.log1p(np.e), rtol=1e-6)
    share = np.e / (1 + np.e)
    np.testing.assert_allclose(gradient, [-share, share, 0], rtol=1e-6)


def test_an_example_of_no_class_costs_no_cross_entropy_and_has_no_gradient():
    loss, gradient = jax.value_and_grad(capsjax.cross_entropy)(jnp.arange(4.0), np.zeros(4, int))
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", ["spread", "cross_entropy"])
def test_the_gradient_of_a_loss_of_scores_passes_check_grads(rng, name):
    loss, _ = SCORED[name]
    with jax.enable_x64(True):
        # Differences are multiples of 0.2, away from the spread loss's kink.
        scores = jnp.asarray(rng.permutation(2 * J).reshape(2, J) / 5)
        for labels in ([1, 2], [[0, 1, 0, 1], [1, 0, 0, 0]]):
            mean = jax.jit(lambda scores, labels=labels: jnp.mean(loss(scores, np.array(labels))))
            check_grads(mean, (scores,), order=1)


def test_reconstruction_loss_equals_the_mean_over_pixels(rng, lead, dtype, call):
    x, y = (jnp.asarray(rng.uniform(size=(*lead, 3, 2, 2)), dtype) for _ in range(2))
    loss = call(capsjax.reconstruction_loss, x, y)
    assert_shape(loss, lead)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, reference.reconstruction_loss(*map(float64, (x, y))), 1e-5)


@given(
    hnp.arrays(np.float32, (2, 2, 3, 1), elements=unit),
    hnp.arrays(np.float32, (2, 2, 3, 1), elements=unit),
)
@settings(max_examples=60)
def test_reconstruction_loss_is_zero_only_for_equal_images(x, y):
    loss = jax.jit(capsjax.reconstruction_loss)(x, y)
    expected = reference.reconstruction_loss(float64(x), float64(y))
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-12)
    assert not capsjax.reconstruction_loss(x, x).any()


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
def test_caps_loss_equals_the_sum_of_the_means(rng, lead, dtype, jit):
    numbers = jnp.asarray(rng.integers(J, size=lead))
    lengths = jnp.asarray(rng.uniform(size=(*lead, J)), dtype)
    x, x_recon = (jnp.asarray(rng.uniform(size=(*lead, 3, 2, 1)), dtype) for _ in range(2))
    call = jax.jit(capsjax.caps_loss) if jit else capsjax.caps_loss
    loss = call(numbers, lengths, x, x_recon, 0.392)
    assert_shape(loss, ())
    assert loss.dtype == jnp.float32
    one_hot = np.eye(J)[np.asarray(numbers)]
    expected = reference.caps_loss(
        one_hot, float64(lengths), float64(x), float64(x_recon), lam_recon=0.392
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_caps_loss_under_vmap_is_the_loss_of_each_batch(rng):
    numbers = jnp.asarray(rng.integers(J, size=(2, 3)))
    lengths = jnp.asarray(rng.uniform(size=(2, 3, J)), jnp.float32)
    x, x_recon = (jnp.asarray(rng.uniform(size=(2, 3, 2, 2, 1)), jnp.float32) for _ in range(2))
    mapped = jax.vmap(capsjax.caps_loss, in_axes=(0, 0, 0, 0, None))
    losses = jax.jit(mapped)(numbers, lengths, x, x_recon, 0.5)
    for row, loss in enumerate(losses):
        batch = (numbers[row], lengths[row], x[row], x_recon[row])
        np.testing.assert_allclose(loss, jax.jit(capsjax.caps_loss)(*batch, 0.5), rtol=1e-6)


def test_the_gradients_of_caps_loss_pass_check_grads(rng):
    with jax.enable_x64(True):
        lengths = jnp.asarray(rng.uniform(0.2, 0.8, size=(2, J)))  # away from both kinks
        x, x_recon = (jnp.asarray(rng.uniform(size=(2, 3, 2, 1))) for _ in range(2))

        def loss(lengths, x_recon):
            return capsjax.caps_loss(jnp.array([1, 2]), lengths, x, x_recon, 0.392)

        check_grads(jax.jit(loss), (lengths, x_recon), order=1)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("lengths", "labels", "message"),
    [
        ((), 0, r"lengths \[\.\.\., j\], got a scalar"),
        ((2, J), np.zeros(3, int), r"\[2\] or one-hot labels of shape \[2, 4\], got \[3\]"),
        ((2, J), np.zeros((2, J + 1)), r"\[2, 4\], got \[2, 5\]"),
        ((J,), np.zeros(1, int), r"\[\] or one-hot labels of shape \[4\], got \[1\]"),
        ((2, J), np.zeros(2, np.float32), "integers, got float32"),
        ((2, J), np.zeros(2, bool), "integers, got bool"),
    ],
)
def test_labels_that_do_not_fit_are_an_error_in_words(lengths, labels, message, jit):
    call = jax.jit(capsjax.margin_loss) if jit else capsjax.margin_loss
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(lengths), labels)


@pytest.mark.parametrize("number", [-1, J])
@pytest.mark.parametrize("function", [capsjax.margin_loss, capsjax.cross_entropy, capsjax.mask])
def test_a_class_number_out_of_range_is_refused_where_it_is_known(function, number):
    labels, scores = np.array([0, number]), jnp.ones((2, J))
    arguments = (jnp.ones((2, J, 3)),) if function is capsjax.mask else (scores,)
    with pytest.raises(ValueError, match=f"4 classes are 0 to 3, got {number}"):
        function(*arguments, labels)
    none = np.eye(J)[[0, 0]] * [[1], [0]]
    jitted = jax.jit(function)(*arguments, labels)
    np.testing.assert_allclose(jitted, function(*arguments, none), rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "shape", "message"),
    [
        (capsjax.cross_entropy, (), r"logits \[\.\.\., j\], got a scalar"),
        (lambda a, labels: capsjax.spread_loss(a, labels, 0.5), (), r"got \[\] and \[\]"),
        (
            lambda a, labels: capsjax.spread_loss(a, labels, np.ones(2)),
            (2, J),
            r"a scalar margin, got \[2, 4\] and \[2\]",
        ),
        (capsjax.cross_entropy, (2, J), r"\[2\] or one-hot labels of shape \[2, 4\], got \[\]"),
    ],
)
def test_what_does_not_fit_the_other_losses_is_an_error_in_words(loss, shape, message):
    with pytest.raises(ValueError, match=message):
        loss(jnp.ones(shape), 0)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "shapes", [((2, 3, 3, 1), (2, 3, 3)), ((9,), (9,)), ((3, 3, 1), (3, 3, 2))]
)
def test_images_that_do_not_fit_are_an_error_in_words(shapes, jit):
    call = jax.jit(capsjax.reconstruction_loss) if jit else capsjax.reconstruction_loss
    with pytest.raises(ValueError, match="one shape") as error:
        call(*map(jnp.ones, shapes))
    for shape in shapes:
        assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize(
    ("labels", "reconstruction"), [(np.zeros(3, int), (2, 3, 3, 1)), (np.zeros(2, int), (3, 3, 1))]
)
def test_caps_loss_checks_both_of_its_losses(labels, reconstruction):
    with pytest.raises(ValueError, match="expected"):
        capsjax.caps_loss(
            labels, jnp.ones((2, J)), jnp.ones((2, 3, 3, 1)), jnp.ones(reconstruction), 1.0
        )
