"""Tables in Markdown, and the marked places in files where table.py writes them."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

BEGIN = "<!-- {}: python experiments/table.py -->\n"
END = "<!-- end of {} -->\n"


def make_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Makes a table in Markdown of rows by column, without columns of which no row has anything."""
    columns = [column for column in columns if any(row.get(column) for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def format_mean(errors: Sequence[float]) -> str:
    """Writes the mean and, of several seeds, the standard deviation."""
    if len(errors) == 1:
        return f"{errors[0]:.2f}"
    return f"{statistics.mean(errors):.3f} ± {statistics.stdev(errors):.3f}"


def write_between_marks(path: Path, mark: str, text: str) -> None:
    """Replaces what stands between the two marks of a name in a file."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN.format(mark))
    _, end, after = rest.partition(END.format(mark))
    if not (begin and end):
        raise SystemExit(f"{path}: there is no {BEGIN.format(mark)}…\n{END.format(mark)}")
    path.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")
