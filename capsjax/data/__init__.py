"""Data sets as uint8 arrays, and augmentation as pure, key-first, jittable functions."""

from capsjax.data._dataset import DataError, Dataset
from capsjax.data._load import load
from capsjax.data._overlap import Pairs, overlap
from capsjax.data._shift import crop, shift
from capsjax.data._warp import warp

__all__ = ["DataError", "Dataset", "Pairs", "crop", "load", "overlap", "shift", "warp"]
