import functools
import http.server
import os
import threading

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the CPU's, also where there is a GPU; before torch looks

import pytest  # noqa: E402
import torch  # noqa: E402

import tiny_data  # noqa: E402
import utils  # noqa: E402
from models import fused  # noqa: E402

torch.set_num_threads(1)  # the networks are tiny: more threads only wait for each other
fused.load()  # before a test moves the folder that it is kept in


@pytest.fixture(autouse=True)
def closed_results_folder():
    yield
    utils.close_results_folder()


@pytest.fixture
def tiny_cifar10(tmp_path, monkeypatch):
    """A data folder with a CIFAR-10 of 20 training and 6 test images."""
    tiny_data.cifar10(tmp_path / "data", monkeypatch)
    return tmp_path / "data"


@pytest.fixture
def http_folder(tmp_path):
    """A folder served over HTTP on this machine, and its URL."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
