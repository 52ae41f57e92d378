"""Text in figures: one font and one resolution, so that it can be measured before it is drawn."""

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

DPI = 100
FONT = FontProperties(size=9)
TITLE_FONT = FontProperties(size=11)
_LONGEST_NAME = 20  # characters


def write_title(axes: Axes, title: str) -> None:
    """Writes a title at the upper left of the axes, any dollar signs in it as they are."""
    axes.set_title(title, fontproperties=TITLE_FONT, loc="left", parse_math=False)


def draw_sentence(text: str) -> Figure:
    """Draws a figure of one sentence, where there is nothing else to draw."""
    figure = Figure(figsize=(4.8, 1.2), dpi=DPI)
    figure.text(0.5, 0.5, text, fontproperties=TITLE_FONT, ha="center", va="center")
    return figure


def measure_width(line: str, font: FontProperties = FONT) -> float:
    """Returns the width of a line of text in screen pixels."""
    width, _, _ = RendererAgg(1, 1, DPI).get_text_width_height_descent(line, font, False)
    return width


def format_class_name(name: str, number: int) -> str:
    """Returns the name, shortened if it is long, or the number if the font lacks a character."""
    font = get_font(findfont(FONT))
    if not all(font.get_char_index(ord(character)) for character in name):
        return f"class {number}"
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
