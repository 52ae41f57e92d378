"""The harness: everything about one run, from its settings to its pictures."""

from capsjax.run.experiment import Experiment
from capsjax.run.lifecycle import Result, main, run
from capsjax.run.settings import Images, Recipe, Run, Settings

__all__ = ["Experiment", "Images", "Recipe", "Result", "Run", "Settings", "main", "run"]
