"""Which source a data set comes from."""

import difflib
import re
import shlex
from pathlib import Path

import numpy as np

from . import _archive, _family, _folders, _idx, _npz, _tfds
from ._dataset import DataError, Dataset, Names, checked

_NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)


def load(
    name: str = "mnist", data_dir: str | Path | None = None, *, download: bool = False
) -> Dataset:
    """Loads labelled images as uint8 arrays and says in `source` where they came from.

    What `data_dir` may be:

    - a folder with a data set that TFDS prepared (as array_record or tfrecord): TFDS's own data_dir
      or the data set's folder in it;
    - a folder of IDX files, gzipped or not: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
      `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, or `emnist-letters-train-images-…`;
    - an `.npz` file (or a folder with one) with uint8 images `x_train`, `x_test` `[N, H, W]` or
      `[N, H, W, C]`, labels `y_train`, `y_test` `[N]` and, if you like, `class_names`;
    - a folder with `train/<class>/*.png|jpg|jpeg` and `test/<class>/…`, grey or RGB, all of one
      size; the classes are numbered in the order of their names.

    Without one: the name prepared in TFDS's default folder (`TFDS_DATA_DIR`, or
    `~/tensorflow_datasets`), else for `"mnist"` the archive shipped in the package.

    Labels count from 0, without a gap. EMNIST's files hold every image with rows and columns
    exchanged and number the letters from 1; from IDX files and from TFDS alike, its images come
    upright here and the letters as 0 to 25, named A to Z. Images are in the order of their source;
    TFDS's is a shuffled one.

    Args:
      name: a TFDS name such as `"mnist"`, `"fashion_mnist"`, `"kmnist"`, `"emnist/letters"` or
        `"cifar10"`. With `data_dir` it says what the files are: 28×28 images called after a
        member of the MNIST family have its classes. Give your own data a name of their own.
      data_dir: where the data are, see above; with `download` also where they go.
      download: have TFDS download and prepare a member of the MNIST family that is not there yet.

    Returns:
      A `Dataset`.

    Raises:
      DataError: nothing of this name is there (the message has the command that prepares it), or
        what is there is damaged, incomplete or not of the described form.

    Reference: LeCun et al. 1998, http://yann.lecun.com/exdb/mnist; Cohen et al. 2017, EMNIST,
    https://arxiv.org/abs/1702.05373; https://www.tensorflow.org/datasets

    >>> from capsjax import data
    >>> mnist = data.load("mnist")
    >>> mnist.x_train.shape, mnist.y_train[:5]
    ((60000, 28, 28, 1), array([5, 0, 4, 1, 9], dtype=int32))
    """
    if not _NAME.fullmatch(name):
        raise DataError(
            f"expected the name of a data set such as mnist or emnist/letters, came {name!r}"
        )
    folder = _tfds.default_folder() if data_dir is None else Path(data_dir).expanduser()
    try:
        dataset = _tfds.load(name, folder) if data_dir is None else _from(folder, name)
        if dataset is None and download:
            dataset = _downloaded(name, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error}); check its permissions") from error
    if dataset is None and data_dir is None and name == "mnist":
        source = "mnist: the archive shipped with capsjax"
        names = _family.class_names(name, _family.IMAGE_SHAPE)
        dataset = checked(**_archive.load(), class_names=names, source=source)
    if dataset is None:
        raise _nowhere(name, folder, given=data_dir is not None)
    return dataset


def _downloaded(name: str, folder: Path) -> Dataset | None:
    from . import _prepare  # it imports tensorflow_datasets

    _prepare.prepare(name, folder)
    return _tfds.load(name, folder)


def _from(path: Path, name: str) -> Dataset | None:
    """The data set at a path that the user gave, None where there is none."""
    if path.is_file():
        return _from_npz(path, name)
    if dataset := _tfds.load(name, path):
        return dataset
    if files := _idx.find(path, name):
        return _from_idx(files, path, name)
    if _folders.find(path):
        arrays, classes = _folders.read(path)
        return checked(**arrays, class_names=classes, source=f"class folders in {path}")
    archives = [path / f"{name}.npz"] if (path / f"{name}.npz").is_file() else [*path.glob("*.npz")]
    if len(archives) > 1:
        raise DataError(f"{path}: holds {len(archives)} .npz files; give the path of one of them")
    return _from_npz(archives[0], name) if archives else None


def _from_idx(files: dict[str, Path], folder: Path, name: str) -> Dataset:
    arrays = _idx.read(files)
    names = _family.class_names(name, (*arrays["x_train"].shape[1:], 1))
    for split in ("train", "test"):
        arrays[f"x_{split}"] = _family.upright(name, arrays[f"x_{split}"])
        if names:
            arrays[f"y_{split}"] = _family.from_zero(name, arrays[f"y_{split}"])
    return _named(arrays, names, name, source=f"{name}: IDX files in {folder}")


def _from_npz(path: Path, name: str) -> Dataset:
    if path.suffix != ".npz":
        raise DataError(f"{path}: expected a folder or an .npz file, came another kind of file")
    arrays = _npz.read(path)
    names: Names = arrays.pop("class_names", None)
    if names is None:
        names = _family.class_names(name, (*arrays["x_train"].shape[1:], 1)[:3])
    return _named(arrays, names, name, source=f"{name}: the arrays in {path}")


def _named(arrays: dict[str, np.ndarray], names: Names, name: str, *, source: str) -> Dataset:
    """A data set of files that do not say what they are, so that the user's name for them does."""
    dataset = checked(**arrays, class_names=names, source=source)
    if name == "mnist":
        _archive.verify(dataset)
    return dataset


def _nowhere(name: str, folder: Path, *, given: bool) -> DataError:
    """The refusal, with the command that brings the data set."""
    path = shlex.quote(str(folder))
    parts = [part for part in _family.NAMES if part.startswith(f"{name}/")]
    if parts := _tfds.configs(name, folder) or parts:
        return DataError(f"{name} is several data sets, {', '.join(parts)}: name one of them")
    if name in _family.NAMES:
        where = f" --data-dir {path}" if given else ""
        remedy = f"python experiments/mnist.py --dataset {name} --download{where}"
        return DataError(f"{_found_none(name, folder, given)} download it with: {remedy}")
    from . import _tfds_reader  # it imports tensorflow_datasets

    known = _tfds_reader.known_names()
    if name.partition("/")[0] in known:
        where = f" --data_dir={path}" if given else ""
        remedy = (
            "python -m pip install tensorflow && "
            f"tfds build {name} --file_format=array_record{where}"
        )
        return DataError(f"{_found_none(name, folder, given)} prepare it with: {remedy}")
    close = difflib.get_close_matches(name, sorted({*_family.NAMES, *known}), n=3)
    return DataError(
        f"{_found_none(name, folder, given)} TFDS prepares no data set of that name either; "
        + (f"did you mean {' or '.join(close)}? Or " if close else "")
        + "give the folder of your own images as data_dir (--data-dir)"
    )


def _found_none(name: str, folder: Path, given: bool) -> str:
    if not given:
        return f"{name} is not prepared in TFDS's default folder {folder};"
    if not folder.exists():
        return f"{folder} does not exist, and {name} was to be there;"
    return (
        f"{folder} holds no {name}: expected a data set that TFDS prepared, four IDX files, "
        "an .npz file, or class folders train/<class>/ and test/<class>/ of PNG or JPEG images;"
    )
