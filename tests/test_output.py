"""Standard output that is full, closed, or that nobody reads any more."""
import errno
import io
import os
import sys
from functools import partial

import pytest
from runs import assert_one_line, run, tiny

import report
from engine.errors import run_program
from engine.output import lasting_streams


class Full(io.StringIO):
    """A stream of a full disk: a terminal's, if `bar`."""

    def __init__(self, bar=False):
        super().__init__()
        self.bar = bar

    def isatty(self):
        return self.bar

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("stream, reason", [
    (None, "it is closed"), (Full(bar=True), "No space left on device")])
def test_training_goes_on_and_its_log_has_all(stream, reason, tmp_path, tiny_cifar10, monkeypatch,
                                              capsys):
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1, "--print-freq", 1)) == 0
    assert_one_line(capsys, f"standard output cannot be written ({reason}): training goes on; its "
                            f"log is in {tmp_path}/r")
    log = next((tmp_path / "r").glob("log_*.txt")).read_text()
    assert "val loss" in log and f"in {tmp_path}/r: accuracy.png, ckpt/, config.json, log_" in log


@pytest.mark.parametrize("stream", [None, Full()])
def test_output_that_was_the_purpose(stream, trained, tmp_path, tiny_cifar10, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", stream)
    argv = ["--evaluate", "--pretrain", trained, "--data-dir", tiny_cifar10]
    assert run([*argv, "--results-dir", tmp_path / "e"]) == 1
    assert_one_line(capsys, "error: standard output cannot be written (")
    assert (tmp_path / "e" / "evaluation.json").exists()

    argv = [str(trained), "--output", str(tmp_path / "t")]
    with pytest.raises(SystemExit) as ended:
        run_program(report.main, partial(report.parse_args, argv))
    assert ended.value.code == 1
    assert_one_line(capsys, "error: standard output cannot be written (")

    assert run(["--help"]) == 1
    assert_one_line(capsys, "error: standard output cannot be written (")


def test_errors_do_not_go_to_standard_output_where_stderr_is_closed(monkeypatch, capsys):
    for stream in (None, Full()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert run(["--lr", "fast"]) == 2
        assert run(["--resume", "nothing"]) == 1
    assert capsys.readouterr().out == ""


def test_a_full_disk_found_late_is_no_error_of_python_s_own_end():
    """What is still buffered goes to /dev/null, where Python's last flush would fail."""
    stdout = sys.stdout
    stream = open("/dev/full", "w")
    sys.stdout = stream
    try:
        with lasting_streams() as output:
            print("buffered")
            assert output.failure is None
        assert output.failure == os.strerror(errno.ENOSPC)
    finally:
        sys.stdout = stdout
    stream.close()
