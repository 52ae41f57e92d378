"""Several processes that train one network: how they start together and end together."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator

import jax

from capsjax import sharding
from settings import Processes

_IN_STEP = (130, 143)  # exit statuses that all processes come to after the same step


def join(processes: Processes, *, testing: bool) -> None:
    """Joins the others, if there are any; of several processes the first speaks for all.

    Args:
      processes: which of them this is.
      testing: nothing is to be saved, so SIGTERM ends it at once.

    Raises:
      ValueError: in words, if they cannot be found or reached.
    """
    if testing:
        jax.config.update("jax_enable_preemption_service", False)
    if processes.distributed or processes.coordinator is not None:
        where = f"at {processes.coordinator}" if processes.coordinator else "of the launcher"
        print(f"waits for the other processes {where}, 5 minutes at most", file=sys.stderr)
        # While it waits, JAX would not let Python see Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
        sharding.connect(processes.coordinator, processes.num_processes, processes.process_id)
        signal.signal(signal.SIGINT, before)
        if jax.process_count() == 1:  # JAX's service has SIGTERM now, and nobody asks it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the process ends


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Ends a process that failed at once, and by that the others.

    Left to Python it would first wait for all others to be done, and they wait for it.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        status = 1
        if isinstance(error, SystemExit):
            if error.code in _IN_STEP:
                raise
            status = error.code if isinstance(error.code, int) else 1
        elif isinstance(error, KeyboardInterrupt):
            status = 130
        elif isinstance(error, jax.errors.JaxRuntimeError):
            print(_lost(error), file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _lost(error: Exception) -> str:
    causes = [e for e in (error.__context__, error) if e is not None]  # a full disk, say, is first
    reasons = "; ".join(str(e).partition("\n")[0] for e in causes)
    return (
        f"error: process {jax.process_index()} of {jax.process_count()} failed or lost another "
        f"one: {reasons}\n"
        "what was saved before is kept; start all of them again with --resume"
    )
