"""Apply the ideas of docs/ideas.md to a copy of the project, one by one, and check every path.

    python tests/ideas.py [IDEA ...]      # such as b, or f2; prints a line each; exit code 1 where
                                          # a path is wrong
    python tests/ideas.py --suite         # the paths of SUITE alone, in a third of the time
"""
import ast
import contextlib
import copy
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"^## (\w+)\. (.*?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"```python\n# in ([\w/. ]+)\n(.*?)```", re.DOTALL)
SCRIPT = "your own script"
EXCHANGE = "--exchange"  # what torchrun starts twice
COMMON = "--width 1 --bit_width_list 1,4,32 --batch-size 8 --epochs 2 --device cpu".split()
PROJECT = ("models", "engine", "dataset", "deploy", "train", "export", "utils")
FEW = """

import functools

DATASETS["digits"] = DATASETS["digits"]._replace(
    open=functools.cache(lambda root, split: open_digits(root, split)[:16]), shapes={})
"""
# What run_tests.sh checks: of every idea training, shared gradients and one path more, so that
# every path but two processes is that of an idea which could be wrong there.
SUITE = {"a": "calibrate", "b": "resume", "c": "bf16", "d": "packed", "e": "its files",
         "f": "resume", "f2": "bf16", "g": "onnx", "h": "resume", "i": "evaluate",
         "j": "onnx", "k": "evaluate", "l": "onnx"}
REFUSALS = ("packed", "onnx")  # formats, which may refuse


def ideas():
    """Return {name: (title, [(file, code)], flags of train.py)}."""
    text = (ROOT / "docs" / "ideas.md").read_text()
    found = {}
    for name, title, section in SECTION.findall(text):
        flags = re.search(r"^    python train\.py ?(.*)$", section, re.MULTILINE)[1].split()
        found[name] = title, BLOCK.findall(section), flags
    return found


def replaced(source, code):
    """Return a file's source with a block's definitions in the place of those of their names."""
    lines = source.splitlines()
    names = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    new = code.splitlines()
    added = []
    edits = []
    for node in ast.parse(code).body:
        text = new[node.lineno - 1:node.end_lineno]
        old = names.get(getattr(node, "name", None))
        if old:
            edits.append((old.lineno - 1, old.end_lineno, text))
        else:
            added += ["", "", *text]
    for first, last, text in sorted(edits, reverse=True):
        lines[first:last] = text
    return "\n".join([*lines, *added, ""])


def apply(blocks, place):
    """Copy the project to `place`, and change its files."""
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name,
                            ignore=shutil.ignore_patterns("*.pyc.*"))  # which come and go
        else:
            shutil.copy(ROOT / f"{name}.py", place)
    with open(place / "dataset" / "data.py", "a") as file:
        file.write(FEW)
    with open(place / "engine" / "figures.py", "a") as file:  # pictures take a third of the time
        file.write("\n\ndef save_figure(figure, path):\n    pass\n")
    for name, code in blocks:
        if name != SCRIPT:
            file = place / name
            file.write_text(replaced(file.read_text(), code))


class Run:
    """One idea in a process of its own: the modules are those of the changed copy."""

    def __init__(self, name, flags, blocks, place):
        self.name = name
        self.flags = [*COMMON, *flags]
        self.script = [code for name, code in blocks if name == SCRIPT]
        self.place = place
        self.data = None

    def program(self, module, argv):
        """Run a program's main in this process; return what it says on an error."""
        errors = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            try:
                parse = getattr(module, "parse_flags", None) or module.parse_args
                module.run_program(module.main, lambda: parse(list(map(str, argv))))
            except SystemExit as end:
                if end.code:
                    return errors.getvalue().strip() or f"exit code {end.code}"
        return ""

    def train(self):
        """Train two epochs."""
        import train

        must(self.program(train, [*self.flags, "--results-dir", self.place / "whole"]))

    def resume(self):
        """Stop in the second epoch, and resume: the same weights."""
        import train

        whole, parts = self.place / "whole", self.place / "parts"
        steps = 0

        def stop(*args):
            nonlocal steps
            steps += 1
            if steps == 3:  # of 4
                os.kill(os.getpid(), signal.SIGTERM)

        handle = register_optimizer_step_post_hook(stop)
        told = self.program(train, [*self.flags, "--results-dir", parts])
        handle.remove()
        assert "stopped by SIGTERM" in told, told
        must(self.program(train, ["--resume", parts]))
        one, other = (self.load(folder) for folder in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), "resumed to other weights"

    def load(self, folder):
        path = folder / "ckpt" / "model_latest.pth.tar"
        self.content = torch.load(path, weights_only=True)
        return self.content["state_dict"]

    def network(self):
        """Return the trained network, without dropout."""
        from models import build

        state_dict = self.load(self.place / "whole")
        saved = self.content["arguments"]
        self.bit_widths = saved["bit_width_list"]
        self.loss = saved["loss"]
        model = build(saved["model"], self.bit_widths, 10, 1, False, saved["quantizer"])
        model.load_state_dict(state_dict)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(8, 3, 40, 40, generator=generator)
        for code in self.script:
            exec(code, {"model": model, "batches": [self.images]})
        return model

    def shared(self):
        """Compare shared gradients with those of computing everything anew, in float64."""
        from models.losses import any_precision_backward
        from models.sharing import no_sharing, shared_computation

        model = self.network().double()
        gradients = []
        for sharing in (shared_computation, no_sharing):
            own = copy.deepcopy(model).train()
            any_precision_backward(own, self.images.double(), torch.arange(8), self.bit_widths,
                                   self.loss, sharing=sharing)
            gradients.append({key: p.grad for key, p in own.named_parameters()})
        for key, expected in gradients[1].items():
            found = gradients[0][key]
            assert (found is None) == (expected is None), key
            if expected is not None:
                far = (found - expected).norm() / expected.norm().clamp_min(1e-6)
                assert far < 1e-9, f"shared gradient of {key} is off by {far:.1g}"

    def processes(self):
        """Train by two processes; exchanged gradients are those of both halves of a batch."""
        self.in_two_processes("train.py", *self.flags, "--results-dir", self.place / "processes")
        weights = self.load(self.place / "processes").values()
        assert all(tensor.isfinite().all() for tensor in weights)
        script = [ROOT / "tests" / "ideas.py", EXCHANGE, self.place, self.name]
        self.in_two_processes(*script)

    def in_two_processes(self, *command):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
             *map(str, command)], cwd=self.place, capture_output=True, text=True,
            timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr

    def exchanged(self):
        """Compare, on each of two processes, exchanged gradients with those of both halves."""
        from engine import distributed
        from models.losses import any_precision_backward

        with distributed.processes(torch.device("cpu"), 120):
            model = self.network().double().train()
            gradients = []
            for ranks in ([distributed.rank()], [0, 1]):
                total = {}
                for rank in ranks:
                    own = copy.deepcopy(model)
                    half = slice(rank, None, 2)
                    any_precision_backward(own, self.images[half].double(), torch.arange(8)[half],
                                           self.bit_widths, self.loss, loss_scale=0.5)
                    if len(ranks) == 1:
                        distributed.exchange_gradients(own.parameters())
                    for key, parameter in own.named_parameters():
                        if parameter.grad is not None:
                            total[key] = total.get(key, 0) + parameter.grad
                gradients.append(total)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())

    def evaluate(self):
        import train

        must(self.program(train, ["--evaluate", "--pretrain", self.place / "whole",
                                  "--results-dir", self.place / "evaluated"]))

    def calibrate(self):
        import train

        must(self.program(train, [
            "--evaluate", "--pretrain", self.place / "whole", "--bit_width_list", "7,w3a5",
            "--calibrate", 1, "--results-dir", self.place / "calibrated"]))

    def bf16(self):
        """Compare each quantized layer in bf16 with float32, at every bit-width; train an epoch.

        Each by itself, on what reaches it in bf16: together, rounding what they return moves
        activations to the next level, which hides a wrong scale.
        """
        import train

        from engine.forward_pass import ForwardPass
        from models import set_bit_width
        from models.quan_ops import QuantizedLayer

        def compare(layer, inputs, found):
            after = torch.get_rng_state()
            torch.set_rng_state(states.pop(layer))  # of a quantizer that draws numbers
            with torch.autocast("cpu", enabled=False):
                expected = layer.forward(inputs[0].float())
            torch.set_rng_state(after)
            errors.append(((found - expected).norm() / expected.norm()).item())

        model = self.network()
        forward_pass = ForwardPass(model, torch.device("cpu"), "bf16")
        states, errors = {}, []
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer):
                layer.register_forward_pre_hook(
                    lambda layer, inputs: states.update({layer: torch.get_rng_state()}))
                layer.register_forward_hook(compare)
        for training in (True, False):
            model.train(training)
            for width in self.bit_widths:
                set_bit_width(model, width)
                with torch.no_grad(), forward_pass.autocast():
                    model(self.images)
        assert errors and max(errors) < 0.02, f"bf16 is off by {max(errors):.2g}"
        must(self.program(train, [*self.flags, "--epochs", 1, "--train-fraction", 0.3,
                                  "--precision", "bf16",
                                  "--results-dir", self.place / "bf16"]))

    def export(self, form, suffix):
        """Export at one bit-width; the program itself compares logits with the network."""
        import export

        self.network()
        # 8 bits in OpenVINO want a CPU with VNNI, which CI may not have.
        width = next(width for width in reversed(self.bit_widths) if width not in (8, 32))
        error = self.program(export, [self.place / "whole", "--format", form, "--bits", width,
                                      "--output", self.place / f"net{suffix}", "--check", 8])
        if error:
            assert re.search(r"layer [\w.]+", error) and "\n" not in error, error
            return "refused"
        if form == "onnx":
            report = json.loads((self.place / "net_onnx_check.json").read_text())["results"]
            assert not any(found["falls_short"] for found in report.values()), report

    def script_files(self):
        """Compare a changed network's files with it."""
        import numpy

        from deploy import onnx_file, runtimes
        from models import packed, set_bit_width

        model = self.network().eval()
        about = {"network": {"model": "svhnq", "width": 1, "all_conv": False, "classes": 10}}
        set_bit_width(model, 4)
        with torch.no_grad():
            expected = model(self.images).numpy()
        packed.save(model, [4], self.place / "s", about)
        runs = {"packed": runtimes.packed_run(self.place / "s")}
        onnx_file.export(model, [4], self.place / "s.onnx", 40)
        runs["onnxruntime"] = runtimes.onnxruntime_run(self.place / "s.onnx")
        runs["openvino"] = runtimes.openvino_run(self.place / "s.onnx")
        for form, run in runs.items():
            far = numpy.median(numpy.abs(run(self.images.numpy(), 4) - expected).max(1))
            assert far < 1e-3 * numpy.abs(expected).max(), f"{form} is off by {far}"

    def check(self, chosen):
        """Return {path: ok, refused or what is wrong}, of all paths or those chosen."""
        paths = {"train": self.train, "resume": self.resume, "shared": self.shared,
                 "two processes": self.processes, "evaluate": self.evaluate,
                 "calibrate": self.calibrate, "bf16": self.bf16,
                 "packed": lambda: self.export("packed", ".safetensors"),
                 "onnx": lambda: self.export("onnx", ".onnx")}
        if self.script:
            paths["its files"] = self.script_files
        results = {}
        for name in chosen or paths:
            try:
                results[name] = paths[name]() or "ok"
            except Exception as error:
                results[name] = f"{type(error).__name__}: {error}"
                if not isinstance(error, AssertionError):
                    traceback.print_exc()
        return results


def must(error):
    assert not error, error


def check(name, in_suite=False):
    """Return the results of one idea; in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        apply(ideas()[name][1], place)
        chosen = ["train", "shared", SUITE[name]] if in_suite else []
        return run_of(name, place).check(chosen)


def run_of(name, place):
    """Return the run of an idea, whose modules are from now on those of the changed copy."""
    title, blocks, flags = ideas()[name]
    torch.set_num_threads(1)
    sys.path.insert(0, str(place))
    sys.path[:] = [part for part in sys.path if part and Path(part).resolve() != ROOT]
    forget(PROJECT)
    sys.argv[0] = str(place / "train.py")
    return Run(name, flags, blocks, place)


def forget(packages):
    """Have modules and their submodules imported anew."""
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]


def main(words):
    """Print a line per idea; return 0 where all paths are right or refused, else 1."""
    if words[:1] == [EXCHANGE]:
        place, name = words[1:]
        run_of(name, Path(place)).exchanged()
        return 0
    in_suite = "--suite" in words
    chosen = [word for word in words if word != "--suite"] or list(ideas())
    for library in ("matplotlib.figure", "sklearn.datasets", "tensorboardX", "torchvision",
                    "onnxruntime"):  # once for all processes
        importlib.import_module(library)
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        right = True
        checks = pool.imap(functools.partial(check, in_suite=in_suite), chosen)
        for name, results in zip(chosen, checks):
            print(f"{name}: " + ", ".join(f"{path} {result}" for path, result in results.items()))
            wrong = [path for path, result in results.items()
                     if result != "ok" and not (result == "refused" and path in REFUSALS)]
            right = right and not wrong
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
