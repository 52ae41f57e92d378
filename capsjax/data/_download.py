"""Downloads files over HTTP, each of them whole or not at all, and never waits without a limit.

TFDS's own downloader sets no timeout: a stalled server blocks it for ever, and its threads keep the
process alive after Ctrl-C until the transfer has ended. Only its checksums are used here.
"""

import errno
import hashlib
import http.client
import threading
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from capsjax.data._dataset import DataError

_PROBE_SECONDS = 3
_MORE_SECONDS = 1  # for the lookup of the host's name
_STALL_SECONDS = 30
_CHUNK = 1 << 18
_AGENT = {"User-Agent": "Mozilla/5.0 (compatible; capsjax)"}  # some servers reject Python's own
_ADVICE = (
    "check the network and the proxy settings, or get the files by other means and give their "
    "folder as data_dir (--data-dir)"
)


def probe(url: str) -> None:
    """Checks within seconds that a server answers at the URL.

    Raises:
      DataError: if none does.
    """
    outcome: list[Exception | None] = []
    # In a thread, because the lookup of a host name cannot be given a timeout.
    thread = threading.Thread(target=lambda: outcome.append(_try_head(url)), daemon=True)
    thread.start()
    seconds = _PROBE_SECONDS + _MORE_SECONDS
    thread.join(seconds)
    if not outcome:
        raise DataError(f"{url}: no answer within {seconds} seconds; {_ADVICE}")
    if outcome[0] is not None:
        raise DataError(f"{url}: cannot be reached ({outcome[0]}); {_ADVICE}") from outcome[0]


def fetch(url: str, path: Path, sha256: str | None) -> None:
    """Downloads a URL to a file.

    Raises:
      DataError: if the server refuses, stalls or breaks off, or the checksum is wrong.
      OSError: if the disk is full.
    """
    try:
        expected, digest = _transfer(url, path)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise DataError(f"{url}: the download failed ({error}); {_ADVICE}") from error
    size = path.stat().st_size
    if expected is not None and size != expected:
        raise DataError(f"{url}: expected {expected} bytes, got only {size}; try again later")
    if sha256 is not None and digest != sha256:
        raise DataError(
            f"{url}: expected sha256 {sha256}, got {digest}, so the file was altered in transit or "
            "at its source; try again later"
        )


def _transfer(url: str, path: Path) -> tuple[int | None, str]:
    """Writes the URL's content to the file; returns the announced length and the SHA-256."""
    digest = hashlib.sha256()
    request = urllib.request.Request(url, headers=_AGENT)
    with urllib.request.urlopen(request, timeout=_STALL_SECONDS) as response:
        length = response.headers["Content-Length"]
        total = int(length) if length else None
        with (
            path.open("wb") as file,
            tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    return total, digest.hexdigest()


def _try_head(url: str) -> Exception | None:
    """Returns the error of a HEAD request, or None if the server answered it."""
    request = urllib.request.Request(url, method="HEAD", headers=_AGENT)
    try:
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer too: some servers allow only GET, and `fetch` reports the rest
    except (OSError, http.client.HTTPException) as error:
        return error
    return None
