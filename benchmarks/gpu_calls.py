"""The three calls of gpu.py: a quarter of an hour on a GPU, in parts that are useful alone."""
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reference_way import ROOT  # first: it adds the project to the path

from engine.run_folder import read_metrics
from utils import markdown_table, mean_and_deviation, write_text

BENCHMARKS = Path(__file__).parent
NETWORKS = ("resnet20q", "svhnq", "resnet50q")
BITS = (1, 2, 4, 8, 32)
# Top-1 (%) at the last epoch on a CPU, three seeds: any, recursive, of docs/results.md.
DIGITS_ON_CPU = ("97.87 ± 0.32", "98.98 ± 0.16", "99.35 ± 0.64", "99.35 ± 0.42", "99.17 ± 0.28")
FASHION_ON_CPU = ("84.52 ± 0.17", "88.76 ± 0.23", "89.64 ± 0.26", "89.64 ± 0.27", "89.98 ± 0.21")


class Call:
    """A call: processes side by side or one by one, ended where they are late, and tables.

    Its folder gets their logs, figures.jsonl, the runs' metrics and table.md. A context, which ends
    what still runs.
    """

    def __init__(self, name, options, device):
        self.folder = Path(options.folder, name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = str(device)
        self.on_gpu = device.type == "cuda"
        self.tiny = options.tiny
        self.fastest = shlex.split(options.fastest) if self.on_gpu else ["--precision", "bf16"]
        self.data = ["--data-dir", options.data_dir] if options.data_dir else []
        self.limit = options.limit
        self.began = time.monotonic()
        self.runs = Path(tempfile.mkdtemp())  # checkpoints, which are not kept
        self.jobs = {}  # {name: process}
        self.outcomes = {}  # {name: words}
        self.tables = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.jobs.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(self.runs, ignore_errors=True)

    def note(self, words):
        """Print a line with the seconds since the call began."""
        print(f"[{time.monotonic() - self.began:4.0f} s] {words}", flush=True)

    # ---- processes

    def start(self, name, *command):
        """Start a program of the project; its output goes to a log of that name."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
        with open(self.folder / f"{name}.log", "w") as log:
            self.jobs[name] = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT, env=environment,
                stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)
        return name

    def log(self, name):
        """Return what a process has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait(self, names, until, done=None):
        """Wait for processes, or for done(name), until a fraction of the limit; end late ones."""
        waiting = list(names)
        while waiting:
            is_late = time.monotonic() - self.began > until * self.limit
            for name in list(waiting):
                code = self.jobs[name].poll()
                if code is not None:
                    self.finish(name, "ok" if code == 0 else self.failure(name, code))
                    waiting.remove(name)
                elif done and done(name):
                    waiting.remove(name)
                elif is_late:
                    self.end(name)
                    waiting.remove(name)
            time.sleep(0.05)

    def end(self, name):
        """End a process that is late: by SIGTERM, by which a run saves, then by SIGKILL."""
        process = self.jobs[name]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()
        process.wait()
        self.finish(name, "ended: no time left")

    def finish(self, name, outcome):
        """Keep and print a process's outcome."""
        self.outcomes[name] = outcome
        self.note(f"{name}: {outcome}")

    def failure(self, name, code):
        """Return in one line the checks that failed, or what a process printed last."""
        lines = [line for line in self.log(name).splitlines() if line.strip()]
        failed = [line for line in lines if "FAILED: " in line]
        if failed:
            return "; ".join(failed)[:400]
        last = lines[-1:]
        if code < 0:
            last.insert(0, signal.Signals(-code).name)
        return f"FAILED: {' '.join(last)[:400]}"

    # ---- what is run

    def check(self, *names):
        """Start checks of gpu.py, one after another in a process."""
        return self.start(names[0], BENCHMARKS / "gpu.py", *names, "--device", self.device)

    def train(self, name, *flags):
        """Start a training."""
        if self.tiny:
            flags = [*flags, "--dataset", "digits", "--epochs", 1, "--train-fraction", 0.05]
        return self.start(name, ROOT / "train.py", "--device", self.device, *self.data,
                          "--results-dir", self.runs / name, *flags)

    def steps(self, network, *ways, waits=False):
        """Start the measurement of a network's steps."""
        fewer = ["--steps", 4] if network == "resnet50q" else []
        fewer = ["--batch-size", 2, "--steps", 1] if self.tiny else fewer
        waits = ["--wait"] if waits else []
        name = f"steps_{network}_{'_'.join(ways)}"
        return self.start(name, BENCHMARKS / "gpu_steps.py", network, *ways, *fewer, *waits,
                          "--device", self.device)

    def networks(self):
        return ("svhnq",) if self.tiny else NETWORKS

    def precisions(self):
        return ("fp32", "tf32", "bf16") if self.on_gpu else ("fp32", "bf16")

    # ---- tables

    def add_table(self, head, rows):
        """Add a Markdown table to those that are printed last."""
        self.tables.append(markdown_table(head, rows))

    def add_outcomes(self):
        self.add_table(["process", "outcome"], sorted(self.outcomes.items()))

    def add_steps(self):
        """Add the table of steps, and write figures.jsonl."""
        figures = []
        for name in self.jobs:
            if name.startswith("steps_"):
                lines = [line for line in self.log(name).splitlines() if line.startswith("{")]
                figures += map(json.loads, lines)
        write_text(self.folder / "figures.jsonl", "".join(
            json.dumps(figure) + "\n" for figure in figures))
        reference = {figure["network"]: figure["ms"] for figure in figures
                     if figure["way"] == "reference"}
        self.add_table(
            ["network", "batch", "way", "ms a step", "CPU ms", "GiB", "reference / it"],
            [[figure["network"], figure["batch"], figure["way"], f"{figure['ms']:.2f}",
              f"{figure['cpu_ms']:.2f}", figure["gib"],
              ratio(reference.get(figure["network"]), figure["ms"])] for figure in figures])

    def add_accuracy(self, title, on_cpu, groups):
        """Add a table of the last epoch's top-1 (%), mean ± standard deviation; keep its metrics.

        on_cpu: the same on a CPU, at BITS. groups: {way: runs, one per seed}; of each those that
        came furthest.
        """
        rows = [["CPU", "", "", *on_cpu]] if on_cpu else []
        for way, names in groups.items():
            histories = [history for history in map(self.history, names) if history]
            if not histories:
                continue
            epochs = max(history[-1]["epoch"] for history in histories)
            histories = [history for history in histories if history[-1]["epoch"] == epochs]
            row = [way, len(histories), epochs]
            for bits in BITS:
                values = [history[-1]["val"][bits]["top1"] for history in histories
                          if bits in history[-1]["val"]]
                row.append(mean_and_deviation(values))
            rows.append(row)
        self.add_table([f"{title}, top-1 (%)", "seeds", "epochs", *BITS], rows)

    def history(self, name):
        """Return the records of a run's epochs, and copy them to the folder."""
        path = self.runs / name / "metrics.jsonl"
        if not path.exists():
            return []
        shutil.copy(path, self.folder / f"{name}.metrics.jsonl")
        return read_metrics(path)

    def print_tables(self):
        """Print the tables, and write table.md."""
        text = "\n\n".join(self.tables) + "\n"
        write_text(self.folder / "table.md", text)
        print(f"\n{text}", flush=True)


def ratio(reference, value):
    return f"{reference / value:.2f}" if reference else ""


# ---- the calls

def first(call):
    """Without compiling: checks, digits to the end, and steps beside the reference way's."""
    # Reads the packages from disk before five processes would.
    call.wait([call.start("warm_up", "-c", f"import sklearn, matplotlib.pyplot, torch, torchvision;"
                          f" torch.zeros(1, device={call.device!r})")], until=0.3)
    jobs = [call.check("levels", "integer_operands", "shared_is_not_shared"),
            call.train("digits", "--batch-size", 64)]
    runs = {"default": ["digits"]}
    if call.on_gpu:
        jobs += [call.check("nothing_waits"), call.check("graph_is_eager"),
                 call.train("digits_graph", "--batch-size", 64, "--cuda-graph")]
        runs["as a CUDA graph"] = ["digits_graph"]
    call.wait(jobs, until=0.55)
    for network in call.networks():
        ways = ["reference", *call.precisions()]
        if network == "resnet50q":  # the last one, of which not all may be reached
            ways = [*call.precisions()[:0:-1], "reference", "fp32"]
        call.wait([call.steps(network, *ways)], until=1)
    call.add_outcomes()
    call.add_accuracy("digits", DIGITS_ON_CPU, runs)
    call.add_steps()


def second(call):
    """Compiled, side by side: a check, and steps in bf16, which are timed one by one."""
    checks = [call.check("compiled_is_eager")]
    workers = [call.steps(network, "bf16-compile", waits=True) for network in call.networks()[:2]]
    call.wait([*workers, *checks], until=0.8,
              done=lambda name: name in workers and "\nready\n" in f"\n{call.log(name)}")
    for name in workers:
        if name not in call.outcomes:
            with contextlib.suppress(OSError):  # it has died
                call.jobs[name].stdin.write("go\n")
                call.jobs[name].stdin.flush()
            call.wait([name], until=1)
    call.add_outcomes()
    call.add_steps()


def third(call):
    """Fashion-MNIST, three seeds side by side, fp32 and the fastest way; then resnet20q."""
    recipe = ["--dataset", "fashion-mnist", "--epochs", 6, "--lr_decay", "3,5", "--batch-size", 128]
    fp32 = ["--precision", "fp32", *(["--cuda-graph"] if call.on_gpu else [])]
    ways = {" ".join(flags): flags for flags in (fp32, call.fastest)}
    runs = {way: [call.train(f"svhnq_{index}_seed{seed}", *recipe, *flags, "--seed", seed)
                  for seed in range(3)] for index, (way, flags) in enumerate(ways.items())}
    call.wait([name for names in runs.values() for name in names], until=0.65)
    large = [*recipe, "--epochs", 2, "--lr_decay", "1", "--model", "resnet20q", *call.fastest]
    if call.tiny:
        large += ["--width", 1]
    lists = {"resnet20q, any": "1,2,4,8,32", "resnet20q, dedicated": "32"}
    longer = {name: [call.train(f"resnet20q_{widths.count(',')}", *large, "--bit_width_list",
                                widths)] for name, widths in lists.items()}
    call.wait([name for names in longer.values() for name in names], until=1)
    call.add_outcomes()
    call.add_accuracy("Fashion-MNIST", FASHION_ON_CPU, {**runs, **longer})


CALLS = {function.__name__: function for function in (first, second, third)}


def run_call(name, options, device):
    """Run a call and print its tables; return whether all that it ran went well."""
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(143))  # ends its processes, too
    with Call(name, options, device) as call:
        CALLS[name](call)
        call.print_tables()
        return not any("FAILED: " in outcome for outcome in call.outcomes.values())
