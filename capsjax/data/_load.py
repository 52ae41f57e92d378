"""Finds the source of a data set and loads it."""

import difflib
import re
import shlex
from pathlib import Path

import numpy as np

from capsjax.data import _folders, _idx, _mnist_family, _npz, _shipped_mnist, _small_norb, _tfds
from capsjax.data._dataset import DataError, Dataset, Names, build_dataset

_NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)


def load(
    name: str = "mnist", data_dir: str | Path | None = None, *, download: bool = False
) -> Dataset:
    """Loads labelled images as uint8 arrays; the result's `source` says where they were found.

    `data_dir` may be any of these:

    - a folder with a data set that TFDS prepared as array_record or tfrecord: either TFDS's own
      data_dir or the folder of the data set in it;
    - a folder of IDX files, gzipped or not: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
      `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, or `emnist-letters-train-images-…`;
    - a folder of smallNORB's own files, `smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat`, its
      `-cat.mat` and both of `…-testing`, gzipped or not; the photographs of both cameras become two
      channels, and each 2 × 2 of their 96 × 96 pixels one pixel;
    - an `.npz` file, or a folder with one, of uint8 images `x_train`, `x_test` [N, H, W] or
      [N, H, W, C], labels `y_train`, `y_test` [N] and, optionally, `class_names`;
    - a folder with `train/<class>/*.png|jpg|jpeg` and `test/<class>/…`, grey or RGB, all of one
      size; the classes are numbered in the order of their names.

    Without it, the data set is looked up in TFDS's default folder (`TFDS_DATA_DIR`, or
    `~/tensorflow_datasets`). If `"mnist"` is not there, the archive shipped with the package is
    read.

    Labels are numbered from 0 without a gap. EMNIST's files store every image with rows and columns
    exchanged and number the letters from 1; here, from IDX files and from TFDS alike, its images
    are upright and the letters are 0 to 25, named A to Z. Images keep the order of their source;
    TFDS shuffles them when it prepares a data set.

    Args:
      name: a TFDS name such as `"mnist"`, `"fashion_mnist"`, `"kmnist"`, `"emnist/letters"` or
        `"cifar10"`. With `data_dir`, it identifies the files there: images of 28×28 under the name
        of a member of the MNIST family get the classes of that member. Give your own data a name
        of their own.
      data_dir: the data, as described above; with `download`, also the destination.
      download: whether to download a missing member of the MNIST family and prepare it with TFDS.

    Returns:
      A `Dataset`.

    Raises:
      DataError: if no data set of this name is found (the message contains the command that
        prepares it), or if it is damaged, incomplete or of another form than described above.

    Example:
      >>> from capsjax import data
      >>> mnist = data.load("mnist")
      >>> mnist.x_train.shape, mnist.y_train[:5]
      ((60000, 28, 28, 1), array([5, 0, 4, 1, 9], dtype=int32))

    References:
      LeCun, Bottou, Bengio, Haffner, 1998, http://yann.lecun.com/exdb/mnist.
      LeCun, Huang, Bottou, 2004, https://cs.nyu.edu/~ylclab/data/norb-v1.0-small.
      Cohen, Afshar, Tapson, van Schaik, 2017, EMNIST, arXiv:1702.05373.
      TFDS, https://www.tensorflow.org/datasets.
    """
    if not _NAME.fullmatch(name):
        raise DataError(
            f"expected the name of a data set such as mnist or emnist/letters, got {name!r}"
        )
    try:
        folder = _tfds.get_default_folder() if data_dir is None else Path(data_dir).expanduser()
    except RuntimeError as error:  # there is no such user
        raise DataError(f"{data_dir}: no such folder ({error})") from error
    try:
        dataset = _tfds.load(name, folder) if data_dir is None else _load_path(folder, name)
        if dataset is None and download:
            dataset = _download(name, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error}); check its permissions") from error
    if dataset is None and data_dir is None and name == "mnist":
        dataset = _load_archive()
    if dataset is None:
        raise _explain_absence(name, folder, given=data_dir is not None)
    return dataset


def _download(name: str, folder: Path) -> Dataset | None:
    """Has a member of the MNIST family prepared in the folder, and loads it."""
    from capsjax.data import _prepare  # imported late: it loads tensorflow_datasets

    _prepare.prepare(name, folder)
    return _tfds.load(name, folder)


def _load_archive() -> Dataset:
    """Loads MNIST from the archive shipped with the package."""
    names = _mnist_family.find_class_names("mnist", _mnist_family.IMAGE_SHAPE)
    source = "mnist: the archive shipped with capsjax"
    return build_dataset(**_shipped_mnist.load(), class_names=names, source=source)


def _load_path(path: Path, name: str) -> Dataset | None:
    """Loads the data set at a path that the user gave, or returns None if there is none."""
    if path.is_file():
        return _load_npz(path, name)
    if dataset := _tfds.load(name, path):
        return dataset
    if files := _idx.find(path, name):
        return _load_idx(files, path, name)
    if files := _small_norb.find(path):
        arrays, names = _small_norb.read(files), _small_norb.CLASS_NAMES
        return build_dataset(**arrays, class_names=names, source=f"smallNORB: its files in {path}")
    if _folders.has_splits(path):
        arrays, classes = _folders.read(path)
        return build_dataset(**arrays, class_names=classes, source=f"class folders in {path}")
    archives = [path / f"{name}.npz"] if (path / f"{name}.npz").is_file() else [*path.glob("*.npz")]
    if len(archives) > 1:
        raise DataError(f"{path}: holds {len(archives)} .npz files; give the path of one of them")
    return _load_npz(archives[0], name) if archives else None


def _load_idx(files: dict[str, Path], folder: Path, name: str) -> Dataset:
    """Loads four IDX files as the data set `name`."""
    arrays = _idx.read(files)
    names = _mnist_family.find_class_names(name, (*arrays["x_train"].shape[1:], 1))
    for split in ("train", "test"):
        arrays[f"x_{split}"] = _mnist_family.turn_upright(name, arrays[f"x_{split}"])
        if names:
            arrays[f"y_{split}"] = _mnist_family.number_from_zero(name, arrays[f"y_{split}"])
    return _build_named(arrays, names, name, source=f"{name}: IDX files in {folder}")


def _load_npz(path: Path, name: str) -> Dataset:
    """Loads an `.npz` archive as the data set `name`."""
    if path.suffix != ".npz":
        raise DataError(
            f"{path}: expected a folder or an .npz file, got a file of another kind; give one of "
            "the two"
        )
    arrays = _npz.read(path)
    names: Names = arrays.pop("class_names", None)
    if names is None:
        names = _mnist_family.find_class_names(name, (*arrays["x_train"].shape[1:], 1)[:3])
    return _build_named(arrays, names, name, source=f"{name}: the arrays in {path}")


def _build_named(arrays: dict[str, np.ndarray], names: Names, name: str, *, source: str) -> Dataset:
    """Builds the data set of files that carry no name; `name` supplies it."""
    dataset = build_dataset(**arrays, class_names=names, source=source)
    if name == "mnist":
        _shipped_mnist.verify(dataset)
    return dataset


def _explain_absence(name: str, folder: Path, *, given: bool) -> DataError:
    """Returns the error for a data set that was not found, with the command that prepares it."""
    parts = [part for part in _mnist_family.NAMES if part.startswith(f"{name}/")]
    if parts := _tfds.list_configs(name, folder) or parts:
        return DataError(f"{name} is several data sets, {', '.join(parts)}: name one of them")
    absence = _describe_absence(name, folder, given)
    return DataError(f"{absence} {_suggest_remedy(name, folder, given)}")


def _describe_absence(name: str, folder: Path, given: bool) -> str:
    """Returns the part of the error that says where the data set was looked for."""
    if not given:
        return f"{name} is not prepared in TFDS's default folder {folder};"
    if not folder.exists():
        return f"{folder} does not exist, but {name} was expected there;"
    return (
        f"{folder} holds no {name}: expected a data set that TFDS prepared, four IDX files, "
        "those of smallNORB, an .npz file, or class folders train/<class>/ and test/<class>/ of "
        "PNG or JPEG images;"
    )


def _suggest_remedy(name: str, folder: Path, given: bool) -> str:
    """Returns the part of the error that says what to do."""
    path = shlex.quote(str(folder))
    if name in _mnist_family.NAMES:
        where = f" --data-dir {path}" if given else ""
        return f"download it with: python -m capsjax.run --dataset {name} --download{where}"
    from capsjax.data import _tfds_reader  # imported late: it loads tensorflow_datasets

    known = _tfds_reader.list_known_names()
    if name.partition("/")[0] in known:
        where = f" --data_dir={path}" if given else ""
        build = f"tfds build {name} --file_format=array_record{where}"
        return f"prepare it with: python -m pip install tensorflow && {build}"
    close = difflib.get_close_matches(name, sorted({*_mnist_family.NAMES, *known}), n=3)
    question = f"did you mean {' or '.join(close)}? Or " if close else ""
    return (
        f"TFDS prepares no data set of that name either; {question}give the folder of your own "
        "images as data_dir (--data-dir)"
    )
