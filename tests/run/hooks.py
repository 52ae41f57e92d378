"""Interferes with a run of this process after a given step: signals, kills, changes."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

from capsjax.run import loop
from capsjax.train import Diagnostics, TrainState, jit_steps

Action = Callable[[TrainState, Diagnostics], tuple[TrainState, Diagnostics]]


def stand_in(step: Any, function: Any) -> Any:
    """Lets a function stand in for a jitted step, which the loop compiles before it calls it."""
    function.lower = step.lower
    return function


@contextlib.contextmanager
def after_step(step: int, act: Action) -> Iterator[None]:
    """Calls `act` with the state and diagnostics of a step; what it returns takes effect."""

    def jit_steps_with_hook(*args: Any) -> tuple[Callable, Callable]:
        train, evaluate = jit_steps(*args)

        def train_with_hook(*args: Any) -> tuple[TrainState, Diagnostics]:
            state, diagnostics = train(*args)
            return act(state, diagnostics) if diagnostics.step == step else (state, diagnostics)

        return stand_in(train, train_with_hook), evaluate

    with mock.patch.object(loop, "jit_steps", jit_steps_with_hook):
        yield


def raise_signal(number: signal.Signals = signal.SIGTERM) -> Action:
    """Makes an action for `after_step`: the process gets a signal."""

    def act(state: TrainState, diagnostics: Diagnostics) -> tuple[TrainState, Diagnostics]:
        signal.raise_signal(number)
        return state, diagnostics

    return act


def kill(state: TrainState, diagnostics: Diagnostics) -> NoReturn:
    """Acts like SIGKILL for `after_step`: nothing more is written."""
    raise MemoryError
