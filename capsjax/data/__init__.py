"""Data sets as uint8 arrays, and augmentation as pure, key-first, jittable functions."""

from ._dataset import DataError as DataError
from ._dataset import Dataset as Dataset
from ._load import load as load
from ._shift import shift as shift
