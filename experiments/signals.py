"""SIGINT and SIGTERM, as a run takes them."""

import signal
import time
from types import FrameType

from jax.experimental import multihost_utils
from tqdm import tqdm

# JAX looks for a SIGTERM once a second, and then needs all processes for a moment: one that has
# left by then would make the others wait for it for minutes.
_NOTICE = 2


class StopSignals:
    """Collects SIGINT and SIGTERM while it is entered; a SIGINT after one ends the process at once.

    Of several processes that train together, each may get its signal at another moment. All have to
    end at the same one, since none can do a step without the others: JAX's coordination service
    catches SIGTERM in each, and finds a moment that none has come to yet.

    Args:
      together: whether several processes train.
    """

    def __init__(self, *, together: bool) -> None:
        self._together = together
        self._received: int | None = None
        self._asked = 0

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGINT] if self._together else [signal.SIGINT, signal.SIGTERM]
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._together:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_NOTICE)

    def stop(self) -> bool:
        """Whether to end now; all processes ask at the same moments, for these are counted."""
        if not self._together:
            return self._received is not None
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    @property
    def status(self) -> int:
        """The exit status that says which signal it was."""
        return 128 + (self._received or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handlers would wait for the step
        if self._together:
            signal.raise_signal(signal.SIGTERM)
        when = "soon, with all others," if self._together else "after this step,"
        tqdm.write(f"{signal.Signals(number).name}: ends {when} with a checkpoint")
