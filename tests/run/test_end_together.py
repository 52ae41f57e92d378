"""How a process that failed ends the others: what it says, and with which status."""

import os

import jax
import pytest

from capsjax.run.processes import end_together


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def two_processes(monkeypatch):
    """Makes this one the first of two, whose end raises `Ended` with its status."""

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", end)


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_a_step_that_lost_another_process_says_so_in_either_kind_of_error(
    two_processes, capsys, kind
):
    with pytest.raises(Ended, match="1"), end_together():
        raise kind("UNKNOWN: Gloo all-reduce failed: Connection closed by peer\nmore")
    err = capsys.readouterr().err
    assert err.startswith("error: process 0 of 2 failed or lost another one: UNKNOWN: Gloo all")
    assert "more" not in err
    assert "--resume" in err


def test_any_other_error_keeps_its_trace(two_processes, capsys):
    with pytest.raises(Ended, match="1"), end_together():
        raise ValueError("expected 3 axes")
    assert "Traceback" in capsys.readouterr().err


def test_one_process_alone_raises():
    with pytest.raises(ValueError, match="UNKNOWN"), end_together():
        raise ValueError("UNKNOWN: anything")
