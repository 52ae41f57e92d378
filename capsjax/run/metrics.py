"""The metrics of a run: means over images, the columns of metrics.csv, the line a person reads."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from capsjax.train import Sums

SPLITS = ("train", "validation", "test")


class Metrics(NamedTuple):
    """Means over a set of images."""

    losses: dict[str, float]  # by the names that the task gives
    wrong: int
    examples: int

    @property
    def loss(self) -> float:
        """The total loss."""
        return self.losses["loss"]

    @property
    def error(self) -> float:
        """The share of wrong answers, in percent."""
        return 100 * self.wrong / self.examples


def average(sums: Sums) -> Metrics:
    """Divides sums over examples by their number."""
    n = int(sums.examples)
    losses = {name: float(loss) / n for name, loss in sums.losses.items()}
    return Metrics(losses, n - int(sums.correct), n)


def list_columns(loss_names: Iterable[str]) -> tuple[str, ...]:
    """Returns the columns of metrics.csv for losses of these names."""
    names = (*loss_names, "error")
    return (
        *("epoch", "step", "learning_rate"),
        *(f"{split}_{name}" for split in SPLITS for name in names),
        *("seconds", "images_per_second"),
    )


def make_row(
    epoch: int, step: int, learning_rate: float, seconds: float, metrics: dict[str, Metrics]
) -> dict[str, Any]:
    """Makes the row of an epoch: losses are means over images, errors percent.

    Args:
      epoch: from 1.
      step: steps done.
      learning_rate: at the epoch's first step.
      seconds: of training, without evaluation.
      metrics: of each split that there is.
    """
    row: dict[str, Any] = {
        "epoch": epoch,
        "step": step,
        "learning_rate": f"{learning_rate:.6g}",
        "seconds": f"{seconds:.2f}",
        "images_per_second": f"{metrics['train'].examples / seconds:.1f}",
    }
    for split, values in metrics.items():
        row |= {f"{split}_{name}": f"{loss:.6f}" for name, loss in values.losses.items()}
        row[f"{split}_error"] = f"{values.error:.4f}"
    return row


def summarize(row: dict[str, Any], epochs: int) -> str:
    """Writes a row of metrics.csv as the line that a person reads."""
    parts = [
        f"{split} loss {row[f'{split}_loss']} error {float(row[f'{split}_error']):.2f} %"
        for split in SPLITS
        if f"{split}_loss" in row
    ]
    speed = f"{float(row['seconds']):.0f} s, {float(row['images_per_second']):.0f} images/s"
    return f"epoch {row['epoch']}/{epochs}: {', '.join(parts)}, {speed}"
