"""The checks of gpu.py: a device computes correct numbers. Most of them run on a CPU too."""
import contextlib
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.functional import conv2d

import reference_way  # noqa: F401  first: it adds the project to the path
import train
from dataset.loader import InMemoryLoader, ShuffledBatches
from engine import setup
from engine.arguments import parse_flags
from engine.cuda_graph import GraphStep
from engine.evaluation import evaluate
from engine.forward_pass import ForwardPass
from engine.metrics import Metrics
from engine.run_folder import read_metrics
from models import BITS as EVERY_BIT_WIDTH
from models import MODELS, BitWidth
from models.losses import any_precision_backward
from models.quan_ops import ActivationQ, Conv2dQ
from models.sharing import no_sharing, shared_computation

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms
BITS = (1, 2, 4, 8, 32)
LOW_AND_HIGH = (1, 32)  # of a check that compiles, for minutes
COUNT = 16  # images per batch


def precisions(device):
    """Return the precisions that a device supports."""
    return ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16")


def random(*shape, seed=0):
    """Return seeded normal numbers, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def deterministic():
    """Use deterministic algorithms, and the same ones every time, within the context."""
    class Deterministic(ForwardPass):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            torch.backends.cudnn.benchmark = False

    torch.use_deterministic_algorithms(True)
    try:
        with patch.object(setup, "ForwardPass", Deterministic):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


class Steps:
    """Training steps of a narrow network on one batch; seed: of its weights and dropout."""

    def __init__(self, device, name="resnet20q", precision="fp32", compiles=False, bit_widths=BITS,
                 optimizer=torch.optim.Adam, seed=0, lr=0.01):
        torch._dynamo.reset()  # it counts all graphs of a function in the process, and has a limit
        torch.manual_seed(seed)
        self.device = device
        self.bit_widths = bit_widths
        self.model = MODELS[name](bit_widths, num_classes=10, width=1).to(device).train()
        self.forward_pass = setup.ForwardPass(
            self.model, device, precision, COUNT if compiles else None)
        self.optimizer = optimizer(self.model.parameters(), lr=lr, fused=True)
        self.take = self.take_step
        self.metrics = Metrics(bit_widths, device)
        size = 40 if name == "svhnq" else 32
        self.images = random(COUNT, 3, size, size).to(device).contiguous(
            memory_format=self.forward_pass.memory_format)
        self.labels = torch.arange(COUNT, device=device) % 10

    def backward(self, bit_widths=None, count=COUNT):
        """Add the gradients of a batch of `count` images; return its results."""
        return self.forward_pass.backward(
            self.images[:count], self.labels[:count], bit_widths or self.bit_widths, "recursive")

    def take_step(self, images, labels, bit_widths, loss_scale):
        self.optimizer.zero_grad()
        results = self.forward_pass.backward(images, labels, bit_widths, "recursive", loss_scale)
        self.optimizer.step()
        return results

    def step(self, count=COUNT):
        """Take a step, and add it to the metrics; return its results."""
        results = self.take(self.images[:count], self.labels[:count], self.bit_widths, 1.0)
        self.metrics.add(results, self.labels[:count])
        return results

    def use_graph(self):
        """Replay the following steps from a CUDA graph."""
        self.take = GraphStep(self.take_step, self.optimizer, COUNT, self.device)

    def evaluate(self):
        batches = [(self.images, self.labels)]
        evaluate(self.forward_pass, batches, self.bit_widths, self.device)
        self.model.train()


# ---- one layer

def activation(bits):
    layer = ActivationQ()
    layer.switch_bit_width(BitWidth(bits))
    return layer


def levels(device):
    """Activations have float64's levels, except within rounding of a threshold."""
    x = 1.5 * random(1 << 20)
    for bits in range(1, 9):
        n = 2**bits - 1
        u = n * x.double().clamp(0, 1)
        found = (n * activation(bits)(x.to(device)).cpu().double()).round()
        differs = found != u.round()
        assert ((u - u.floor() - 0.5).abs()[differs] < 1e-4).all(), bits


def integer_operands(device):
    """Low-precision convolutions equal float64's of the same levels; in bf16 but for the output."""
    def error(y, exact):
        return float((y.double().cpu() - exact).abs().max() / exact.abs().max())

    conv = Conv2dQ(64, 64, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(random(*conv.weight.shape, seed=1))
    conv.to(device)
    for precision in precisions(device)[1:]:
        forward_pass = ForwardPass(conv, device, precision)
        for bits in range(1, 9):
            n = 2**bits - 1
            conv.switch_bit_width(BitWidth(bits))
            a = activation(bits)(random(8, 64, 16, 16).to(device))
            k = (n * a.double().cpu()).round()
            integers, scale = (part.detach().double().cpu() for part in conv.integer_weight())
            exact = conv2d(k, integers) * scale / n
            with torch.no_grad(), forward_pass.autocast():
                found = error(conv(a), exact)
                published = error(conv2d(a, conv.quantized_weight()), exact)
            print(f"  {precision}, {bits} bits: error {found:.1e}, of the published grid "
                  f"{published:.1e}")
            assert found < (2**-8 if precision == "bf16" else 2e-6), (precision, bits, found)


# ---- a step

def differing(found, expected):
    """Return the bit-widths whose tensor is not near the expected one, or not far from the others.
    """
    beyond = set()
    for bits, value in found.items():
        def distance(other):
            return float((value - expected[other]).norm() / expected[other].norm())
        nearest = min(distance(other) for other in expected if other != bits)
        if not distance(bits) < min(0.1, nearest / 4):
            beyond.add(bits)
    return beyond


def compiled_is_eager(device):
    """Compiled logits and gradients equal eager ones, from the same weights, per bit-width.

    Rounding flips levels, which some weights amplify beyond that: with one of three seeds.
    """
    for precision in precisions(device):
        left = {*LOW_AND_HIGH}
        for seed in range(3):
            found = {}
            for compiles in (False, True):
                logits = {}
                gradients = {}
                steps = Steps(device, precision=precision, compiles=compiles, seed=seed)
                for bits in sorted(LOW_AND_HIGH):
                    steps.optimizer.zero_grad()
                    logits[bits] = steps.backward((bits,))[bits][1].double()
                    gradients[bits] = torch.cat([
                        parameter.grad.flatten().double() for name, parameter
                        in steps.model.named_parameters() if "bn_dict" not in name])
                found[compiles] = logits, gradients
            left &= set().union(*(differing(found[True][part], found[False][part])
                                  for part in (0, 1)))
            if not left:
                break
        assert not left, (precision, left)


def steps_repeat(device):
    """Steps repeat bit for bit, with another lr, a partial batch, and evaluations in between."""
    def weights(optimizer, precision, compiles, evaluates):
        steps = Steps(device, "svhnq", precision, compiles, optimizer=optimizer)
        for step in range(4):
            steps.optimizer.param_groups[0]["lr"] = 0.001 if step > 1 else 0.01
            steps.step(COUNT if step != 2 else 5)
            if evaluates:
                steps.evaluate()
        return torch.cat([parameter.flatten() for parameter in steps.model.parameters()])

    with deterministic():
        for optimizer in (torch.optim.Adam, torch.optim.SGD):
            for precision in precisions(device):
                for compiles in (False, True):
                    once, again, evaluated = (
                        weights(optimizer, precision, compiles, evaluates)
                        for evaluates in (False, False, True))
                    case = optimizer.__name__, precision, compiles
                    assert once.isfinite().all() and once.abs().max() < 1000, case
                    assert torch.equal(once, again) and torch.equal(once, evaluated), case


def dropout_differs(device):
    """Two compiled steps from the same weights drop different activations."""
    with deterministic():
        steps = Steps(device, "svhnq", compiles=True)
        first, second = (steps.backward((32,))[32][1] for _ in range(2))
    assert not torch.equal(first, second)


def shared_is_not_shared(device):
    """In float64 the default's gradients equal those of computing everything at each bit-width."""
    gradients = []
    for sharing in (no_sharing, shared_computation):
        steps = Steps(device)
        model = steps.model.double()
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):  # off the ends of the clamp
                parameter += 0.1 * random(*parameter.shape, seed=index).to(parameter)
        any_precision_backward(
            model, steps.images.double(), steps.labels, BITS, sharing=sharing)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def graph_is_eager(device):
    """Steps replayed from a CUDA graph equal eager ones bit for bit, odd batches too."""
    with deterministic():
        for name in ("resnet20q", "svhnq"):
            for optimizer in (torch.optim.Adam, torch.optim.SGD):
                for precision in precisions(device):
                    found = []
                    for is_graph in (False, True):
                        steps = Steps(device, name, precision, optimizer=optimizer, lr=2**-7)
                        if is_graph:
                            steps.use_graph()
                        losses = [steps.step(count)[bits][0].clone() for count in
                                  (COUNT, COUNT, COUNT, COUNT, 5, COUNT) for bits in (1, 32)]
                        weights = [parameter.flatten() for parameter in steps.model.parameters()]
                        found.append(torch.cat([torch.stack(losses), *weights]).detach())
                    case = name, optimizer.__name__, precision
                    assert found[0].isfinite().all() and torch.equal(*found), case


def nothing_waits(device, compiled=False):
    """No step, eager or a CUDA graph, metric or in-memory batch makes the CPU wait for the GPU."""
    images = torch.zeros(4 * COUNT, 40, 40, 3, dtype=torch.uint8, device=device)
    loader = InMemoryLoader(images, torch.zeros(4 * COUNT, dtype=torch.int64, device=device),
                            "digits", ShuffledBatches(4 * COUNT, COUNT, seed=0),
                            memory_format=torch.channels_last)
    for name in ("resnet20q", "svhnq"):
        for precision in precisions(device):
            for is_graph in (False, True) if device.type == "cuda" else (False,):
                steps = Steps(device, name, precision, compiled)
                if is_graph:
                    steps.use_graph()
                batches = iter(loader)
                for _ in range(3 if is_graph else 1):  # the first ones may wait, as may
                    steps.step()
                next(batches)  # an epoch's first batch
                torch.cuda.set_sync_debug_mode("error")
                try:
                    steps.step()
                    for _ in batches:
                        pass
                finally:
                    torch.cuda.set_sync_debug_mode("default")


def nothing_waits_compiled(device):
    """No compiled step makes the CPU wait for the GPU."""
    nothing_waits(device, compiled=True)


def compiles_once(device):
    """With nine bit-widths, in training and evaluation, nothing is compiled a second time."""
    steps = Steps(device, "svhnq", "bf16", compiles=True, bit_widths=EVERY_BIT_WIDTH)
    steps.step()
    steps.evaluate()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            steps.step()
            steps.evaluate()


# ---- runs

def resumed_is_whole(device):
    """A compiled bf16 run resumed after an epoch equals an uninterrupted one, bit for bit."""
    with tempfile.TemporaryDirectory() as folder, deterministic():
        def run(name, *flags):
            path = Path(folder, name)
            train.main(parse_flags(["--device", str(device), "--precision", "bf16", "--compile",
                                    "--lr_decay", "2", *flags, "--results-dir", str(path)]))
            return [record["train"] for record in read_metrics(path / "metrics.jsonl")]
        whole = run("whole", "--epochs", "3")
        run("parts", "--epochs", "1")
        parts = run("parts", "--resume", f"{folder}/parts", "--epochs", "3")
    assert whole == parts, (whole[-1], parts[-1])


CHECKS = {check.__name__: check for check in (
    levels, integer_operands, compiled_is_eager, steps_repeat, dropout_differs,
    shared_is_not_shared, graph_is_eager, nothing_waits, nothing_waits_compiled, compiles_once,
    resumed_is_whole)}
