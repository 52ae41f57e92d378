"""Trains on MNIST or on your own images: `python -m capsjax.run --help`."""

from capsjax.run.experiment import Experiment
from capsjax.run.lifecycle import main

if __name__ == "__main__":
    main(Experiment())
