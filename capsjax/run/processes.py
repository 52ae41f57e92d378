"""Several processes that train one network: how they join, agree, and end together."""

import contextlib
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from capsjax.run.settings import Processes

# Seconds without a heartbeat after which a process counts as dead, and the others end.
_HEARTBEAT_TIMEOUT = 30
# Seconds to wait for process 0, as long as JAX waits for the others.
_CONNECT_TIMEOUT = 300
# With which the message of a failed step begins.
_STATUS = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN): ")
# Exit statuses that all processes reach after the same step.
_COLLECTIVE_STATUSES = (130, 143)


def join(processes: Processes, *, testing: bool) -> None:
    """Joins the other processes, if there are any; only the first one prints from then on.

    Args:
      processes: tells which of them this is.
      testing: nothing will be saved, so SIGTERM ends the process at once.

    Raises:
      ValueError: if the others cannot be found or reached.
    """
    if testing:
        jax.config.update("jax_enable_preemption_service", False)
    if processes.distributed or processes.coordinator is not None:
        where = f"at {processes.coordinator}" if processes.coordinator else "of the launcher"
        print(f"waits for the other processes {where}, 5 minutes at most", file=sys.stderr)
        # While it waits, JAX would hide Ctrl-C from Python.
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
        connect(processes.coordinator, processes.num_processes, processes.process_id)
        signal.signal(signal.SIGINT, before)
        if jax.process_count() == 1:  # JAX's service has taken SIGTERM, and nobody asks it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the process ends


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects the processes of a run, each with its own devices; before any other use of JAX.

    Args:
      coordinator: HOST:PORT where process 0 listens, the same in every process. None, like the
        others: found out from SLURM, Open MPI, a TPU pod or whatever else JAX knows.
      num_processes: the number of processes.
      process_id: the number of this one, from 0.

    Raises:
      ValueError: if no launcher tells who the others are, or process 0 cannot be reached within 5
        minutes. Process 0 itself is aborted by JAX if another one stays away.

    References:
      `jax.distributed.initialize`.
    """
    if coordinator is not None and process_id:
        _wait_for(coordinator)
    elif coordinator is not None and _try_connection(coordinator) is None:  # JAX would share it
        raise ValueError(f"another process listens at {coordinator} already")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if coordinator is not None:
            raise ValueError(f"process {process_id} cannot join {coordinator}: {reason}") from error
        raise ValueError(
            "the launcher (SLURM, Open MPI, a TPU pod) does not say who the other processes are: "
            f"give --coordinator, --num-processes and --process-id ({reason})"
        ) from error


def agree(what: str, value: int) -> None:
    """Waits until all processes are here, and checks that they came with the same value.

    Args:
      what: the value's name in the message.
      value: from 0 to 2^32 - 1, such as a CRC-32.

    Raises:
      ValueError: if the values differ.

    Example:
      >>> from capsjax.run.processes import agree
      >>> agree("seeds", 7)
    """
    values = np.ravel(multihost_utils.process_allgather(np.uint32(value)))
    if len(set(values.tolist())) > 1:
        raise ValueError(
            f"the {len(values)} processes have different {what}: {values.tolist()}; give all the "
            "same command and the same files"
        )


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Ends a failed process at once, which ends the others.

    Left to Python, it would first wait for the others, and they wait for it.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, SystemExit) and error.code in _COLLECTIVE_STATUSES:
            raise
        status = _report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _report(error: BaseException) -> int:
    """Prints what nobody has printed yet, and returns the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if _comes_from_a_step(error):
        print(_describe_loss(error), file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def _comes_from_a_step(error: BaseException) -> bool:
    # JAX 0.12 raises ValueError where a step is dispatched synchronously; its message begins with
    # the status as a JaxRuntimeError's does: "UNKNOWN: Gloo all-reduce failed".
    is_status = isinstance(error, ValueError) and _STATUS.match(str(error)) is not None
    return is_status or isinstance(error, jax.errors.JaxRuntimeError)


def _describe_loss(error: BaseException) -> str:
    # The first cause, a full disk for example, is the context of the last.
    causes = [e for e in (error.__context__, error) if e is not None]
    reasons = "; ".join(str(e).partition("\n")[0] for e in causes)
    return (
        f"error: process {jax.process_index()} of {jax.process_count()} failed or lost another "
        f"one: {reasons}\n"
        "what was saved before is kept; start all of them again with --resume"
    )


def _wait_for(coordinator: str) -> None:
    """Waits until process 0 listens; JAX alone would abort the process after a while."""
    end = time.monotonic() + _CONNECT_TIMEOUT
    while (error := _try_connection(coordinator)) is not None:
        if time.monotonic() > end:
            raise ValueError(
                f"process 0 could not be reached at {coordinator} for {_CONNECT_TIMEOUT} s: {error}"
            ) from error
        time.sleep(0.1)


def _try_connection(address: str) -> OSError | None:
    """Returns why no connection to HOST:PORT can be made; None if a process listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError as error:
        return error
    return None
