"""Training on random images as train.py does it, in the default way or the reference way."""
import contextlib
import time
from functools import partial
from types import SimpleNamespace

import torch
from PIL import Image

import reference_way  # first: it adds the project to the path
import train
from dataset.data import DATASETS
from dataset.loader import ShuffledBatches
from engine import setup
from engine.arguments import merge_args, parse_flags
from engine.console import Console
from engine.cuda_graph import GraphStep
from engine.device import choose_device
from engine.errors import StopRequest
from engine.state import TrainingState
from utils import flag_text

WAYS = {"reference": reference_way.patched, "default": contextlib.nullcontext}
BITS = (1, 2, 4, 8, 32)
NEVER_SAVES = SimpleNamespace(save_is_due=lambda: False)  # train_one_epoch's results folder


def random_images(name, count):
    """Return random samples as data set `name` has them; large images are a few that repeat."""
    shape = (min(count, 64), 375, 500, 3) if name == "imagenet" else (count, 32, 32, 3)
    images = list(map(Image.fromarray, torch.randint(256, shape, dtype=torch.uint8).numpy()))
    return [(images[index % len(images)], index % 10) for index in range(count)]


class OneBatch:
    """A loader that yields the same random batch `steps` times."""

    def __init__(self, size, image_size, steps, device, memory_format):
        images = torch.randn(size, 3, image_size, image_size, device=device)
        self.images = images.contiguous(memory_format=memory_format)
        self.labels = torch.arange(size, device=device) % 10
        self.batch_sampler = ShuffledBatches(steps * size, size, seed=0)

    def __iter__(self):
        yield from [(self.images, self.labels)] * len(self.batch_sampler)


class Run:
    """A training run as train.py makes it, in one of WAYS."""

    def __init__(self, options, way, bit_widths=BITS):
        self.args = merge_args(parse_flags(flags(options, way, bit_widths)))
        self.device = choose_device(options.device)
        self.data = DATASETS[options.dataset]
        self.images = options.images
        self.way = way
        torch.manual_seed(0)
        model = setup.make_model(self.args, bit_widths, self.data.num_classes or 1000)
        model.to(self.device)
        with WAYS[way]():
            self.forward_pass = setup.make_forward_pass(self.args, model, self.device)
            self.state = TrainingState(
                model, train.make_optimizer(self.args, model.parameters()),
                bit_widths, self.device, vars(self.args), options.images)
            self.step = partial(train.take_step, self.state, self.forward_pass, self.args.loss)
            if self.args.cuda_graph:
                self.step = GraphStep(self.step, self.state.optimizer, self.args.batch_size,
                                      self.device)
        self.console = Console(bit_widths, 1, 1, self.args.print_freq, bar=False)

    def loader(self):
        """Return the training loader, with random images."""
        images = random_images(self.args.dataset, self.images)
        with WAYS[self.way]():
            return setup.make_train_loader(
                self.args, images, self.forward_pass.memory_format, self.device)

    def set_options(self):
        """Set torch's options for the process, which another run may have set otherwise."""
        is_tf32 = self.args.precision == "tf32" or self.way == "reference"
        torch.backends.cudnn.allow_tf32 = is_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def time_steps(self, count):
        """Return the seconds of a step, and those of the CPU until it is launched, means."""
        images, labels = next(iter(OneBatch(
            self.args.batch_size, self.data.image_size, 1, self.device,
            self.forward_pass.memory_format)))
        bit_widths = list(self.state.bit_widths)
        self.set_options()
        self.state.model.train()
        synchronize(self.device)
        start = time.perf_counter()
        cpu_start = time.process_time()
        with WAYS[self.way]():
            for _ in range(count):
                results = self.step(images, labels, bit_widths, 1.0)
                self.state.metrics.add(results, labels)
        cpu_seconds = time.process_time() - cpu_start
        synchronize(self.device)
        seconds = time.perf_counter() - start
        self.state.metrics.unread.clear()
        return seconds / count, cpu_seconds / count

    def seconds(self, loader):
        """Return the seconds of an epoch with this loader."""
        self.set_options()
        self.state.metrics = type(self.state.metrics)(self.state.bit_widths, self.device)
        self.state.epoch += 1
        synchronize(self.device)
        start = time.perf_counter()
        with WAYS[self.way]():
            train.train_one_epoch(self.state, loader, self.step, self.console, NEVER_SAVES,
                                  StopRequest())
        synchronize(self.device)
        return time.perf_counter() - start

    def steps(self, count):
        """Return the seconds of a step, the mean of `count`."""
        return self.seconds(OneBatch(self.args.batch_size, self.data.image_size, count, self.device,
                                     self.forward_pass.memory_format)) / count


def flags(options, way, bit_widths=BITS):
    """Return train.py's flags for one of WAYS."""
    own = ["--precision", "fp32"]
    if way == "default":
        own = ["--precision", options.precision, *(["--compile"] if options.compile else []),
               *(["--cuda-graph"] if options.cuda_graph else [])]
    return ["--model", options.model, "--dataset", options.dataset, "--device", options.device,
            "--batch-size", str(options.batch_size), "--workers", str(options.workers),
            "--bit_width_list", flag_text(bit_widths), *own]


def synchronize(device):
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
