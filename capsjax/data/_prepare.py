"""Prepares the MNIST family through TFDS without TensorFlow, as TFDS's own builders do with it."""

import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import mnist as stock
from tqdm import tqdm

from capsjax.data import _download, _idx, _mnist_family, _tfds
from capsjax.data._dataset import DataError

_BUILDERS = {
    "mnist": stock.MNIST,
    "fashion_mnist": stock.FashionMNIST,
    "kmnist": stock.KMNIST,
    "emnist": stock.EMNIST,
}


def prepare(name: str, folder: Path) -> None:
    """Downloads a data set and prepares it in TFDS's data_dir `folder`, whole or not at all."""
    if name not in _mnist_family.NAMES:
        raise DataError(
            f"expected one of {', '.join(_mnist_family.NAMES)} to download, got {name!r}; TFDS "
            f"needs TensorFlow to prepare any other: tfds build {name} --file_format=array_record"
        )
    family, _, config = name.partition("/")
    url = _BUILDERS[family].URL
    _download.probe(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".capsjax-download-") as draft:
            arrays = _fetch(_BUILDERS[family], name, Path(draft))
            _build(_BUILDERS[family], config, arrays, Path(draft))
            _tfds.load(name, Path(draft))  # checks that it can be read, and fills the cache
            _move(Path(draft) / family, folder / family)
    except DataError:
        raise
    # The disk may be full, the folder read-only, or TFDS may reject a label.
    except Exception as error:
        raise DataError(
            f"{folder}: {name} could not be prepared here ({' '.join(str(error).split())}); "
            "make room or choose another folder with data_dir (--data-dir)"
        ) from error


def _fetch(builder: Any, name: str, draft: Path) -> dict[str, np.ndarray]:
    """Downloads the files that TFDS's own builder would, and returns their arrays."""
    infos = builder.url_infos or {}

    def get(url: str) -> Path:
        path = draft / url.rpartition("/")[-1]
        _download.fetch(url, path, infos[url].checksum if url in infos else None)
        return path

    names = {array: f"{file}.gz" for array, file in _idx.get_file_names(name).items()}
    if name.startswith("emnist/"):
        content = _unzip(get(builder.URL), {a: f"gzip/{file}" for a, file in names.items()})
    else:
        content = {a: get(urljoin(builder.URL, file)).read_bytes() for a, file in names.items()}
    return {a: _idx.parse(_idx.decompress(c, names[a]), a, names[a]) for a, c in content.items()}


def _unzip(path: Path, members: dict[str, str]) -> dict[str, bytes]:
    """Returns the content of the archive's members, by array."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {array: archive.read(member) for array, member in members.items()}
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(
            f"{path.name}: expected a zip archive of EMNIST's files, but reading it failed "
            f"({error}); try again later"
        ) from error


def _build(stock_builder: Any, config: str, arrays: dict[str, np.ndarray], folder: Path) -> None:
    """Has TFDS write the arrays as a prepared data set, and shows a progress bar."""
    count = len(arrays["y_train"]) + len(arrays["y_test"])
    bar = tqdm(total=count, desc=f"preparing {stock_builder.name}", unit=" images", disable=None)
    builder = _derive_builder(stock_builder, arrays, bar)
    download_config = tfds.download.DownloadConfig(try_download_gcs=False)
    # TFDS prints to both streams whatever its settings; the bar has already taken its stream.
    with bar, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        builder(data_dir=folder, config=config or None).download_and_prepare(
            file_format="array_record", download_config=download_config
        )


def _derive_builder(stock_builder: Any, arrays: dict[str, np.ndarray], bar: tqdm) -> Any:
    """Returns TFDS's own builder, with its two steps that need TensorFlow replaced."""

    class Builder(stock_builder, skip_registration=True):  # type: ignore[call-arg]
        """TFDS's own builder, for arrays that are already in memory."""

        name = stock_builder.name

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
            return {split: self._generate_examples(split) for split in ("train", "test")}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            pairs = zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)
            for index, (image, label) in enumerate(pairs):
                yield index, {"image": _encode_png(image), "label": int(label)}
                bar.update()

    return Builder


def _encode_png(image: np.ndarray) -> bytes:
    """Returns the image as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _move(source: Path, target: Path) -> None:
    """Puts a prepared data set in place by one rename of its version's folder."""
    (prepared,) = source.rglob("dataset_info.json")
    version = prepared.parent
    destination = target / version.relative_to(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    if (source / ".config").is_dir():
        shutil.copytree(source / ".config", target / ".config", dirs_exist_ok=True)
    try:
        os.replace(version, destination)
    except OSError:  # another process was faster, or it cannot be moved there
        if not (destination / "dataset_info.json").is_file():
            raise
