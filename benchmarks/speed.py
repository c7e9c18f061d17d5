"""What the fast path gains over the plain one (--plain), on this machine, with random images of each data set's shape.

    python benchmarks/speed.py step                        # one training step, and its memory
    python benchmarks/speed.py epoch --images 6400         # an epoch with its loader
    python benchmarks/speed.py loader                      # the loaders alone
    python benchmarks/speed.py widths                      # 1 to 9 bit-widths
    python benchmarks/speed.py job --epochs 30             # train_digits.sh's training, whole processes
    python benchmarks/speed.py step --model resnet20q --batch-size 128 --precision bf16 --compile

Plain and fast runs alternate, each figure is the median of --repeats; prints Markdown tables. --precision and --compile
are the fast path's.
"""
import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train  # noqa: E402
import utils  # noqa: E402
from dataset.data import DATASETS  # noqa: E402
from models.quan_ops import BIT_WIDTHS  # noqa: E402
from step import DTYPES, TrainingStep  # noqa: E402

SETTINGS = {"svhnq": ("svhn", 64), "resnet20q": ("cifar10", 128), "resnet50q": ("imagenet", 64)}  # data set, batch size
STORED = {"digits": (8, 8, 3), "svhn": (32, 32, 3), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3), "mnist": (28, 28),
          "imagenet": (375, 500, 3)}  # an image's shape before the transforms


class RandomImages(Dataset):
    """Random uint8 images of a data set's stored shape; of a large one a few, again and again."""

    def __init__(self, name, count):
        self.count = count
        generator = torch.Generator().manual_seed(0)
        different = min(count, 64 if name == "imagenet" else count)
        self.images = torch.randint(256, (different, *STORED[name]), dtype=torch.uint8, generator=generator).numpy()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Image.fromarray(self.images[index % len(self.images)]), index % 10


def arguments(options, plain, bit_widths=None):
    """train.py's own arguments for one path."""
    flags = ["--model", options.model, "--dataset", options.dataset, "--batch-size", options.batch_size,
             "--device", options.device, "--workers", options.workers]
    if bit_widths:
        flags += ["--bit_width_list", ",".join(map(str, bit_widths))]
    if plain:
        flags += ["--plain"]
    else:
        flags += ["--precision", options.precision, *(["--compile"] if options.compile else [])]
    return train.parse_args(list(map(str, flags)))


class Run:
    """A network with its step, as train.py makes them."""

    def __init__(self, options, plain, bit_widths=None):
        self.args = arguments(options, plain, bit_widths)
        self.device = utils.choose_device(self.args.device)
        train.seed_random_numbers(0)
        self.model = train.make_model(self.args, DATASETS[self.args.dataset].num_classes or 1000).to(self.device)
        self.computation = train.make_computation(self.args, self.model, self.device)
        captures = self.computation.compiles and self.device.type == "cuda"
        self.optimizer = train.make_optimizer(self.args, self.model.parameters(), self.device, captures)
        self.step = TrainingStep(self.computation, self.optimizer, self.args.bit_width_list, self.args.loss, captures)
        size = DATASETS[self.args.dataset].image_size
        self.images = torch.randn(self.args.batch_size, 3, size, size, device=self.device)
        if not plain:
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.arange(self.args.batch_size, device=self.device) % 10
        self.metrics = utils.Metrics(self.args.bit_width_list, self.device)

    def one_step(self):
        self.computation.set_backends()
        row, _ = self.step(self.images, self.labels, 1.0, None)
        self.metrics.add(row, len(self.labels))
        if self.args.plain:
            self.metrics.averages()
            self.metrics.check_finite("step")

    def seconds(self, steps):
        """The time of `steps` steps."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.one_step()
        self.metrics.check_finite("step")
        synchronize(self.device)
        return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(functions, repeats):
    """The median time of each function, called in turn."""
    times = [[function() for function in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)]


def seconds_of_steps(runs, options):
    """The median time of a step of each run."""
    for run in runs:
        run.seconds(5)  # lazy initialisation, compiling, capturing
    return medians([lambda run=run: run.seconds(options.steps) / options.steps for run in runs], options.repeats)


def table(title, head, rows):
    print(f"\n{title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    sys.stdout.flush()


# ---- memory

def memory_of_a_step(options, plain):
    """MiB that a step needs at its height beyond what stays between steps, in a process of its own."""
    command = [sys.executable, __file__, "memory", "--model", options.model, "--dataset", options.dataset, "--batch-size",
               str(options.batch_size), "--precision", options.precision, "--device", options.device,
               *(["--compile"] if options.compile else []), *(["--of-plain"] if plain else [])]
    # So that the C library gives what is freed back to the system at once, and the process's size tells.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def print_memory(options):
    run = Run(options, options.of_plain)
    for _ in range(6):
        run.one_step()
    gc.collect()
    if run.device.type == "cuda":
        synchronize(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
        run.seconds(2)
        peak = torch.cuda.max_memory_reserved(run.device) if run.step.graph else torch.cuda.max_memory_allocated(run.device)
        print(json.dumps(peak / 2**20))
        return

    def size(name):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    before = size("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the greatest size so far
    run.seconds(2)
    print(json.dumps(size("VmHWM") - before))


# ---- measurements

def peak_flops(precision, device):
    """FLOP/s of a large matrix product in `precision`: the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    a = torch.randn(size, size, device=device, dtype=DTYPES.get(precision, torch.float32))

    def once():
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        synchronize(device)
        return time.perf_counter() - start
    return 5 * 2 * size**3 / min(once() for _ in range(5))


def flops_of_a_step(options):
    """Multiplications and additions of the convolutions and products of one step, what is shared counted once."""
    fast = argparse.Namespace(**{**vars(options), "compile": False, "precision": "fp32"})
    run = Run(fast, plain=False)
    run.model.double()  # by torch's operations, which are counted
    run.images = run.images.double()
    with FlopCounterMode(display=False) as counter:
        run.one_step()
    return counter.get_total_flops()


def measure_step(options):
    memory = [memory_of_a_step(options, plain) for plain in (True, False)]
    flops = flops_of_a_step(options)
    runs = [Run(options, plain) for plain in (True, False)]
    times = seconds_of_steps(runs, options)
    peaks = [peak_flops(run.args.precision, run.device) for run in runs]
    rows = [[name, f"{1000 * seconds:.1f}", f"{options.batch_size / seconds:.0f}", f"{times[0] / seconds:.2f}",
             f"{mebibytes:.1f}", f"{flops / seconds / 1e9:.0f}", f"{100 * flops / seconds / peak:.0f} %"]
            for name, seconds, mebibytes, peak in zip(names(options), times, memory, peaks)]
    table(f"A step: {describe(options)}", ["path", "ms", "images/s", "ratio", "MiB", "GFLOP/s", "of matmul peak"], rows)
    return {"ratio": times[0] / times[1], "share": flops / times[1] / peaks[1], "memory": memory[1] / memory[0]}


def loaders(options):
    train.get_dataset = lambda name, split, data_dir: RandomImages(name, options.images)
    result = []
    for plain in (True, False):
        args = arguments(options, plain)
        result.append(train.make_loader(args, utils.choose_device(args.device), train=True))
    return result


def seconds_of_loader(loader, device):
    loader.batch_sampler.epoch += 1
    start = time.perf_counter()
    for images, labels in loader:
        pass
    synchronize(device)
    return time.perf_counter() - start


def measure_loader(options):
    runs = [Run(options, plain) for plain in (True, False)]
    both = loaders(options)
    steps = seconds_of_steps(runs, options)
    loading = medians([lambda loader=loader: seconds_of_loader(loader, runs[0].device) for loader in both], options.repeats)
    rows = [[name, f"{options.images / seconds:.0f}", f"{options.batch_size / step:.0f}",
             f"{options.images / seconds / (options.batch_size / step):.1f}"]
            for name, seconds, step in zip(names(options), loading, steps)]
    table(f"The loader alone: {describe(options)}, {options.images} images",
          ["path", "images/s loaded", "images/s trained", "ratio"], rows)
    return {"loader": options.images / loading[1] / (options.batch_size / steps[1])}


def measure_epoch(options):
    runs = [Run(options, plain) for plain in (True, False)]
    both = loaders(options)
    for run in runs:
        run.seconds(5)

    def epoch(run, loader):
        run.computation.set_backends()
        synchronize(run.device)
        start = time.perf_counter()
        loader.batch_sampler.epoch += 1
        train.train_one_epoch(loader, run.step, utils.Metrics(run.args.bit_width_list, run.device),
                              1 if run.args.plain else run.args.print_freq, "epoch", lambda: None, lambda wished: None)
        synchronize(run.device)
        return time.perf_counter() - start
    times = medians([lambda pair=pair: epoch(*pair) for pair in zip(runs, both)], options.repeats)
    rows = [[name, f"{seconds:.2f}", f"{options.images / seconds:.0f}", f"{times[0] / seconds:.2f}"]
            for name, seconds in zip(names(options), times)]
    table(f"An epoch of {options.images} images with its loader: {describe(options)}",
          ["path", "s", "images/s", "ratio"], rows)
    return {"ratio": times[0] / times[1]}


def measure_widths(options):
    lists = [sorted(BIT_WIDTHS, reverse=True)[:count] for count in range(1, 10)]
    runs = [Run(options, False, widths) for widths in lists]
    times = seconds_of_steps(runs, options)
    single = [Run(options, False, [bits]) for bits in sorted(BIT_WIDTHS, reverse=True)]
    sums = list(itertools.accumulate(seconds_of_steps(single, options)))
    rows = [[len(widths), ",".join(map(str, widths)), f"{1000 * seconds:.1f}", f"{seconds / times[0]:.2f}",
             f"{seconds / total:.2f}"] for widths, seconds, total in zip(lists, times, sums)]
    table(f"Number of bit-widths: {describe(options)}, fast path",
          ["bit-widths", "which", "ms a step", "of one", "of the same ones trained alone"], rows)


def measure_job(options):
    times = {True: [], False: []}
    for _ in range(options.repeats):
        for plain in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, ROOT / "train.py", "--device", options.device, "--epochs", str(options.epochs),
                           "--results-dir", f"{folder}/run", *(["--plain"] if plain else [])]
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                times[plain].append(time.perf_counter() - start)
    plain, fast = (statistics.median(times[path]) for path in (True, False))
    table(f"train.py on digits, {options.epochs} epochs, whole process: {machine(options)}",
          ["path", "s", "ratio"], [["plain", f"{plain:.1f}", "1.00"], ["fast", f"{fast:.1f}", f"{plain / fast:.2f}"]])


def names(options):
    extras = [options.precision] + (["compiled"] if options.compile else [])
    return "plain, fp32", f"fast, {', '.join(extras)}"


def describe(options):
    return f"{options.model}, {options.dataset} shapes, batch {options.batch_size}, {machine(options)}"


def machine(options):
    return f"{utils.describe(utils.choose_device(options.device))}, torch {torch.__version__}, median of {options.repeats}"


MEASUREMENTS = {"step": measure_step, "epoch": measure_epoch, "loader": measure_loader, "widths": measure_widths,
                "job": measure_job, "memory": print_memory}


def parse_args(argv=None):
    parser = utils.OneLineParser(description=__doc__.splitlines()[0], formatter_class=utils.HelpFormatter)
    parser.add_argument("what", choices=MEASUREMENTS, help="what to measure (memory: used by step)")
    parser.add_argument("--model", choices=SETTINGS, default="svhnq")
    parser.add_argument("--dataset", choices=DATASETS, help="whose shapes; unset: the model's own")
    parser.add_argument("--batch-size", type=train.whole_number(1))
    parser.add_argument("--precision", choices=train.PRECISIONS, default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", type=train.device_name, default="auto")
    parser.add_argument("--workers", type=train.whole_number(0), default=0)
    parser.add_argument("--images", type=train.whole_number(1), default=1280, help="of an epoch")
    parser.add_argument("--epochs", type=train.whole_number(1), default=30, help="of a job")
    parser.add_argument("--repeats", type=train.whole_number(1), default=7)
    parser.add_argument("--steps", type=train.whole_number(1), default=5, help="of one timing")
    parser.add_argument("--of-plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    dataset, batch_size = SETTINGS[options.model]
    options.dataset, options.batch_size = options.dataset or dataset, options.batch_size or batch_size
    return options


def main(options):
    return MEASUREMENTS[options.what](options)


if __name__ == "__main__":
    utils.run(main, parse_args)
