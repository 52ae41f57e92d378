"""The command of the page: what it refuses, and what it tells."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

import draw
from served_page import serve


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "absent"], "--weights absent: there is no absent"),
        (["--weights", "a", "b", "c"], "--weights must be one network or two, got 3"),
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--host", "no.such.host.invalid"], "cannot be served at"),
    ],
)
def test_the_command_refuses_nonsense_in_words(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["draw.py", "--no-open", "--port", "0", *words])
    monkeypatch.setattr(draw, "configure", lambda: None)  # of this process
    with pytest.raises(SystemExit) as end:
        draw.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["draw.py"])
    monkeypatch.setattr(draw, "configure", lambda: None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        draw.main()
    assert "python -m pip install -e '.[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_only_loopback_addresses_are_for_this_machine_alone(host, alone):
    assert draw.is_loopback(host) == alone


def test_a_port_that_is_taken_is_refused_in_words(monkeypatch, capsys):
    monkeypatch.setattr(draw, "configure", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["draw.py", "--no-open", "--port", port])
        with pytest.raises(SystemExit):
            draw.main()
    assert f"--port {port} cannot be served at" in capsys.readouterr().err


def press_ctrl_c(process: subprocess.Popen, address: str, times: int = 1) -> str:
    """Waits until the page is served, presses Ctrl-C, and returns the errors that were printed."""
    with urllib.request.urlopen(f"{address}networks", timeout=120) as answer:
        assert answer.status == 200
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    return process.communicate(timeout=120)[1]


@pytest.mark.slow
def test_serving_to_others_is_warned_of():
    with serve("--host", "0.0.0.0") as (process, address):
        assert address.startswith("http://0.0.0.0:")
        errors = press_ctrl_c(process, address.replace("0.0.0.0", "127.0.0.1"))
    assert "anyone who reaches 0.0.0.0 can use this page" in errors


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2, 1000])
def test_ctrl_c_ends_without_a_word_however_often_it_is_pressed(times):
    with serve() as (process, address):
        assert press_ctrl_c(process, address, times) == ""
    assert process.returncode == -signal.SIGINT
