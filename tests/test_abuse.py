"""A sample of tests/abuse.py, which runs many more cases beside the suite."""
import os
import signal
import time

import abuse
import pytest


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with abuse.prepared(tmp_path_factory.mktemp("abuse"), lambda base: base.make()) as base:
        yield base


def test_a_sample_of_hostile_cases(base):
    found = [(kind, number, *abuse.run_case(base, 3, kind, number))
             for kind, number in abuse.choose(40, abuse.KINDS)]
    mishandled = [row for row in found if row[4]]
    assert not mishandled, abuse.summary(mishandled, 3)
    codes = {row[3] for row in found}
    assert codes >= {0, 1, 2}


def test_what_counts_as_mishandled():
    def judged(code, out="", err="", problem=None):
        outcome = abuse.Outcome(code, out, err)
        return abuse.judge(abuse.Case("", lambda: outcome, ("x.pth",), lambda _: problem), outcome)

    assert judged(0) is None and judged(0, problem="another result") == "another result"
    assert judged(1, err="error: x.pth is damaged: copy it again\n") is None
    assert judged(70, err="Traceback\nKeyError: 5\n") == "traceback: KeyError: 5"
    assert judged(1, err="x.pth is\ndamaged: copy it\n") == "2 lines on stderr"
    assert judged(1, err="x.pth is \x1b[31m: copy it\n") == "escape sequences on stderr"
    assert judged(1, err="y.pth: copy it\n") == "an error that does not name the file"
    assert judged(1, err="x.pth: no\n") == "an error without a remedy"


def test_a_mistake_is_found(base, monkeypatch):
    """A checkpoint's damage that nothing sees, a traceback, and a file that is lost."""
    with monkeypatch.context() as patch:
        patch.setattr(abuse.models.archive, "check_archive", lambda path: None)
        results = [abuse.run_case(base, 0, "bits", number)[2] for number in range(10)]
        assert "another result, and exit 0" in results
    with monkeypatch.context() as patch:
        patch.setattr(abuse.report, "read_runs", lambda folders: 1 / 0)
        results = [abuse.run_case(base, 0, "results", number)[2] for number in range(4)]
        assert "traceback: ZeroDivisionError: division by zero" in results
    with monkeypatch.context() as patch:
        patch.setitem(abuse.MAKE, "bits", lambda rng, base, place: abuse.Case(
            "", lambda: abuse.Outcome(0, str(base.packed.touch()), ""), (), lambda outcome: None))
        assert abuse.run_case(base, 0, "bits", 0)[2] == "something saved before is changed"


def test_a_case_that_ends_its_worker(tmp_path, monkeypatch):
    """It is a crash or a hang, and those after it are run all the same."""
    def run_case(base, seed, kind, number):
        if number == 1:
            os._exit(9)
        if number == 2:
            signal.pause()
        return f"case {number}", 0, None, ""

    monkeypatch.setattr(abuse, "run_case", run_case)
    worker = abuse.Worker(None, 0, [("bits", number) for number in range(4)], tmp_path / "0")
    while not worker.poll():
        time.sleep(0.01)
        if len(worker.done) == 2:
            worker.since = -abuse.LIMIT  # as if the time had passed
    assert [row[4] for row in worker.done] == [None, "crash: 9", "hang", None]
