"""The figure of capsules and routing."""

import numpy as np
import pytest

from capsjax import viz
from capsjax.diagnostics import (
    ClassScores,
    CouplingStatistics,
    Diagnosis,
    LayerActivations,
    ScoreHistogram,
)
from test_viz import DIGITS, inside, rendered, titles


def make_diagnosis(num_classes=10, iterations=3, layers=("primary", "class_caps"), told=True):
    """Makes the diagnosis of a network that no one has: dynamics beyond 1, two dead capsules."""
    counts = np.random.default_rng(0).integers(0, 9, (iterations, 2, num_classes, 20))
    scores = [ClassScores(0.25 * n, ScoreHistogram(*c)) for n, c in enumerate(counts)]
    couplings = [
        CouplingStatistics(0.9, 0.2, 0.3, 1.2 * n) for n in range(iterations if told else 0)
    ]
    mean = np.linspace(0, 1.2, 60).reshape(2, 30)
    activations = {name: LayerActivations(mean, mean < 0.03) for name in layers}
    return Diagnosis(2000, tuple(scores), tuple(couplings), activations)


def test_capsules_are_drawn_with_and_without_routing_and_their_numbers_are_written():
    figure = viz.capsules(make_diagnosis(), DIGITS)
    assert inside(figure)
    scores, classes, layers, couplings = figure.axes
    assert scores.get_title("left") == "2,000 images, 50.00 % misread; without routing 0.00 %"
    assert len(scores.patches) == 4
    assert [label.get_text() for label in classes.get_yticklabels()] == [*DIGITS]
    written = [text.get_text() for text in layers.get_legend().get_texts()]
    assert written == ["primary: 2 of 60 dead", "class_caps: 2 of 60 dead"]
    written = [text.get_text().partition(" (")[0] for text in couplings.get_legend().get_texts()]
    assert written == ["entropy 0.9", "bonding 0.3", "dynamics 2.4", "active 0.2"]
    assert couplings.get_ylim()[1] > 2.4
    assert couplings.get_xlabel() == "iteration, the first without routing"


def test_shares_are_drawn_of_each_kind_of_score():
    diagnosis = make_diagnosis(iterations=1)
    scores = viz.capsules(diagnosis, DIGITS).axes[0]
    for patch, counts in zip(scores.patches, diagnosis.scores[0].histogram, strict=True):
        expected = counts.sum(0) / counts.sum()
        np.testing.assert_allclose(patch.get_data().values, expected)
        np.testing.assert_allclose(patch.get_data().edges, np.linspace(0, 1, 21))


def test_a_class_is_a_row_of_its_color_where_its_images_are_and_of_another_where_others_are():
    present, absent = np.zeros((2, 2, 20), int)
    present[0, 19] = present[1, 10] = absent[0, 0] = 7
    scores = (ClassScores(0.0, ScoreHistogram(present, absent)),)
    pixels = viz.capsules(Diagnosis(14, scores, (), {}), "01").axes[1].images[0].get_array()
    blue, red = (0, 0x72 / 255, 0xB2 / 255), (0xD5 / 255, 0x5E / 255, 0)
    np.testing.assert_allclose(pixels[0, [0, 19]], [red, blue])
    np.testing.assert_allclose(pixels[1, 10], blue)
    assert (np.delete(pixels.reshape(40, 3), [0, 19, 30], 0) == 1).all()


@pytest.mark.parametrize(
    ("left_out", "panels"),
    [({"told": False}, 3), ({"told": False, "layers": ()}, 2), ({"iterations": 1}, 4)],
)
def test_what_a_network_does_not_offer_has_no_panel(left_out, panels):
    figure = viz.capsules(make_diagnosis(**left_out), DIGITS)
    assert len(figure.axes) == panels
    assert inside(figure)
    assert not any("dynamics" in title for title in titles(figure)[:panels])
    assert ("routing" in titles(figure)[0]) == (left_out.get("iterations") != 1)


@pytest.mark.parametrize(("num_classes", "length"), [(1, 1), (2, 80), (47, 12)])
def test_names_of_any_number_and_length_stay_beside_the_panel_of_classes(num_classes, length):
    names = ["W" * length] * (num_classes - 1) + ["猫"]
    figure = viz.capsules(make_diagnosis(num_classes), names)
    assert inside(figure)
    boxes = [label.get_window_extent() for label in figure.axes[1].get_yticklabels()]
    assert 0 < len(boxes) <= 20
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    rendered(figure)  # no warning of a missing letter


def test_capsules_of_none_or_under_other_names_are_refused():
    with pytest.raises(ValueError, match="of a network that has capsules"):
        viz.capsules(Diagnosis(3, (), (), {}), DIGITS)
    with pytest.raises(ValueError, match="names of 10 classes, got 2"):
        viz.capsules(make_diagnosis(), "01")
