"""Grids and figures: the right pixels at the right places."""

import csv
import io

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capsjax import viz

DIGITS = "0123456789"


def rendered(figure):
    """Reads back what `figure.savefig` writes: uint8 [height, width, 3]."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def shown(figure):
    """Cuts the image grid out of a figure's PNG."""
    (axes,) = figure.axes
    box = axes.get_window_extent()
    pixels = rendered(figure)
    top = len(pixels) - round(box.y1)
    return pixels[top : top + round(box.height), round(box.x0) : round(box.x1)]


def texts(figure):
    return [text.get_text() for owner in (figure, *figure.axes) for text in owner.texts]


def titles(figure):
    return [axes.get_title("left") for axes in figure.axes]


def inside(figure):
    """Returns whether everything drawn, text included, lies within the figure."""
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    return all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= width and b.y1 <= height for b in boxes)


@settings(deadline=None, max_examples=150)
@given(
    number=st.integers(1, 12),
    columns=st.integers(1, 13),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3])),
    separator=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_grid_holds_each_image_at_its_place_and_white_elsewhere(
    number, columns, size, separator, seed
):
    height, width, _ = size
    images = np.random.default_rng(seed).integers(0, 200, (number, *size), dtype=np.uint8)
    grid = viz.image_grid(images, columns, separator=separator)
    rows = -(-number // columns)
    assert grid.dtype == np.uint8
    assert grid.shape == (
        rows * (height + separator) - separator,
        columns * (width + separator) - separator,
        3,
    )
    rest = grid.copy()
    for n, image in enumerate(images):
        top, left = (n // columns) * (height + separator), (n % columns) * (width + separator)
        tile = grid[top : top + height, left : left + width]
        np.testing.assert_array_equal(tile, np.broadcast_to(image, tile.shape))
        rest[top : top + height, left : left + width] = 255
    assert (rest == 255).all()


def test_floats_are_clipped_and_scaled_to_bytes():
    images = np.array([-0.5, 0.0, 0.5, 1.0, 2.0]).reshape(5, 1, 1, 1)
    grid = viz.image_grid(images, 5, separator=0)
    assert grid[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    in_bfloat16 = viz.image_grid(jnp.asarray(images, jnp.bfloat16), 5, separator=0)
    np.testing.assert_array_equal(in_bfloat16, grid)


def test_channels_of_another_number_than_one_or_three_are_drawn_as_their_grey_mean():
    images = np.array([10, 30], np.uint8).reshape(1, 1, 1, 2)
    assert viz.image_grid(images, 1).tolist() == [[[20, 20, 20]]]


@pytest.mark.parametrize(
    ("images", "columns"),
    [
        (np.zeros((2, 3, 3)), 1),
        (np.zeros((2, 3, 3, 1)), 0),
        (np.zeros((0, 3, 3, 1)), 1),
        (np.zeros((2, 3, 3, 1), np.int32), 1),
    ],
)
def test_what_is_no_stack_of_images_is_refused_in_words(images, columns):
    with pytest.raises(ValueError, match=r"expected images \[.*H, W, C\].*got"):
        viz.image_grid(images, columns)


def metrics(epochs, **columns):
    return [{"epoch": e, **{k: v(e) for k, v in columns.items()}} for e in range(1, epochs + 1)]


def rows_of_a_run(*names, splits=("train", "validation", "test"), epochs=3):
    """Makes the rows that a run writes, in its order of columns, as numbers."""
    columns = {  # a term of the loss is half of it
        f"{split}_{name}": lambda e, name=name: (2 if name in ("error", "loss") else 1) / e
        for split in splits
        for name in names
    }
    before = {"step": lambda e: 600 * e, "learning_rate": lambda e: 0.9**e}
    after = {"seconds": lambda e: 3.5, "images_per_second": lambda e: 171.0}
    return metrics(epochs, **before, **columns, **after)


def as_read_from_csv(rows):
    """Writes rows as a CSV file and reads them back as text."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return list(csv.DictReader(io.StringIO(file.getvalue())))


def test_a_run_of_capsnet_has_four_panels_with_error_and_total_loss_first():
    figure = viz.curves(rows_of_a_run("loss", "margin", "reconstruction", "error"))
    expected = ["error (% of images)", "total loss", "margin loss", "reconstruction loss"]
    assert titles(figure) == expected


@pytest.mark.parametrize("empty", [{}, {"test_reconstruction": lambda e: ""}])
def test_a_network_without_a_decoder_has_no_panel_of_reconstructions(empty):
    rows = rows_of_a_run("loss", "margin", "error")
    rows = [row | extra for row, extra in zip(rows, metrics(3, **empty), strict=True)]
    assert titles(viz.curves(rows)) == ["error (% of images)", "total loss", "margin loss"]


@pytest.mark.parametrize("read", [lambda rows: rows, as_read_from_csv], ids=["numbers", "text"])
def test_a_loss_of_a_single_term_is_drawn_once(read):
    rows = [
        row | {f"{split}_cross_entropy": row[f"{split}_loss"] for split in ("train", "test")}
        for row in rows_of_a_run("loss", "error", splits=("train", "test"))
    ]
    assert titles(viz.curves(read(rows))) == ["error (% of images)", "cross entropy loss"]
    rows[-1]["test_loss"] = 5.0
    expected = ["error (% of images)", "total loss", "cross entropy loss"]
    assert titles(viz.curves(read(rows))) == expected


def test_the_losses_of_another_task_have_panels_of_their_own_in_the_order_of_the_columns():
    rows = rows_of_a_run("loss", "spread", "recon_left", "recon_right", "error")
    losses = ["spread loss", "recon left loss", "recon right loss"]
    assert titles(viz.curves(rows)) == ["error (% of images)", "total loss", *losses]


def test_a_column_that_only_one_row_has_is_drawn_too():
    figure = viz.curves([{"epoch": 1, "test_loss": 1.0}, {"epoch": 2, "train_new": 2.0}])
    assert titles(figure) == ["total loss", "new loss"]


def test_columns_that_are_not_of_a_split_have_no_panel():
    others = {"epoch": 1, "trainer_loss": 1.0, "test_": 1.0, "test": 1.0, "loss": 1.0, None: ["1"]}
    assert titles(viz.curves([others | {"test_error": 1.0}])) == ["error (% of images)"]


def test_a_run_without_validation_has_its_panels_without_validation():
    rows = rows_of_a_run("loss", "error", splits=("train", "test"))
    for empty in ({}, {"validation_loss": "", "validation_error": ""}):
        for axes in viz.curves([row | empty for row in rows]).axes:
            labels = [line.get_label() for line in axes.lines]
            assert labels == ["training (last: 0.667)", "test (last: 0.667)"]


def test_rows_read_from_a_csv_file_are_drawn_as_their_numbers_are():
    rows = rows_of_a_run("loss", "margin", "error")
    rows[1]["validation_error"] = ""
    pictures = [rendered(viz.curves(given)) for given in (rows, as_read_from_csv(rows))]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_panels_stand_two_in_a_row_and_nothing_empty_is_drawn(number):
    names = ["error", "loss", "margin", "left", "right"][:number]
    figure = viz.curves(rows_of_a_run(*names))
    pixels = rendered(figure)
    assert pixels.shape == (350 * -(-number // 2), 500 * min(number, 2), 3)
    assert inside(figure)
    assert len(figure.axes) == number
    assert all(axes.lines for axes in figure.axes)
    rows = [pixels[top : top + 350] for top in range(0, len(pixels), 350)]
    cells = [row[:, left : left + 500] for row in rows for left in range(0, row.shape[1], 500)]
    drawn = [bool((cell < 100).any()) for cell in cells]
    assert drawn == [True] * number + [False] * (len(cells) - number)


@pytest.mark.parametrize("value", ["", None, "nan", float("inf")])
def test_where_no_value_is_finite_the_picture_says_so(value):
    figure = viz.curves([{"epoch": 1, "test_error": value, "test_loss": value}])
    assert texts(figure) == ["No error or loss has a finite value"]


def test_curves_draw_every_split_that_has_values():
    rows = metrics(
        3,
        train_error=lambda e: f"{9 / e:.3f}",
        validation_error=lambda e: "",
        test_error=lambda e: 8 / e,
        test_margin=lambda e: 0.1 / e,
    )
    error, margin = viz.curves(rows).axes
    assert [line.get_label() for line in error.lines] == ["training (last: 3)", "test (last: 2.67)"]
    np.testing.assert_allclose(np.asarray(error.lines[0].get_ydata()), [9, 4.5, 3])
    np.testing.assert_allclose(np.asarray(error.lines[1].get_xdata()), [1, 2, 3])
    assert len(margin.lines) == 1


@pytest.mark.parametrize("zero", [0.0, "0.0"])
def test_a_zero_is_drawn_as_a_value(zero):
    (line,) = viz.curves(metrics(2, test_error=lambda e: zero)).axes[0].lines
    assert np.asarray(line.get_ydata()).tolist() == [0.0, 0.0]


def test_a_single_epoch_is_a_visible_point():
    error = {"train_error": lambda e: 3.0, "test_error": lambda e: 5.0}
    figure = viz.curves(metrics(1, **error))
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o", "o"]
    blue, red = (np.array([0, 0x72, 0xB2]), np.array([0xD5, 0x5E, 0]))
    pixels = rendered(figure).astype(int)
    for color in (blue, red):
        assert (np.abs(pixels - color).max(-1) < 20).sum() > 20


def test_values_over_more_than_a_decade_get_a_logarithmic_axis():
    wide = viz.curves(metrics(20, test_error=lambda e: 20 / e)).axes[0]
    narrow = viz.curves(metrics(5, test_error=lambda e: 20 / e)).axes[0]
    zero = viz.curves(metrics(20, test_error=lambda e: 20 - e)).axes[0]
    scales = [axes.get_yscale() for axes in (wide, narrow, zero)]
    assert scales == ["log", "linear", "linear"]
    assert {label.get_text() for label in wide.get_yticklabels()} >= {"1", "2", "5", "10"}


def test_curves_of_no_epoch_are_refused():
    with pytest.raises(ValueError, match="at least one epoch"):
        viz.curves([])


@pytest.mark.parametrize("shape", [(28, 28, 1), (20, 33, 3)])
def test_each_real_image_stands_above_its_reconstruction(shape):
    height, width, _ = shape
    real = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1) * np.ones(shape, np.uint8)
    figure = viz.reconstructions(real, real + 100)
    grid = shown(figure)
    scale = 84 // max(height, width)
    for n in range(12):
        row, column = divmod(n, 10)
        y = int((row * (2 * height + 7) + height / 2) * scale)
        x = int((column * (width + 6) + width / 2) * scale)
        assert grid[y, x].tolist() == [n] * 3
        assert grid[y + (height + 1) * scale, x].tolist() == [n + 100] * 3
    assert inside(figure)


def test_reconstructions_of_other_images_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        viz.reconstructions(np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8, 3)))


def test_perturbations_are_sixteen_rows_and_eleven_columns_with_their_names():
    values = np.arange(16 * 11, dtype=np.uint8).reshape(16, 11, 1, 1, 1)
    offsets = np.arange(-5, 6) * 0.05
    figure = viz.perturbations(values * np.ones((28, 28, 1), np.uint8), offsets, 7, DIGITS)
    centres = shown(figure)[28::58, 28::58, 0]
    np.testing.assert_array_equal(centres, values.reshape(16, 11))
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    left, right = ["-0.25", "-0.20", "-0.15", "-0.10", "-0.05"], ["+0.05", "+0.10", "+0.15"]
    assert names == [*left, "0", *right, "+0.20", "+0.25"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(n) for n in range(1, 17)]
    assert "“7”" in axes.get_title("left")
    assert inside(figure)


@pytest.mark.parametrize("shape", [(2, 3, 28, 28, 1), (16, 11, 32, 32, 3), (4, 3, 96, 64, 3)])
@pytest.mark.parametrize("name", ["7", "a name of twenty ch.", "W" * 30])
def test_no_text_beside_few_or_narrow_perturbations_is_cut_off(shape, name):
    assert inside(viz.perturbations(np.zeros(shape), np.arange(shape[1]), 0, [name]))


def test_perturbations_with_other_offsets_are_refused():
    with pytest.raises(ValueError, match=r"offsets \[n\]"):
        viz.perturbations(np.zeros((16, 11, 8, 8, 1)), np.zeros(10), 0, DIGITS)


def test_only_misread_images_are_drawn_with_both_classes_under_them():
    images = (np.arange(5, dtype=np.uint8) * 40).reshape(5, 1, 1, 1) * np.ones(
        (28, 28, 1), np.uint8
    )
    figure = viz.misread(images, [4, 9, 1, 3, 3], [4, 4, 1, 3, 8], DIGITS)
    assert texts(figure) == ["9 → 4", "3 → 8"]
    assert figure.axes[0].get_title("left") == "2 of 5 misread: true → predicted"
    grid = shown(figure)
    assert grid[20, 20].tolist() == [40] * 3
    assert grid[20, 20 + 2 * (28 + 6)].tolist() == [160] * 3
    assert inside(figure)


def test_at_most_sixty_misread_images_are_drawn_and_the_title_counts_all():
    figure = viz.misread(np.zeros((99, 8, 8, 1)), np.zeros(99, int), np.ones(99, int), DIGITS)
    assert len(texts(figure)) == 60
    assert figure.axes[0].get_title("left").startswith("99 of 99 misread (the first 60 shown)")


def test_where_nothing_is_misread_the_picture_says_so():
    figure = viz.misread(np.zeros((3, 8, 8, 1)), [1, 2, 3], [1, 2, 3], DIGITS)
    assert texts(figure) == ["None of 3 images misread"]
    assert (rendered(figure) < 100).sum() > 100


@pytest.mark.parametrize("shape", [(28, 28, 1), (24, 60, 3), (300, 200, 3)])
@pytest.mark.parametrize("num_classes", [2, 47])
@pytest.mark.parametrize("length", [1, 12, 80])
def test_names_of_any_length_neither_overlap_nor_leave_the_figure(shape, num_classes, length):
    names = [f"{n:02}"[-length:] + "W" * (length - 2) for n in range(num_classes)]
    labels = np.arange(15) % num_classes
    predicted = (labels + 1) % num_classes
    figure = viz.misread(np.zeros((15, *shape), np.uint8), labels, predicted, names)
    assert inside(figure)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_names_that_the_font_cannot_write_are_replaced_by_their_number():
    figure = viz.misread(np.zeros((1, 8, 8, 1)), [0], [1], ["猫", "$dog_1$"])
    assert texts(figure) in (["class 0 → $dog_1$"], ["class 0\n→ $dog_1$"])
    rendered(figure)  # no warning of a missing letter, and no mathematics in it
    perturbed = viz.perturbations(np.zeros((2, 3, 8, 8, 1)), np.zeros(3), 1, ["猫", "$dog_1$"])
    rendered(perturbed)


def test_a_class_without_a_name_is_refused():
    with pytest.raises(ValueError, match="misread: got 2 names, but there is a class 8"):
        viz.misread(np.zeros((2, 8, 8, 1)), [0, 1], [0, 8], "01")
    with pytest.raises(ValueError, match="perturbations: got 2 names, but the label is 2"):
        viz.perturbations(np.zeros((2, 3, 8, 8, 1)), np.zeros(3), 2, "01")


def test_labels_of_another_number_than_images_are_refused():
    with pytest.raises(ValueError, match=r"labels \[N\] and predicted \[N\]"):
        viz.misread(np.zeros((3, 8, 8, 1)), [1, 2, 3], [1, 2], DIGITS)
