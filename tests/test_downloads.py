"""Downloads from servers that are silent or endless, signals, and folders that no one can write."""
import contextlib
import errno
import http.server
import os
import resource
import shutil
import signal
import socket
import threading
import time

import pytest
import torch
from runs import fork, run, wait
from torchvision import datasets

import tiny_data
from dataset import download
from dataset.data import get_dataset
from dataset.files import DataError
from engine import published
from engine.errors import UserError
from test_published import publish
from utils import unwinding_signals

FETCHED = ("data", "checkpoint")


class Server(http.server.ThreadingHTTPServer):
    """A server that answers as a test says, and its URL."""
    daemon_threads = True
    answer = None
    requests = 0

    def __init__(self):
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        if self.server.answer != "silent":
            self.send_response(200)
            if self.server.answer == "stalled":
                self.send_header("Content-Length", "1000000")
            self.end_headers()
        with contextlib.suppress(OSError):  # the other side has hung up
            if self.server.answer == "stalled":
                self.wfile.write(bytes(200_000))
            while self.server.answer == "endless":
                self.wfile.write(bytes(100_000))
        if self.server.answer != "endless":
            self.server.over.wait()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=FETCHED)
def fetch(request, tmp_path, monkeypatch, server):
    """A function that downloads from the server, and the folder where it would go."""
    if request.param == "checkpoint":
        url = f"{server.url}/x.pth.tar"
        return lambda: published.find_checkpoint(url), tmp_path / "cache" / "any_precision"
    split = [f"{server.url}/test_32x32.mat", "test_32x32.mat", "0" * 32]
    monkeypatch.setattr(datasets.SVHN, "split_list", {"test": split})
    return (lambda: get_dataset("svhn", "test", data_dir=tmp_path / "data"),
            tmp_path / "data" / "svhn")


@pytest.mark.parametrize("answer", ["silent", "stalled"])
def test_a_server_without_a_byte_is_left_after_a_time(answer, fetch, server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.answer = answer
    function, folder = fetch
    with pytest.raises((DataError, UserError), match=r"be downloaded .*\(no byte for 0.3 s\)"):
        function()
    assert list(folder.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_an_endless_file_is_left_at_the_limit(fetch, server, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(download, "LIMIT", 2_000_000)
    server.answer = "endless"
    function, folder = fetch
    with pytest.raises((DataError, UserError), match="more than 0.002 GB, the limit of a file"):
        function()
    assert list(folder.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


@pytest.mark.parametrize("number", [
    signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_leaves_nothing_of_a_download(number, fetch, server, tmp_path):
    server.answer = "stalled"
    function, folder = fetch

    def child():
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)  # whoever started the tests may have it ignored
        with contextlib.suppress(KeyboardInterrupt):
            function()
        return 130

    process = fork(child, tmp_path / "out", tmp_path / "err")
    while not any(path.is_file() and path.stat().st_size for path in folder.rglob("*")):
        assert os.waitpid(process, os.WNOHANG) == (0, 0), (tmp_path / "err").read_text()
        time.sleep(0.01)
    os.kill(process, number)
    assert wait(process) == (130 if number == signal.SIGINT else -number)
    assert list(folder.iterdir()) == []


def test_signals_that_are_ignored_or_noted_stay_so(monkeypatch):
    noted = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    note = lambda number, frame: noted.append(number)
    other = signal.signal(signal.SIGTERM, note)
    try:
        with pytest.raises(SystemExit) as ended, unwinding_signals():
            signal.raise_signal(signal.SIGHUP)  # nohup's
            signal.raise_signal(signal.SIGTERM)
            noted.append("the download went on")
        assert noted == [signal.SIGTERM] and ended.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == note
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, other)


def test_a_failure_removes_what_is_new_alone(tmp_path):
    folder = tmp_path / "x"
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "file").write_text("kept")
    with pytest.raises(ZeroDivisionError), download.filling(folder):
        (folder / "old" / "part").write_text("new")
        (folder / "new" / "deep").mkdir(parents=True)
        (folder / "new" / "deep" / "part").write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in folder.rglob("*")] == ["old", "file"]


def test_two_runs_do_not_fill_a_folder_at_once(tmp_path):
    events = []

    def second():
        with download.filling(tmp_path):
            events.append("second begins")

    with download.filling(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)  # without a lock it would have begun by now
        events.append("first ends")
    thread.join()
    assert events == ["first ends", "second begins"]


# ---- folders that cannot be written

def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told = "cache folder .*file/any_precision cannot be written .*another place by.*XDG_CACHE_HOME"
    with pytest.raises(UserError, match=told):
        published.find_checkpoint("svhnq_2")
    for name in ("svhn", "fashion-mnist"):
        with pytest.raises(DataError, match=f"file/{name} cannot be written .*--data-dir"):
            get_dataset(name, "test", data_dir=tmp_path / "file")


def test_a_full_disk_is_not_the_network(fetch, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    monkeypatch.setattr(datasets.SVHN, "download", full)
    with pytest.raises((DataError, UserError), match="cannot be written .*No space left.*room"):
        fetch[0]()


# ---- cached checkpoints

@pytest.fixture
def cached(http_folder, monkeypatch):
    """A published checkpoint that is served, and its copy in the cache."""
    folder, url = http_folder
    monkeypatch.setattr(published, "PREFIX", f"{url}/")
    served, _ = publish(folder, "svhnq_2", legacy=True, bits=(2,))
    return served, published.find_checkpoint("svhnq_2")


def damage(path):
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_damaged_copy_is_named_and_downloaded_anew(cached, capsys):
    served, copy = cached
    damage(copy)
    capsys.readouterr()
    assert published.find_checkpoint("svhnq_2") == copy
    assert f"{copy} is damaged (" in capsys.readouterr().out
    assert copy.read_bytes() == served.read_bytes()
    assert published.find_checkpoint("svhnq_2") == copy and capsys.readouterr().out == ""


@pytest.mark.parametrize("reason", ["404", "can be read safely"])
def test_a_damaged_copy_that_cannot_be_downloaded_is_named(reason, cached):
    served, copy = cached
    damage(copy)
    content = copy.read_bytes()
    damage(served) if reason != "404" else served.unlink()
    told = f"{copy} is damaged, and http.* could not be downloaded .*{reason}"
    with pytest.raises(UserError, match=told):
        published.find_checkpoint("svhnq_2")
    assert copy.read_bytes() == content


def test_a_published_hash_is_checked_where_it_is_known(cached, monkeypatch):
    served, copy = cached
    known = tiny_data.sha256(served)
    monkeypatch.setitem(published.FILES["svhnq_2"], "sha256", known)
    assert published.find_checkpoint("svhnq_2") == copy
    other, _ = publish(served.parents[1] / "other", "svhnq_4", legacy=True, bits=(4,))
    shutil.copy(other, copy)  # whole, but another
    assert published.find_checkpoint("svhnq_2") == copy and tiny_data.sha256(copy) == known
    shutil.copy(other, served)
    copy.unlink()
    with pytest.raises(UserError, match=f"its SHA-256 is .*, not the published {known}"):
        published.find_checkpoint("svhnq_2")
    assert list(copy.parent.iterdir()) == []


def test_no_run_is_begun_by_a_failed_download(tmp_path, fetch, server, monkeypatch, capsys):
    """The whole program: one line, and nothing in the folder of results."""
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.answer = "silent"
    source = ["--pretrain", f"{server.url}/x.pth.tar", "--evaluate"]
    if "svhn" in fetch[1].name:
        source = ["--dataset", "svhn", "--train_split", "train"]
        datasets.SVHN.split_list["train"] = datasets.SVHN.split_list["test"]
    assert run([*source, "--data-dir", tmp_path / "data", "--device", "cpu",
                "--results-dir", tmp_path / "r"]) == 1
    err = capsys.readouterr().err
    assert "error: " in err and err.endswith("\n") and err.count("\n") == 1, err
    assert not (tmp_path / "r").exists()
