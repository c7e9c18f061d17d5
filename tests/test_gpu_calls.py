"""The three calls of benchmarks/gpu.py: what they run, what they end, what they print."""
import json
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, compact

sys.path.append(str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_calls  # noqa: E402
import gpu_steps  # noqa: E402
from engine.arguments import parse_flags  # noqa: E402

CUDA = torch.device("cuda")
VALUES = {"loss": 1.0, "top1": 97.5, "top5": 100.0}


def options(folder, *more):
    return gpu.parse_args(["first", "--folder", str(folder), *more])


def test_processes_that_fail_or_are_late_are_named_and_the_others_go_on(tmp_path, capsys):
    with gpu_calls.Call("first", options(tmp_path, "--limit", "60"), CUDA) as call:
        call.start("good", "-c", "print('done')")
        call.start("bad", "-c", "import sys; print('x'); sys.exit('no memory')")
        call.start("checks", "-c", "import sys; print('a: FAILED: 1\\nb: ok'); sys.exit(1)")
        call.start("ready", "-c", "print('ready', flush=True); input(); print('{}')")
        call.wait(["good", "bad", "checks", "ready"], 1,
                  done=lambda name: "ready" in call.log(name))
        assert call.outcomes == {"good": "ok", "bad": "FAILED: no memory",
                                 "checks": "a: FAILED: 1"}
        call.limit = 0
        call.start("late", "-c", "import time; time.sleep(600)")
        call.wait(["late", "good"], 1)
        call.start("left", "-c", "import time; time.sleep(600)")
    assert call.outcomes["late"] == "ended: no time left" and call.outcomes["good"] == "ok"
    assert all(process.poll() is not None for process in call.jobs.values())
    assert not call.runs.exists() and "bad: FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("name", gpu_calls.CALLS)
@pytest.mark.parametrize("tiny", [[], ["--tiny"]])
def test_the_commands_and_tables_of_a_call(name, tiny, tmp_path, monkeypatch, capsys):
    """Each command is one that its program takes; where nothing was measured, tables are short."""
    seen = []

    def start(call, name, program, *words):
        if program == "-c":  # the warm-up
            seen.append(words)
            return real(call, name, "-c", "pass")
        words = [str(word) for word in words]
        parse = {"gpu.py": gpu.parse_args, "gpu_steps.py": gpu_steps.parse_args,
                 "train.py": parse_flags}[Path(program).name]
        seen.append(parse(words))
        return real(call, name, "-c", "pass")

    real = gpu_calls.Call.start
    monkeypatch.setattr(gpu_calls.signal, "signal", lambda *args: None)
    monkeypatch.setattr(gpu_calls.Call, "start", start)
    assert gpu_calls.run_call(name, options(tmp_path, *tiny), CUDA)
    out = capsys.readouterr().out
    table = (tmp_path / name / "table.md").read_text()
    assert out.endswith(f"\n{table}\n")
    table = compact(table)
    assert "| process | outcome |" in table
    least = {"first": 7, "second": 2, "third": 8}[name]
    assert table.count(" | ok |") == len(seen) >= least
    assert len(list((tmp_path / name).glob("*.log"))) == len(seen)


def test_tables_of_steps_and_accuracy(tmp_path):
    with gpu_calls.Call("first", options(tmp_path), CUDA) as call:
        figure = {"network": "svhnq", "batch": 128, "gib": 1.5, "cpu_ms": 2.0}
        lines = [json.dumps({**figure, "way": way, "ms": ms})
                 for way, ms in (("reference", 90.0), ("tf32, CUDA graph", 20.0))]
        call.jobs["steps_svhnq"] = call.jobs.pop(call.start("x", "-c", "pass"))
        (call.folder / "steps_svhnq.log").write_text("\n".join(["warning", *lines]))
        call.add_steps()
        for seed, top1 in enumerate((97.0, 98.0)):
            folder = call.runs / f"run{seed}"
            folder.mkdir()
            record = {"epoch": 2, "train": {"1": VALUES}, "val": {"1": {**VALUES, "top1": top1}}}
            (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        call.add_accuracy("digits", ["1.0"] * 5, {"tf32": ["run0", "run1"], "none": ["absent"]})
    steps, accuracy = call.tables
    assert compact(steps).splitlines()[-1] == (
        "| svhnq | 128 | tf32, CUDA graph | 20.00 | 2.00 | 1.5 | 4.50 |")
    assert compact(accuracy).splitlines()[-1] == "| tf32 | 2 | 2 | 97.50 ± 0.71 | | | | |"
    figures = (tmp_path / "first" / "figures.jsonl").read_text().splitlines()
    assert [json.loads(line)["ms"] for line in figures] == [90, 20]
    assert len(list((tmp_path / "first").glob("*.metrics.jsonl"))) == 2


def test_the_measurement_of_steps(capsys, monkeypatch):
    monkeypatch.setattr(gpu_steps, "WARM_UP", 1)
    words = ["svhnq", "reference", "tf32", "fp32", "--batch-size", "2", "--steps", "1"]
    with pytest.raises(SystemExit, match="failed: tf32"):  # a CPU has none
        gpu_steps.main(gpu_steps.parse_args([*words, "--device", "cpu"]))
    out = capsys.readouterr().out
    figures = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [figure["way"] for figure in figures] == ["reference", "fp32"]
    assert all(figure["ms"] > 0 and figure["cpu_ms"] > 0 for figure in figures)
