"""Sizes of a network: integers of 1 or more."""

import operator
from typing import Any


def set_sizes(config: Any, *names: str) -> None:
    """Makes fields of a frozen config ints or, where the default is a tuple, tuples of ints.

    Thus the config is hashable and can be saved, whatever integers and sequences it was given.

    Raises:
      ValueError: if a field holds anything but integers of 1 or more.
    """
    for name in names:
        value = getattr(config, name)
        several = isinstance(getattr(type(config), name), tuple)
        try:
            sizes = [operator.index(size) for size in (value if several else (value,))]
        except TypeError:  # no integer, or no tuple of them
            sizes = [0]
        if min(sizes, default=1) < 1:
            network = type(config).__name__.removesuffix("Config")
            raise ValueError(f"{network}: sizes are integers of 1 or more, got {name} = {value!r}")
        object.__setattr__(config, name, tuple(sizes) if several else sizes[0])
