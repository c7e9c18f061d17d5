"""What the tests share. Torch is imported late: xdist's own process reads this, and needs none."""
import contextlib
import functools
import gc
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

# Before torch looks: the tests are the CPU's, also where there is a GPU; and the networks are
# tiny, so that more threads only wait for each other.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["COLUMNS"] = "100"  # whatever terminal they are started in
os.environ["OMP_NUM_THREADS"] = "1"

# nohup, and a shell that starts something in the background, have signals ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Fork what forks others, before any test has run a backward pass or changed anything."""
    if not session.config.pluginmanager.hasplugin("dsession"):  # but not in xdist's own process
        # What each training would import anew in its own fork.
        import sklearn.datasets  # noqa: F401
        import tensorboardX  # noqa: F401

        import forks

        # A tenth of the tests' time was spent on looking through what is imported.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        os.fsync = lambda file: None  # nothing written here needs to survive a power cut
        session.config.forks = forks.Forks()
        session.config.add_cleanup(session.config.forks.close)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """End a worker of xdist, which has reported all: Python would tidy up for ten seconds."""
    if hasattr(config, "workerinput"):
        os._exit(0)


@pytest.fixture(scope="session")
def forks(pytestconfig):
    """See forks.py."""
    return pytestconfig.forks


@pytest.fixture(scope="session", autouse=True)
def small_models():
    """Add networks to those that train.py knows."""
    import small_networks

    with pytest.MonkeyPatch.context() as monkeypatch:
        small_networks.register(monkeypatch)
        yield


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """Draw pictures for tests marked `pictures` alone."""
    import runs

    if not request.node.get_closest_marker("pictures"):
        runs.draw_nothing(monkeypatch)


@pytest.fixture(scope="session")
def tiny_cifar10(tmp_path_factory):
    """A data folder with a CIFAR-10 of 20 training and 6 test images. No test changes it."""
    import tiny_data

    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_data.cifar10(folder, monkeypatch)
        yield folder


@pytest.fixture(scope="session")
def environment():
    """The environment of programs that tests start."""
    return {**os.environ, "PYTHON": sys.executable}


@pytest.fixture(scope="session")
def recipe_argv(tmp_path_factory):
    """A function that runs a recipe by bash, and returns the words that train.py gets of it.

    whole=True: those that Python gets.
    """
    import runs

    folder = tmp_path_factory.mktemp("recipes")
    python = folder / "python"  # prints its words where train.py is among them; all else succeeds
    python.write_text("""#!/bin/bash
for word in "$@"; do
    case "$word" in */train.py) printf '%s\\n' "$@" ;; esac
done
""")
    python.chmod(0o755)

    def argv(script, *more, processes="1", restarts="3", whole=False):
        done = subprocess.run(
            ["bash", runs.ROOT / script, *more], cwd=folder, capture_output=True, text=True,
            check=True, env={**os.environ, "PYTHON": str(python), "PROCESSES": processes,
                             "MAX_RESTARTS": restarts})
        words = done.stdout.split("\n")[:-1]
        program = str(runs.ROOT / "train.py")
        return words if whole else words[words.index(program) + 1:]
    return argv


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
    import runs

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


@pytest.fixture
def two_checkpoints(trained, tmp_path):
    """A copy of it whose best and latest checkpoint differ, whichever epoch was best."""
    import torch

    import runs

    folder = shutil.copytree(trained, tmp_path / "two")
    content = runs.load(folder, "model_best")
    content["state_dict"]["fc.bias"] += 1
    torch.save(content, folder / "ckpt" / "model_best.pth.tar")
    return folder
