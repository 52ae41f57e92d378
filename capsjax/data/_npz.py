"""`.npz` archives of x_train, y_train, x_test, y_test and, optionally, class_names."""

from pathlib import Path

import numpy as np

from capsjax.data._dataset import DataError

_REQUIRED = ("x_train", "y_train", "x_test", "y_test")


def read(path: Path, *, optional: tuple[str, ...] = ("class_names",)) -> dict[str, np.ndarray]:
    """Returns the four arrays of a data set by name, and the optional ones that are present."""
    try:
        # Opening a pickle can run any command, so Python objects are refused.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            present = archive.files
            arrays = {n: archive[n] for n in (*_REQUIRED, *optional) if n in present}
    # A damaged file may raise the exceptions of zip, LZMA, zlib or NumPy's header parser.
    except Exception as error:
        raise DataError(
            f"{path}: expected an .npz archive of plain arrays, but reading it failed ({error}); "
            "it is damaged or holds Python objects: write it again with np.savez"
        ) from error
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing:
        raise DataError(
            f"{path}: expected the arrays {', '.join(_REQUIRED)}, got "
            f"{', '.join(present) or 'none'}, with {', '.join(missing)} missing; give them these "
            "names in np.savez"
        )
    if "class_names" in arrays and arrays["class_names"].ndim != 1:
        raise DataError(
            f"{path}: expected class_names to be a list of names, got {arrays['class_names']!r}; "
            "write one name for each class"
        )
    return arrays
