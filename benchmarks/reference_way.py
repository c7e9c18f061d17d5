"""Train the reference way: the same computation as train.py, without its optimizations.

    python benchmarks/reference_way.py --epochs 30 --results-dir results/reference

It takes train.py's flags. Bit-widths share nothing, in training and in evaluation; all is in
float32, uncompiled and in the contiguous memory format; the optimizer is torch's default, not
fused; images are transformed one by one; metrics are read at every step. On a GPU, convolutions
round their operands to TF32, the published grid's too, as torch does where nothing is said.
"""
import contextlib
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"reference": "benchmarks/reference_way.py", "default": "train.py"}
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from dataset.loader import make_loader  # noqa: E402
from engine import setup, state  # noqa: E402
from engine.arguments import parse_flags  # noqa: E402
from engine.errors import UsageError, run_program  # noqa: E402
from engine.forward_pass import AUTO, ForwardPass  # noqa: E402
from engine.metrics import Metrics  # noqa: E402
from models import quan_ops  # noqa: E402


class ReferenceForwardPass(ForwardPass):
    """A ForwardPass in float32 and contiguous memory format that shares nothing."""

    shared = False

    def __init__(self, model, device, precision="fp32", batch_size=None):
        if precision != "fp32" or batch_size:
            raise UsageError("the reference way is float32, uncompiled: leave --precision and "
                             "--compile out")
        super().__init__(model, device)
        torch.backends.cudnn.allow_tf32 = True  # torch's default


class MetricsReadEveryStep(Metrics):
    """Metrics that are read at every step."""

    def add(self, results, labels):
        super().add(results, labels)
        self.averages()  # synchronizes


def make_optimizer(args, parameters):
    """Return the optimizer, not fused."""
    optimizer = setup.make_optimizer(args, parameters)
    for group in optimizer.param_groups:
        group["fused"] = None  # torch's default
    return optimizer


def reference_precision(precision, device):
    """Return a precision: fp32 unless the user names one, which is then refused."""
    return "fp32" if precision == AUTO else precision


@contextlib.contextmanager
def patched():
    """Make train.py train the reference way within the context."""
    with (patch.object(setup, "ForwardPass", ReferenceForwardPass),
          patch.object(quan_ops, "low_precision", lambda x: False),
          patch.object(train, "choose_precision", reference_precision),
          patch.object(setup, "make_loader", partial(make_loader, in_memory=False)),
          patch.object(train, "make_optimizer", make_optimizer),
          patch.object(state, "Metrics", MetricsReadEveryStep)):
        yield


def main(flags):
    with patched():
        return train.main(flags)


if __name__ == "__main__":
    run_program(main, partial(parse_flags, description=__doc__.splitlines()[0]))
