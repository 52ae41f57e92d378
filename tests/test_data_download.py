"""Tests that a download is complete, or fails within seconds and leaves nothing behind."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import mnist as stock

from capsjax import data
from capsjax.data import _download
from data_files import (
    SilentHandler,
    assert_same_digits,
    digits,
    gzipped,
    serve,
    write_idx,
)

FILES = gzipped()


@pytest.fixture
def served(tmp_path):
    """Returns the folder that the server hands out."""
    return write_idx(tmp_path / "served", digits(), FILES)


@pytest.fixture
def folder(tmp_path):
    """Returns the folder that the data set is downloaded to."""
    return tmp_path / "tfds"


@contextlib.contextmanager
def serve_mnist(monkeypatch, served, handler=SilentHandler):
    """Serves MNIST's files in place of the host that TFDS downloads them from."""
    with serve(served, handler) as url:
        monkeypatch.setattr(stock.MNIST, "URL", url)
        yield url


def assert_refused(folder, *words, name="mnist"):
    """Asserts that the download fails within a minute, says why, and leaves no file."""
    start = time.monotonic()
    with pytest.raises(data.DataError) as error:
        data.load(name, folder, download=True)
    assert time.monotonic() - start < 60
    for word in words:
        assert word in str(error.value)
    assert not folder.exists() or not list(folder.iterdir())


def test_a_download_is_prepared_read_and_found_again_without_a_network(
    monkeypatch, served, folder, capfd
):
    with serve_mnist(monkeypatch, served):
        dataset = data.load("mnist", folder, download=True)
    assert_same_digits(dataset, digits())
    assert [path.name for path in folder.iterdir()] == ["mnist"]
    assert_same_digits(data.load("mnist", folder, download=True), digits())
    assert capfd.readouterr() == ("", "")


def test_a_download_without_a_folder_goes_to_the_default_folder_of_tfds(
    monkeypatch, served, folder
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    with serve_mnist(monkeypatch, served):
        dataset = data.load("mnist", download=True)
    assert_same_digits(dataset, digits())
    assert (folder / "mnist" / "3.0.1" / "dataset_info.json").is_file()


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_fashion_mnist_and_kmnist_are_downloaded_the_same_way(monkeypatch, served, folder, name):
    builder = {"fashion_mnist": stock.FashionMNIST, "kmnist": stock.KMNIST}[name]
    with serve(served) as url:
        monkeypatch.setattr(builder, "URL", url)
        dataset = data.load(name, folder, download=True)
    assert dataset.source.startswith(name)
    source: Any = tfds.data_source(name, data_dir=folder)
    assert list(dataset.class_names) == source["train"].dataset_info.features["label"].names
    assert len(source["train"]) == 300


def test_data_that_are_present_are_not_downloaded_again(monkeypatch, folder):
    write_idx(folder, digits())
    monkeypatch.setattr(stock.MNIST, "URL", "http://127.0.0.1:1/")
    assert "IDX" in data.load("mnist", folder, download=True).source


def test_a_closed_port_is_reported(monkeypatch, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(stock.MNIST, "URL", f"http://127.0.0.1:{port}/")
    assert_refused(folder, "cannot be reached", "refused", "check the network")
    assert not folder.exists()


def test_a_server_that_never_answers_is_given_up(monkeypatch, folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(stock.MNIST, "URL", f"http://127.0.0.1:{port}/")
        monkeypatch.setattr(_download, "_PROBE_SECONDS", 0.3)
        monkeypatch.setattr(_download, "_MORE_SECONDS", 60)
        assert_refused(folder, "cannot be reached", "timed out", "check the network")
    assert not folder.exists()


def test_a_name_server_that_never_answers_is_given_up(monkeypatch, folder):
    waiting = threading.Event()

    def hang(*args, **options):
        waiting.wait(90)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(_download, "_PROBE_SECONDS", 0.25)
    monkeypatch.setattr(_download, "_MORE_SECONDS", 0.25)
    assert_refused(folder, "no answer within 0.5 seconds", "check the network")
    waiting.set()


def test_a_server_that_does_not_speak_http_is_reported(monkeypatch, folder):
    with socket.create_server(("127.0.0.1", 0)) as strange:

        def answer():
            connection, _ = strange.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        port = strange.getsockname()[1]
        monkeypatch.setattr(stock.MNIST, "URL", f"http://127.0.0.1:{port}/")
        assert_refused(folder, "cannot be reached")
        thread.join()


def test_a_file_that_the_server_does_not_have_is_named(monkeypatch, served, folder):
    (served / FILES["y_test"]).unlink()
    with serve_mnist(monkeypatch, served):
        assert_refused(folder, FILES["y_test"], "404")


def test_a_truncated_transfer_is_refused(monkeypatch, served, folder):
    class BreaksOff(SilentHandler):
        def copyfile(self, source, outputfile):
            outputfile.write(source.read(100))

    with serve_mnist(monkeypatch, served, BreaksOff):
        assert_refused(folder, "got only 100")


def test_a_server_that_stalls_in_the_middle_of_a_file_is_given_up(monkeypatch, served, folder):
    waiting = threading.Event()

    class Stalls(SilentHandler):
        def copyfile(self, source, outputfile):
            self.wfile.write(source.read(100))
            self.wfile.flush()
            waiting.wait(90)

    monkeypatch.setattr(_download, "_STALL_SECONDS", 0.5)
    with serve_mnist(monkeypatch, served, Stalls):
        assert_refused(folder, "download failed", "timed out")
        waiting.set()


def test_a_file_with_a_wrong_checksum_is_refused(monkeypatch, served, folder):
    with serve_mnist(monkeypatch, served) as url:
        file = f"{url}{FILES['x_train']}"
        info = next(iter((stock.MNIST.url_infos or {}).values()))
        monkeypatch.setattr(stock.MNIST, "url_infos", {file: info})
        assert_refused(folder, "expected sha256", info.checksum)


@pytest.mark.parametrize("content", [b"", b"<html>Log in to the hotel's network</html>"])
def test_a_page_in_place_of_a_file_is_refused(monkeypatch, served, folder, content):
    (served / FILES["x_test"]).write_bytes(content)
    with serve_mnist(monkeypatch, served):
        assert_refused(folder, FILES["x_test"].removesuffix(".gz"))


def test_a_label_that_tfds_does_not_know_is_refused(monkeypatch, served, folder):
    arrays = digits()
    arrays["y_test"] = arrays["y_test"].copy()
    arrays["y_test"][5] = 77
    write_idx(served, arrays, FILES)
    with serve_mnist(monkeypatch, served):
        assert_refused(folder, "77")


def test_a_file_that_is_not_the_zip_archive_of_emnist_is_refused(monkeypatch, served, folder):
    (served / "gzip.zip").write_bytes(b"not a zip")
    with serve(served) as url:
        monkeypatch.setattr(stock.EMNIST, "URL", f"{url}gzip.zip")
        assert_refused(folder, "gzip.zip", name="emnist/letters")


def test_a_folder_that_cannot_be_created_is_reported(monkeypatch, served, tmp_path):
    (tmp_path / "file").touch()
    with (
        serve_mnist(monkeypatch, served),
        pytest.raises(data.DataError, match="could not be prepared"),
    ):
        data.load("mnist", tmp_path / "file" / "tfds", download=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_not_blamed_on_the_network(monkeypatch, served, folder):
    fetch = _download.fetch
    monkeypatch.setattr(
        _download, "fetch", lambda url, path, sha256: fetch(url, Path("/dev/full"), sha256)
    )
    with serve_mnist(monkeypatch, served):
        assert_refused(folder, "could not be prepared here", "No space left on device", "make room")


def test_a_data_set_outside_the_family_is_not_downloaded(folder):
    assert_refused(folder, "expected one of mnist,", "tfds build cifar10", name="cifar10")


def interrupt(process: subprocess.Popen) -> str:
    """Presses Ctrl-C until the process has ended, as a person would; returns its errors.

    Python drops a KeyboardInterrupt that is raised in a callback of its garbage collector, and JAX
    registers one.
    """
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=20)[1]
    pytest.fail("pressing Ctrl-C ten times did not end the process")


@pytest.mark.slow
def test_ctrl_c_during_a_download_ends_the_process_and_leaves_nothing(served, folder):
    halfway, waiting = threading.Event(), threading.Event()

    class Stalls(SilentHandler):
        def copyfile(self, source, outputfile):
            self.wfile.write(source.read(100))
            self.wfile.flush()
            halfway.set()
            waiting.wait(600)

    code = (
        # Background jobs, which continuous integration may run, start with SIGINT ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys; from capsjax import data; from capsjax.data import _download; "
        "_download._PROBE_SECONDS = 60; "
        "from tensorflow_datasets.image_classification import mnist; "
        "mnist.MNIST.URL = sys.argv[2]; data.load('mnist', sys.argv[1], download=True)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with (
        serve(served, Stalls) as url,
        subprocess.Popen([*command, url], stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            assert halfway.wait(300)
            assert list(folder.iterdir())
            errors = interrupt(process)
        finally:
            process.kill()
            waiting.set()
    assert "KeyboardInterrupt" in errors
    assert not list(folder.iterdir())
