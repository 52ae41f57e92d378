"""Files over HTTP that arrive whole or not at all, and never leave anyone waiting.

TFDS's own downloader sets no timeout, so that a stalled server holds it for ever, and its threads
keep the process alive after Ctrl-C until the transfer has ended. Its checksums are used here.
"""

import hashlib
import http.client
import threading
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from ._dataset import DataError

_PROBE_SECONDS = 3
_STALL_SECONDS = 30
_CHUNK = 1 << 18
_AGENT = {"User-Agent": "Mozilla/5.0 (compatible; capsjax)"}  # some servers turn Python's away
_ADVICE = "check the network (or the proxy settings), or put the files into a folder by other means"


def probe(url: str) -> None:
    """Ask whether anyone answers at a URL at all, within seconds.

    Raises:
      DataError: nobody does.
    """
    outcome: list[Exception | None] = []
    # In a thread, since looking up the host's name knows no timeout.
    thread = threading.Thread(target=lambda: outcome.append(_head(url)), daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 1)
    if not outcome:
        raise DataError(f"{url}: no answer within {_PROBE_SECONDS + 1} seconds; {_ADVICE}")
    if outcome[0] is not None:
        raise DataError(f"{url}: cannot be reached ({outcome[0]}); {_ADVICE}") from outcome[0]


def fetch(url: str, path: Path, sha256: str | None) -> None:
    """Download a URL to a file.

    Raises:
      DataError: the server refuses, stalls or breaks off, or the file has another checksum.
    """
    digest = hashlib.sha256()
    try:
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
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise DataError(f"{url}: the download failed ({error}); {_ADVICE}") from error
    if total is not None and path.stat().st_size != total:
        raise DataError(
            f"{url}: expected {total} bytes, only {path.stat().st_size} came; try again later"
        )
    if sha256 is not None and digest.hexdigest() != sha256:
        raise DataError(
            f"{url}: expected sha256 {sha256}, came {digest.hexdigest()}, so the file was altered "
            "on its way or at its source; try again later"
        )


def _head(url: str) -> Exception | None:
    request = urllib.request.Request(url, method="HEAD", headers=_AGENT)
    try:
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer all the same: what it means is seen when the file is asked for
    except (OSError, http.client.HTTPException) as error:
        return error
    return None
