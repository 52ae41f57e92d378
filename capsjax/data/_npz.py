"""`.npz` archives: x_train, y_train, x_test, y_test and, if there, class_names."""

from pathlib import Path

import numpy as np

from ._dataset import DataError

_REQUIRED = ("x_train", "y_train", "x_test", "y_test")


def read(path: Path, *, optional: tuple[str, ...] = ("class_names",)) -> dict[str, np.ndarray]:
    """The four arrays of a data set, and the optional ones that are there, by name."""
    try:
        # A pickle can run any command when it is opened, so Python objects are refused.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            there = archive.files
            arrays = {n: archive[n] for n in (*_REQUIRED, *optional) if n in there}
    # Damage surfaces as whatever the layers raise: zip, LZMA, zlib, NumPy's header parser.
    except Exception as error:
        raise DataError(
            f"{path}: expected an .npz archive of plain arrays, but reading it failed ({error}); "
            "it is damaged or holds Python objects: write it again with np.savez"
        ) from error
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing:
        raise DataError(
            f"{path}: expected the arrays {', '.join(_REQUIRED)}; {', '.join(missing)} missing, "
            f"there are {', '.join(there) or 'none'}; name them so in np.savez"
        )
    if "class_names" in arrays and arrays["class_names"].ndim != 1:
        raise DataError(
            f"{path}: expected class_names as a list of names, came {arrays['class_names']!r}"
        )
    return arrays
