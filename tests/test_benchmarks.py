"""The benchmarks: the reference way trains as train.py does; the speed benchmark runs."""
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

import models
import small_networks
import train
from dataset.loader import InMemoryLoader, WorkerLoader
from engine import setup
from engine.arguments import parse_flags
from engine.errors import UsageError
from engine.forward_pass import ForwardPass
from engine.run_folder import read_metrics
from models import quan_ops
from runs import ROOT, compact, load
from utils import write_json

sys.path.append(str(ROOT / "benchmarks"))
import accuracy  # noqa: E402
import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gradients  # noqa: E402
import layer_bits  # noqa: E402
import post_training  # noqa: E402
import reference_way  # noqa: E402
import speed  # noqa: E402
from trainings import Run  # noqa: E402

WORDS = ["step", "--batch-size", "4", "--images", "6", "--repeats", "1", "--steps", "1",
         "--device", "cpu"]
OPTIONS = speed.parse_args(WORDS)


def test_the_reference_way_trains_as_the_default(tmp_path, monkeypatch):
    """A ResNet on digits draws weights and order alone: losses agree, before a step and after."""
    get_dataset, losses = setup.get_dataset, {}
    monkeypatch.setattr(setup, "get_dataset",
                        lambda *args, **kwargs: get_dataset(*args, **kwargs)[:14])
    for way in (train, reference_way):
        way.main(parse_flags([
            "--model", "resnet4q", "--dataset", "digits", "--width", "1", "--bit_width_list",
            "8,32", "--lr", "0.02", "--device", "cpu", "--epochs", "2",
            "--results-dir", str(tmp_path / way.__name__)]))
        records = read_metrics(tmp_path / way.__name__ / "metrics.jsonl")
        losses[way] = [record["train"][bits]["loss"] for record in records for bits in (8, 32)]
    assert losses[train] == pytest.approx(losses[reference_way], rel=1e-3)
    assert losses[train][2:] != pytest.approx(losses[train][:2], rel=1e-2)  # a step was taken


@pytest.mark.parametrize("way, loader, shared, fused", [
    ("default", InMemoryLoader, True, True), ("reference", WorkerLoader, False, None)])
def test_the_two_ways(way, loader, shared, fused):
    run = Run(OPTIONS, way)
    assert type(run.loader()) is loader
    assert run.forward_pass.shared is shared
    assert run.state.optimizer.param_groups[0]["fused"] is fused
    assert (type(run.state.metrics) is reference_way.MetricsReadEveryStep) is not shared
    assert run.forward_pass.memory_format is torch.contiguous_format  # both ways, on a CPU
    assert all(weight.is_contiguous() for weight in run.state.model.parameters())
    assert setup.make_loader is reference_way.make_loader  # nothing stays patched


def test_the_reference_way_on_a_gpu_is_the_published_grid_in_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = []
    monkeypatch.setattr(train, "train_one_epoch", lambda *args: found.append(
        (torch.backends.cudnn.allow_tf32, quan_ops.low_precision(torch.ones(1)))))
    run = Run(OPTIONS, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        run.steps(1)
    assert found == [(True, False)]


def test_the_reference_way_has_one_precision():
    with reference_way.patched(), pytest.raises(UsageError, match="--precision"):
        setup.ForwardPass(torch.nn.ReLU(), torch.device("cpu"), "bf16")


def measure(measurement):
    """Run a measurement, whose own process is forked."""
    contexts = multiprocessing.get_context
    with pytest.MonkeyPatch.context() as patch:
        small_networks.register(patch)
        patch.setitem(speed.SETTINGS, "resnet4q", ("cifar10", 4))
        patch.setitem(speed.MATMUL_SIZE, "cpu", 64)
        patch.setattr(multiprocessing, "get_context", lambda method: contexts("fork"))
        columns = measurement(speed.parse_args([*WORDS, "--model", "resnet4q"]))
    assert all(value > 0 for name, values in columns.items() if name != "MiB" for value in values)
    if measurement is speed.measure_step:
        first, second = columns["ms"]
        assert columns["ratio"] == pytest.approx([1, first / second])
    print(" | ".join(columns))
    return 0


@pytest.mark.parametrize("measurement", [
    speed.measure_step, speed.measure_epoch, speed.measure_loader])
def test_speed_benchmark(measurement, forks):
    done = forks.run(measure, measurement)
    assert done.returncode == 0, done.stderr
    *table, columns = compact(done.stdout).splitlines()
    rows = [row.strip("| ").split(" | ") for row in table]
    rows = [row for row in rows if len(row) == 1 + len(columns.split(" | "))]
    assert [row[0] for row in rows] == ["reference", "default, fp32"]


def test_float_nodes_of_a_file(tmp_path):
    """In a ResNet the first convolution, the shortcuts and the classifier are not quantized."""
    onnx = pytest.importorskip("onnx")
    import latency  # needs onnx
    from deploy import onnx_file

    model = models.build("resnet20q", [2, 32], 10).eval()
    path = tmp_path / "net.onnx"
    onnx_file.export(model, [32], path, 40)
    graph = onnx.load(path).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    found = [shapes[node.input[1]] for node in graph.node
             if node.name in latency.float_nodes(model, path)]
    assert found == [[16, 3, 3, 3], [32, 16, 1, 1], [64, 32, 1, 1], [10, 64]]


def test_a_bit_width_computed_as_another_is_seen():
    expected = {bits: torch.randn(100, generator=torch.Generator().manual_seed(bits))
                for bits in (2, 8)}
    near = {bits: value + 1e-3 for bits, value in expected.items()}
    assert gpu_checks.differing(near, expected) == set()
    assert gpu_checks.differing({**expected, 8: expected[2]}, expected) == {8}
    near = {2: expected[8] + 1e-3, 8: expected[8]}  # no distance by which to tell them apart
    assert gpu_checks.differing({**near, 8: near[2]}, near) == {8}


def test_gradients_of_both_ways(trained, tiny_cifar10, monkeypatch):
    """They are near each other; and where what is shared had another gradient, it would be seen."""
    options = gradients.parse_args([str(trained), "--data-dir", str(tiny_cifar10), "--batches", "2",
                                    "--batch-size", "8"])
    distances = gradients.main(options)
    assert {len(values) for values in distances.values()} == {2}
    assert max(distances["default from reference"]) < 1e-4
    assert min(distances["default from float64"]) > 0
    backward = ForwardPass.backward

    def halved(self, *args):
        backward(self, *args)
        if self.shared:
            self.model.conv0.weight.grad /= 2

    monkeypatch.setattr(ForwardPass, "backward", halved)
    assert min(gradients.main(options)["default from reference"]) > 1e-2


def test_paired_test_by_hand():
    """Of the means over bit-widths 1, -1 and 0.5: 0.167 ± 1.041 / sqrt(3); then of 1, 1.1, 1.2."""
    line = accuracy.paired_test({1: [2, -2, 1.0], 2: [0, 0, 0.0]})
    assert "+0.167 ± 0.601 over 3 seeds, p = 0.81: no difference shows" in line
    assert "from -2.419 to +2.752" in line
    line = accuracy.paired_test({4: [1, 1.1, 1.2]})
    assert "+1.100 ± 0.058 over 3 seeds, p = 0.0027: differs" in line


def test_accuracy_over_seeds_by_hand(tmp_path, monkeypatch, capsys):
    """Mean ± standard error, of differences seed by seed; finished runs are not trained again."""
    last = {"default": 1.0, "reference": 0.0}
    monkeypatch.setattr(accuracy, "trained", lambda program, folder, flags: {
        "2": [90.0, 90, 90, 90, 90 + int(flags[-1])],
        "w2a4": [95.0] * 4 + [95 + last[folder.name.split("_")[0]] * int(flags[-1])]})
    options = accuracy.parse_args(["--seeds", "3", "--jobs", "2", "--folder", str(tmp_path)])
    differences = accuracy.main(options)
    assert differences == {"2": [0, 0, 0], "w2a4": pytest.approx([0, 0.2, 0.4])}
    table = capsys.readouterr().out
    for row in ("| last epoch, default | 91.00 ± 0.58 | 96.00 ± 0.58 |",
                "| last epoch, default less reference | +0.00 ± 0.00 | +1.00 ± 0.58 |",
                "| mean of the last five, reference | 90.20 ± 0.12 | 95.00 ± 0.00 |",
                "| mean of the last five, default less reference | +0.00 ± 0.00 | +0.20 ± 0.12 |"):
        assert row in compact(table)
    assert "+0.100 ± 0.058 over 3 seeds, p = 0.23: no difference shows" in table
    monkeypatch.delattr(accuracy, "trained")
    assert accuracy.main(options) == differences
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("name", ["levels", "integer_operands", "shared_is_not_shared"])
def test_gpu_checks_on_a_cpu(name, monkeypatch):
    monkeypatch.setattr(gpu_checks, "COUNT", 4)  # images
    assert gpu.passes(name, torch.device("cpu"))


def test_a_gpu_check_that_fails(monkeypatch):
    switch = quan_ops.ActivationQ.switch_bit_width
    monkeypatch.setattr(quan_ops.ActivationQ, "switch_bit_width", lambda layer, width: switch(
        layer, models.BitWidth(width.activations - 1 or 1)))
    assert not gpu.passes("levels", torch.device("cpu"))
    with pytest.raises(SystemExit, match="1"):
        gpu.main(gpu.parse_args(["levels", "--device", "cpu"]))


@pytest.mark.parametrize("calibrated, refused", [([32], True), ([2], False)])
def test_int8_of_a_float_network_that_was_not_trained(calibrated, refused, trained, tmp_path,
                                                      monkeypatch):
    class Went(Exception):
        pass

    def went_on(*_):
        raise Went

    monkeypatch.setattr(post_training, "open_data", went_on)
    path = tmp_path / "x.pth.tar"
    torch.save({**load(trained), "calibrated": calibrated}, path)
    with pytest.raises(post_training.UserError if refused else Went):
        post_training.measure(path)


def test_a_folder_of_another_network_is_not_taken_for_one_s_own(tmp_path):
    options = layer_bits.parse_args(["a/r", "--output", str(tmp_path)])
    folder = tmp_path / "r"
    (folder / "evaluation").mkdir(parents=True)
    write_json(folder / "evaluation" / "evaluation.json", {"1": {}})
    write_json(folder / "options.json", {
        "source": str(Path("a/r").resolve()), "budget": options.budget, "images": options.images,
        "calibrate": options.calibrate, "data_dir": None})
    assert layer_bits.measured("a/r", options) == {"1": {}}
    with pytest.raises(layer_bits.UserError, match="is of another network or other options"):
        layer_bits.measured("b/r", options)


def test_gains_of_bits_per_layer_by_hand():
    """Between 1 bit (cost 1, 80 %) and 2 bits (cost 4, 90 %): at cost 2 both lines are known."""
    def network(mixture, more=0):
        points = {"1": (1, 70), "w2a1": (2, 70), "all-1": (1, 80), "all-2": (4, 90),
                  "32": (999, 99), "mix": (2, mixture)}
        return {name: {"bit_operations": cost, "weight_bytes": 8, "top1": top1 + more}
                for name, (cost, top1) in points.items()}

    rows = layer_bits.summary([network(86), network(88, 1)])
    assert list(rows) == ["all-1", "mix", "all-2"]
    mix = rows["mix"]
    assert mix["top1"] == 87.5 and mix["spread"] == pytest.approx(4.5**0.5)
    assert mix["log_gain"] == pytest.approx(2)  # 1 and 3 above 85
    assert mix["log_error"] == pytest.approx(1)
    assert mix["linear_gain"] == pytest.approx(2 + 5 / 3)
    text = layer_bits.table(rows, 2)
    assert "| mix | 0.00 | 8 | 87.50 ± 2.12 | +2.00 ± 1.00 | +3.67 ± 1.00 |" in compact(text)
    text = layer_bits.table(layer_bits.summary([network(86), network(86.02, 1)]), 2)
    # t = 101 and 268 at one degree of freedom
    assert "| **+1.01 ± 0.01** | **+2.68 ± 0.01** |" in compact(text)
    assert "nan" not in layer_bits.table(layer_bits.summary([network(86)]), 1)
    with pytest.raises(layer_bits.UserError, match="5 bit-operations are not between"):
        layer_bits.on_line(network(86), 5, float)
