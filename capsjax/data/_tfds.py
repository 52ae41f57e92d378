"""Finds data sets that TFDS prepared, and loads them: they are decoded once, then cached."""

import json
import os
import re
from pathlib import Path

from capsjax.data import _cache, _mnist_family
from capsjax.data._dataset import DataError, Dataset

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_INFO = "dataset_info.json"


def get_default_folder() -> Path:
    """Returns the default data_dir of TFDS without importing it, which takes most of a second."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(default).expanduser()


def load(name: str, folder: Path) -> Dataset | None:
    """Loads the data set prepared in `folder` or `folder/name`, or returns None without one."""
    prepared = _find_newest(folder) or _find_newest(folder / name)
    if prepared is None:
        return None
    full_name = _read_full_name(prepared)
    if name in _mnist_family.NAMES and name != full_name:
        raise DataError(
            f"{prepared}: expected {name}, but TFDS prepared {full_name} there; ask for that name "
            "or for another folder"
        )
    source = f"{full_name}: prepared by TFDS in {prepared}"
    dataset = _cache.read(prepared, source)
    if dataset is None:
        from capsjax.data import _tfds_reader  # imported late: it loads tensorflow_datasets

        dataset = _tfds_reader.read(prepared, full_name, source)
        _cache.write(prepared, dataset)
    return dataset


def list_configs(name: str, folder: Path) -> list[str]:
    """Lists the prepared configs of a data set, such as emnist/letters for emnist."""
    versions = (folder / name).glob(f"*/*/{_INFO}")
    return sorted({f"{name}/{info.parent.parent.name}" for info in versions})


def _find_newest(folder: Path) -> Path | None:
    """Returns the folder itself if TFDS prepared it, or else the highest version in it."""
    if (folder / _INFO).is_file():
        return folder
    versions = {}
    for info in folder.glob(f"*/{_INFO}"):
        if number := _VERSION.fullmatch(info.parent.name):
            versions[tuple(map(int, number.groups()))] = info.parent
    return versions[max(versions)] if versions else None


def _read_full_name(prepared: Path) -> str:
    """Returns the TFDS name with its config, such as emnist/letters."""
    try:
        info = json.loads((prepared / _INFO).read_bytes())
        return "/".join(filter(None, (info["name"], info.get("configName"))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{prepared / _INFO}: expected a file that TFDS wrote, but reading it failed "
            f"({error!r}); remove the folder and prepare the data set again"
        ) from error
