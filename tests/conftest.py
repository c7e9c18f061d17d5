import contextlib
import functools
import http.server
import io
import os
import sys
import threading

# The tests are the CPU's, also where there is a GPU; set before torch looks.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["COLUMNS"] = "100"  # whatever terminal they are started in

import pytest  # noqa: E402
import torch  # noqa: E402

import runs  # noqa: E402
import tiny_data  # noqa: E402

torch.set_num_threads(1)  # the networks are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def tiny_cifar10(tmp_path_factory):
    """A data folder with a CIFAR-10 of 20 training and 6 test images. No test changes it."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_data.cifar10(folder, monkeypatch)
        yield folder


@pytest.fixture(scope="session")
def environment():
    """The environment of programs that tests start."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


@pytest.fixture
def http_folder(tmp_path):
    """A folder served over HTTP on this machine, and its URL."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def training(tmp_path_factory, tiny_cifar10):
    """The results folder of a tiny network, trained 3 epochs at 2 and 32 bits, and what was told.

    No test changes the folder.
    """
    folder = tmp_path_factory.mktemp("trained") / "r"
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert runs.run(runs.tiny(tiny_cifar10, folder, "--print-freq", 2)) == 0
    before = runs.snapshot(folder)
    yield folder, told.getvalue()
    assert runs.snapshot(folder) == before


@pytest.fixture
def trained(training):
    """The results folder alone."""
    return training[0]
