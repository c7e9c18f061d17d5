"""What programs do first: Ctrl-C during the imports, closed streams, a launcher that ends."""
import os
import signal
import subprocess
import sys

import pytest
from ideas import PROJECT, forget
from runs import ROOT


def start(command, tmp_path, **kwargs):
    """Start Python with this project's modules, and with what lies in tmp_path before others."""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    environment.update(kwargs.pop("env", {}))
    return subprocess.Popen([sys.executable, *command], env=environment, **kwargs)


def obey_interrupts():
    """Let Ctrl-C act on a process, also where the tests were started to ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("program", ["train.py", "report.py", "export.py"])
def test_ctrl_c_during_the_imports(program, tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
    process = start([ROOT / program], tmp_path, preexec_fn=obey_interrupts, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", f"{program}: interrupted\n")


def help_without(*missing):
    """Print the help of benchmarks/gpu.py, imported anew where libraries are missing."""
    forget([*PROJECT, *(path.stem for path in ROOT.glob("benchmarks/*.py"))])
    for name in missing:
        sys.modules[name] = None
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu
    try:
        gpu.parse_args(["--help"])
    except SystemExit as ended:
        return ended.code


def test_what_a_run_can_do_without_is_imported_where_it_is_used(forks):
    done = forks.run(help_without, "tensorboardX", "gpustat")
    assert done.returncode == 0 and "levels" in done.stdout, done.stderr


def test_ctrl_c_that_is_ignored_stays_so(tmp_path):
    """As of a program that a script starts in the background."""
    script = ("import signal; from engine.startup import prepare_process; prepare_process(); "
              "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN")
    process = start(["-c", script], tmp_path,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert process.wait(timeout=60) == 0


def test_files_do_not_become_streams_that_are_closed(tmp_path):
    script = ("import os; from engine.startup import prepare_process; prepare_process(); "
              "assert os.open('.', os.O_RDONLY) > 2")
    process = start(["-c", script], tmp_path, preexec_fn=lambda: os.closerange(0, 2),
                    stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_a_process_of_torchrun_gets_sigterm_when_its_launcher_is_killed(tmp_path):
    worker = """
import signal, time
from engine.startup import prepare_process
prepare_process()
def end(number, frame):
    print("got SIGTERM", flush=True)
    raise SystemExit
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""
    launcher = ("import subprocess, sys; "
                "subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
                ".wait()")
    process = start(["-c", launcher, worker], tmp_path, env={"TORCHELASTIC_RUN_ID": "none"},
                    stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.stdout.read() == "got SIGTERM\n"  # ends with the worker, or after a minute
    process.wait()
    process.stdout.close()
