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
        """Whether to end now: after `step`, or, as one process alone can, between steps."""
        if self._together and step is not None:
            return multihost_utils.reached_preemption_sync_point(step)  # Orbax asks so, too
        return self._received is not None and not self._together

    def stop_before(self, first: int) -> bool:
        """Whether to end before the first step that this process does, its number.

        The service compares numbers, so those that a resumed run leaves out have to be called, too.
        """
        return any(self.stop(step) for step in range(1, first)) if self._together else self.stop()

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
        when = "a coming step of all" if self._together else "this step"
        tqdm.write(f"{signal.Signals(number).name}: ends after {when}, with a checkpoint")
