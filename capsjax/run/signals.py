"""SIGINT and SIGTERM: how a run receives them."""

import signal
import threading
import time
from types import FrameType

from jax.experimental import multihost_utils
from tqdm import tqdm

# JAX polls for SIGTERM once a second and then needs all processes briefly; one that has already
# left would make the others wait for minutes.
_POLL_SECONDS = 2


class StopSignals:
    """Collects SIGINT and SIGTERM while it is entered; a second SIGINT ends the process at once.

    Where several processes train together, each may receive its signal at another moment, but all
    have to stop at the same one, since none can do a step without the others. JAX's coordination
    service catches SIGTERM in each and finds a moment that none has passed yet.

    Python lets the main thread alone receive signals; in another thread none is collected.

    Args:
      collective: whether several processes train together.
    """

    def __init__(self, *, collective: bool) -> None:
        self._collective = collective
        self._received: int | None = None
        self._asked = 0

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGINT] if self._collective else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._collective and self._before:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._collective:
            time.sleep(_POLL_SECONDS)

    def stop(self) -> bool:
        """Returns whether to stop. Collective: every process must call it equally often."""
        if not self._collective:
            return self._received is not None
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    @property
    def status(self) -> int:
        """The exit status that tells which signal it was."""
        return 128 + (self._received or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Python handler would wait for the step
        if self._collective:
            signal.raise_signal(signal.SIGTERM)
        when = "soon, with all others," if self._collective else "after this step,"
        tqdm.write(f"{signal.Signals(number).name}: ends {when} with a checkpoint")
