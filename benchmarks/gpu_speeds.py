"""The measurements of gpu.py: the parts of a step, whole steps, and epochs."""
from collections import Counter

import torch
from torch.nn.functional import batch_norm, conv2d
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

import speed  # first: it adds the project to the path
from engine.forward_pass import PRECISIONS
from models import MODELS
from trainings import Run, synchronize

SIZES = {"svhnq": (128, 40), "resnet20q": (128, 32), "resnet50q": (64, 224)}  # batch, image size
LAYOUTS = (("bf16, channels-last", torch.bfloat16, torch.channels_last),
           ("fp32, channels-last", torch.float32, torch.channels_last),
           ("fp32, contiguous", torch.float32, torch.contiguous_format))


def milliseconds(function, *args):
    """Return the median time of a call."""
    timer = Timer("function(*args)", globals={"function": function, "args": args})
    return 1000 * timer.blocked_autorange(min_run_time=0.2).median


def layers(name, kind):
    """Count a network's layers of a kind by (settings, shape of the input)."""
    count, size = SIZES[name]
    model = MODELS[name]([32], num_classes=10)
    found = Counter()

    def record(layer, args):
        settings = (layer.weight.shape,)
        if kind is torch.nn.Conv2d:
            settings = (layer.weight.shape, layer.stride, layer.padding)
        found[(settings, (count, *args[0].shape[1:]))] += 1

    for layer in model.modules():
        if isinstance(layer, kind):
            layer.register_forward_pre_hook(record)
    model.eval()(torch.zeros(1, 3, size, size))
    return found


def convolutions(device):
    """Time each distinct convolution: forward pass, gradients of data and of weight, in ms."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    for name in SIZES:
        parts = ("forward", "data", "weight")
        print(f"\n| {name}: weight, input, times | " + " | ".join(
            f"{layout}: {', '.join(parts)}" for layout, _, _ in LAYOUTS) + " |")
        print("|---" * (1 + len(LAYOUTS)) + "|")
        for ((shape, stride, padding), images), times in layers(name, torch.nn.Conv2d).items():
            cells = []
            for _, dtype, layout in LAYOUTS:
                x, w = (torch.randn(size, device=device, dtype=dtype).contiguous(
                    memory_format=layout) for size in (images, shape))
                grad = torch.randn_like(conv2d(x, w, None, stride, padding))

                def backward(*mask):
                    return torch.ops.aten.convolution_backward(
                        grad, x, w, None, stride, padding, (1, 1), False, (0, 0), 1, mask)
                cells.append(", ".join(f"{value:.3f}" for value in (
                    milliseconds(conv2d, x, w, None, stride, padding),
                    milliseconds(backward, True, False, False),
                    milliseconds(backward, False, True, False))))
            print(f"| {'x'.join(map(str, shape))}, {'x'.join(map(str, images))}, {times} | "
                  f"{' | '.join(cells)} |", flush=True)


def batch_norms(device):
    """Time each distinct BatchNorm of resnet20q, forward and backward pass, in ms."""
    print("\n| channels, input, times | fp32, channels-last | fp32, contiguous |\n|---|---|---|")
    for ((shape,), images), times in layers("resnet20q", torch.nn.BatchNorm2d).items():
        cells = []
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(images, device=device).contiguous(memory_format=layout)
            x.requires_grad_()
            weight = torch.ones(shape, device=device, requires_grad=True)

            def both():
                y = batch_norm(x, None, None, weight, weight, training=True)
                return torch.autograd.grad(y, (x, weight), torch.ones_like(y))
            cells.append(f"{milliseconds(both):.3f}")
        print(f"| {shape[0]}, {'x'.join(map(str, images))}, {times} | {' | '.join(cells)} |")


def matrix(device):
    """Compare a step and its memory with the reference, at each precision, eager and compiled."""
    for name in ("svhnq", "resnet20q"):
        for precision in PRECISIONS:
            for flags in ((), ("--compile",)):
                speed.main(speed.parse_args(["step", "--model", name, "--precision", precision,
                                             "--steps", "10", "--repeats", "5", *flags]))


def split(device):
    """Profile a compiled bf16 step of resnet20q: ms per step by kind of kernel."""
    options = speed.parse_args(["step", "--model", "resnet20q", "--precision", "bf16", "--compile"])
    run = Run(options, "default")
    count = 10
    run.steps(5)
    wall = 1000 * run.steps(count)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run.steps(count)
        synchronize(run.device)
    parts = dict.fromkeys(("convolutions and products", "fused kernels", "others"), 0.0)
    launches = 0
    for event in profiled.key_averages():
        words = event.key.lower()
        kind = "others"
        if words.startswith("triton_"):
            kind = "fused kernels"
        elif any(word in words for word in ("conv", "gemm", "cudnn", "cutlass", "xmma", "nvjet")):
            kind = "convolutions and products"
        parts[kind] += event.self_device_time_total / 1000 / count
        launches += event.count / count
    parts["gaps"] = wall - sum(parts.values())
    print(f"\n| part, of {wall:.2f} ms and {launches:.0f} launches | ms |\n|---|---|")
    for part, value in parts.items():
        print(f"| {part} | {value:.2f} |")


# ---- goals

def measure(*words):
    """Return the columns of a table of speed.py, with compiled bf16."""
    return speed.main(speed.parse_args([*words, "--precision", "bf16", "--compile"]))


def check_goal(name, value, goal):
    """Print a value and its goal; raises AssertionError where the goal is missed."""
    print(f"\n{name}: {value:.2f}, goal {goal}", flush=True)
    assert value >= goal, f"{name} is {value:.2f}, below {goal}"


def cifar(device):
    """Measure step, epoch and loader of resnet20q against their goals."""
    network = ["--model", "resnet20q"]
    step = measure("step", *network, "--steps", "20")
    epoch = measure("epoch", *network, "--images", "50000", "--repeats", "3")
    loader = measure("loader", *network, "--images", "50000", "--repeats", "3")
    check_goal("epoch of 50,000 images, ratio", epoch["ratio"][1], 5)
    check_goal("% of the bf16 matmul peak", step["share of matmul peak, %"][1], 20)
    check_goal("memory of a step, reference over default", step["MiB"][0] / step["MiB"][1], 1)
    check_goal("images loaded for one trained", loader["ratio"][1], 20)


def imagenet(device):
    """Measure a step of resnet50q against its goal."""
    step = measure("step", "--model", "resnet50q", "--repeats", "3")
    check_goal("step of resnet50q, ratio", step["ratio"][1], 3)


def widths(device):
    """Measure a step of resnet20q with 1 to 9 bit-widths."""
    measure("widths", "--model", "resnet20q", "--repeats", "3")


MEASUREMENTS = {function.__name__: function for function in (
    convolutions, batch_norms, matrix, split, cifar, imagenet, widths)}
