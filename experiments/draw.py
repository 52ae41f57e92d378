"""A page on which one draws a digit and sees what the capsules make of it.

python -m pip install -e ".[demo]"
python experiments/draw.py
python experiments/draw.py --weights runs/mnist-20260101-120000
python experiments/draw.py --weights capsnet-mnist runs/efficient

The page shows the class scores while one draws, the drawing that the capsule makes, the couplings
after each iteration of routing, what each number of the capsule does, and how the scores change as
the drawing is turned. It needs no network connection.
"""

import contextlib
import dataclasses
import ipaddress
import re
import signal
import socket
import sys
import webbrowser
from pathlib import Path

import tyro

import capsjax
from capsjax.presets import check
from capsjax.run.command_line import refusals
from capsjax.run.folder import FINAL_WEIGHTS
from capsjax.run.machine import configure
from capsjax.run.settings import find_weights, is_run


@dataclasses.dataclass(frozen=True)
class Draw:
    """Serves a page on which one draws and sees what capsules do."""

    weights: tuple[Path, ...] = (Path("capsnet-mnist"),)
    """Networks: a run, a file, or one that comes with capsjax; two are compared side by side."""
    host: str = "127.0.0.1"
    """Address to serve at. Any but this machine's own lets others use the page, too."""
    port: int = 8765
    """Port to serve at; 0: any that is free."""
    open: bool = True
    """Whether to open the page in a browser."""

    def __post_init__(self) -> None:
        check(1 <= len(self.weights) <= 2, "weights", "one network or two", len(self.weights))
        check(0 <= self.port < 2**16, "port", "from 0 to 65535", self.port)


def load(weights: Path) -> capsjax.Network:
    """Loads the network of a run or a file.

    Raises:
      ValueError: if there is none.
    """
    file = find_weights(weights)
    if is_run(file):
        file = file / FINAL_WEIGHTS
    if not file.is_file():
        raise ValueError(f"--weights {weights}: there is no {file}")
    return capsjax.weights.load(file)


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def write_host(host: str) -> str:
    """Writes a host as an address does, an IPv6 one in brackets."""
    return f"[{host}]" if ":" in host else host


def list_hosts(host: str) -> list[str]:
    """Lists the names by which the server may be called: any, if it is not for this machine."""
    return ["127.0.0.1", "localhost", "[::1]", write_host(host)] if is_loopback(host) else ["*"]


def listen(host: str, port: int) -> socket.socket:
    """Opens the port.

    Raises:
      ValueError: if it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # From here on a browser waits instead of being refused.
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be served at ({error}); try --port 0"
        ) from error


def main() -> None:
    """Does what the command line says, until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        serve()


def serve() -> None:
    """Serves the page."""
    configure()
    with refusals():
        settings = tyro.cli(Draw)
        try:
            import uvicorn

            from drawing.reader import Reader
            from drawing.server import make_app
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{error.name} is missing: python -m pip install -e '.[demo]'"
            ) from error
        opened = listen(settings.host, settings.port)
    with contextlib.closing(opened):
        with refusals():
            readers = [Reader(str(path), load(path)) for path in settings.weights]
            app = make_app(readers, capsjax.data.load("mnist"), list_hosts(settings.host))
        tell(settings, opened.getsockname()[1])
        # The application has no use for `lifespan`, which takes a second Ctrl-C for an error.
        config = uvicorn.Config(
            app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1
        )
        # Once the server has stopped, Ctrl-C ends the process without a traceback, even if it is
        # pressed again while Python shuts down.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        uvicorn.Server(config).run(sockets=[opened])


def tell(settings: Draw, port: int) -> None:
    """Tells where the page is, and opens it."""
    if not is_loopback(settings.host):
        print(f"warning   anyone who reaches {settings.host} can use this page", file=sys.stderr)
    address = f"http://{write_host(settings.host)}:{port}/"
    print(f"page      {address}  (Ctrl-C ends)", flush=True)
    if settings.open:
        webbrowser.open(re.sub(r"//(0\.0\.0\.0|\[::\])", "//localhost", address))


if __name__ == "__main__":
    main()
