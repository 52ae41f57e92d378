"""How processes find each other and agree, as far as one process can tell."""

import socket
from unittest import mock

import jax
import numpy as np
import pytest

from capsjax.run import processes


def test_a_process_that_nobody_waits_for_says_so(monkeypatch):
    monkeypatch.setattr(processes, "_CONNECT_TIMEOUT", 0.3)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"reached at {coordinator} .*: .*refused"):
            processes.connect(coordinator, 2, 1)


def test_a_port_of_the_coordinator_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"another process listens at {coordinator} already"):
            processes.connect(coordinator, 2, 0)


def test_a_launcher_that_says_too_little_is_an_error_in_words(monkeypatch):
    fail = mock.Mock(side_effect=RuntimeError("Open MPI 5 requires mpi4py\n"))
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match=r"the launcher .* give --coordinator.*requires mpi4py\)$"):
        processes.connect()


def test_processes_agree_or_end():
    processes.agree("seeds", 2**32 - 1)
    together = mock.patch.object(
        processes.multihost_utils, "process_allgather", lambda value: np.array([value, value + 1])
    )
    with together, pytest.raises(ValueError, match=r"2 processes have different seeds: \[3, 4\]"):
        processes.agree("seeds", 3)
