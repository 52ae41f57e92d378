"""SIGINT and SIGTERM, as a run takes them."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm


class StopSignals:
    """Collects SIGINT and SIGTERM while it is entered; a second one ends the process at once.

    Of several processes that train together, each may get its signal in another step. All have to
    end after the same one, since none can do a step without the others: JAX's coordination service
    catches SIGTERM in each, and finds a step that none has done yet.
    """

    def __init__(self) -> None:
        self._together = jax.process_count() > 1
        self._received: int | None = None

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGINT] if self._together else [signal.SIGINT, signal.SIGTERM]
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self, step: int | None = None) -> bool:
        """Whether to end now: after a step, or between two, where one of several never does."""
        if not self._together:
            return self._received is not None
        # Orbax asks at every save, with the step, too.
        return step is not None and multihost_utils.reached_preemption_sync_point(step)

    @property
    def status(self) -> int:
        """The exit status that says which signal it was."""
        return 128 + (self._received or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._received = number
        if self._together:
            signal.raise_signal(signal.SIGTERM)
        tqdm.write(f"{signal.Signals(number).name}: ends after this step, with a checkpoint")
