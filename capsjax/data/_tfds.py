"""Data sets that TFDS prepared: where they are, and their arrays, decoded once and then cached."""

import json
import os
import re
from pathlib import Path

from . import _cache
from ._dataset import DataError, Dataset

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_INFO = "dataset_info.json"


def default_folder() -> Path:
    """Where TFDS itself looks, found without its import, which takes most of a second."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(default).expanduser()


def load(name: str, folder: Path) -> Dataset | None:
    """The data set prepared in `folder`, or in `folder/name`; None where there is none."""
    prepared = _newest(folder) or _newest(folder / name)
    if prepared is None:
        return None
    what = _full_name(prepared)
    source = f"{what}: prepared by TFDS in {prepared}"
    dataset = _cache.read(prepared, source)
    if dataset is None:
        from . import _tfds_reader  # it imports tensorflow_datasets

        dataset = _tfds_reader.read(prepared, what, source)
        _cache.write(prepared, dataset)
    return dataset


def configs(name: str, folder: Path) -> list[str]:
    """The parts of a data set that are prepared, each under a name of its own."""
    versions = (folder / name).glob(f"*/*/{_INFO}")
    return sorted({f"{name}/{info.parent.parent.name}" for info in versions})


def _newest(folder: Path) -> Path | None:
    """The folder itself if TFDS prepared it, else the highest version in it."""
    if (folder / _INFO).is_file():
        return folder
    versions = {}
    for info in folder.glob(f"*/{_INFO}"):
        if number := _VERSION.fullmatch(info.parent.name):
            versions[tuple(map(int, number.groups()))] = info.parent
    return versions[max(versions)] if versions else None


def _full_name(prepared: Path) -> str:
    """The TFDS name with its config, such as emnist/letters."""
    try:
        info = json.loads((prepared / _INFO).read_bytes())
        return "/".join(filter(None, (info["name"], info.get("configName"))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{prepared / _INFO}: expected what TFDS writes, but reading it failed ({error!r}); "
            "remove the folder and prepare the data set again"
        ) from error
