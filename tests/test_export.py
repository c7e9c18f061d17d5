"""export.py: what it writes, checks and measures, and what it refuses."""
import json
import os
import sys
from functools import partial

import numpy
import pytest
import torch
from torch import nn

import deploy
import export
from deploy import benchmark, check
from engine.errors import run_program
from exported import network
from models import MODELS, packed, resnet20q, set_bit_width
from models.checkpoint import read_checkpoint
from runs import ROOT, assert_one_line, evaluation, run

MODULES = {"onnx": "onnx_file", "openvino": "openvino_file"}
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}


def run_export(*argv):
    """Run export.py in this process; return its exit code."""
    try:
        run_program(export.main, partial(export.parse_args, [str(word) for word in argv]))
    except SystemExit as ended:
        return ended.code
    return 0


def needs(form):
    """Skip a test where a format's package, or this project's part for it, is missing."""
    pytest.importorskip(PACKAGES[form])
    if not (ROOT / "deploy" / f"{MODULES[form]}.py").exists():
        pytest.skip(f"deploy/{MODULES[form]}.py is not here")


@pytest.fixture
def arguments(trained, tiny_cifar10):
    """What every call has: a network of 2 and 32 bits, and where its data are."""
    return [trained, "--data-dir", tiny_cifar10]


def test_packed_with_check_and_benchmark(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "REPEATS", {1: 1, 3: 1})
    output = tmp_path / "net.safetensors"
    more = ["--check", 6, "--benchmark"]
    assert run_export(*arguments, "--format", "packed", "--output", output, *more) == 0
    reports = {"check.md", "check.json", "benchmark.md", "benchmark.json", "benchmark.png"}
    assert {path.name for path in tmp_path.iterdir()} == {
        output.name, *(f"net_packed_{name}" for name in reports)}
    told = json.loads((tmp_path / "net_packed_check.json").read_text())
    values = told["bit_widths"]["2"]
    assert told["falls_short"] == "" and values["images"] == 6 and values["agree"] == 100
    assert values["largest32"] == 0 and values["top1"] == values["network_top1"]
    assert values["mean64"] == values["torch_mean64"]
    rows = json.loads((tmp_path / "net_packed_benchmark.json").read_text())["rows"]
    assert [(row["bits"], row["batch"]) for row in rows] == [(2, 1), (2, 3)]
    assert all(row["file"] > 0 and row["torch"] > 0 for row in rows)
    out = capsys.readouterr().out
    assert "| 2 | 100.00 |" in out and f"{output}: " in out
    metadata = packed.read(output)[1]
    assert os.fspath(arguments[-1]) not in json.dumps(metadata)
    assert metadata["bit_widths"] == [2] and metadata["mean"][0] == 125.3 / 255


def test_what_is_exported_evaluates_as_the_run(arguments, tmp_path):
    output = tmp_path / "net"
    assert run_export(*arguments, "--format", "packed", "--bits", "any", "--output", output) == 0
    assert packed.read(output)[1]["stored"] == [1, 2, 3, 4, 5, 6, 7, 8]
    found = {}
    for name, source in (("a", arguments[0]), ("b", output)):
        assert run(["--evaluate", "--pretrain", source, *arguments[1:], "--bit_width_list", 2,
                    "--device", "cpu", "--results-dir", tmp_path / name]) == 0
        found[name] = evaluation(tmp_path / name)["2"]
    assert found["a"]["top1"] == found["b"]["top1"]
    assert found["a"]["loss"] == pytest.approx(found["b"]["loss"], rel=1e-4)
    again = tmp_path / "again"  # from a packed file
    assert run_export(output, *arguments[1:], "--format", "packed", "--bits", 2, "--output",
                      again) == 0
    images = torch.randn(1, 3, 32, 32)
    first, second = deploy.load(output), deploy.load(again)
    for each in (first, second):
        set_bit_width(each, 2)
    with torch.no_grad():
        assert torch.equal(first(images), second(images))


def test_classes_are_counted_beside_quantizers(tmp_path, monkeypatch):
    """A packed linear layer's grid is a matrix too, and stands behind its weight."""
    model, _ = network("svhnq", [2, 4], change="a linear layer")
    monkeypatch.setitem(MODELS, "svhnq", type(model))
    packed.save(model, [2, 4], tmp_path / "net", {
        "model": "svhnq", "width": 1, "all_conv": False, "classes": 10, "arguments": {}})
    assert deploy.load(tmp_path / "net").fc.out_features == 10
    assert read_checkpoint(tmp_path / "net")["network"]["classes"] == 10


def test_calibrated_widths(arguments, tmp_path):
    calibrated = tmp_path / "calibrated.pth.tar"
    assert run(["--evaluate", "--pretrain", *arguments, "--bit_width_list", "2,5", "--calibrate", 1,
                "--save-calibrated", calibrated, "--device", "cpu", "--results-dir",
                tmp_path / "e"]) == 0
    assert run_export(calibrated, *arguments[1:], "--format", "packed", "--bits", "2,5",
                      "--output", tmp_path / "net", "--check", 6) == 0
    assert packed.read(tmp_path / "net")[1]["bit_widths"] == [2, 5]


# ---- wrong input

@pytest.mark.parametrize("argv, code, parts", [
    (["--bits", "4"], 1, ["no BatchNorm for 4 bits", "--calibrate 20 --save-calibrated FILE"]),
    (["--bits", "2,32"], 1, ["32 bits is not stored", "choose from 1 to 8"]),
    (["--bits", "2,9"], 2, ["bit-width '9' does not exist"]),
    (["--bits", "some"], 2, ["bit-width 'some' does not exist"]),
    (["--bits", "any", "--format", "openvino", "--output", "x.xml"], 2, ["--bits any", "packed"]),
    (["--format", "openvino", "--output", "x.bin"], 2, ["must end in .xml"]),
    (["--format", "tflite"], 2, ["tflite", "packed"]),
    (["--check", "0"], 2, ["'0' is not allowed"])])
def test_wrong_arguments(argv, code, parts, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--format", "packed", "--output", "net", *argv]
    assert run_export(*arguments, *given) == code
    assert_one_line(capsys, *parts)
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_refused(arguments, tmp_path, capsys):
    output = tmp_path / "net"
    output.write_text("mine")
    for path, told in ((output, "exists"), (output / "x", "cannot be written"),
                       (tmp_path / "no" / "net", "cannot be written")):
        assert run_export(*arguments, "--format", "packed", "--output", path) == 1
        assert_one_line(capsys, str(path), told)
    assert [path.name for path in tmp_path.iterdir()] == ["net"] and output.read_text() == "mine"


def test_no_source_and_no_output(arguments, capsys):
    """As of unset shell variables."""
    for argv, flag in ((["", "--output", "x"], "SOURCE"), ([arguments[0], "--output", ""],
                                                           "--output")):
        assert run_export(*argv, "--format", "packed") == 2
        assert_one_line(capsys, f"{flag}: '' is empty, as an unset shell variable is")


def test_an_output_that_is_not_utf_8(arguments, tmp_path, capsys):
    output = tmp_path / os.fsdecode(b"caf\xe9")
    assert run_export(*arguments, "--format", "packed", "--output", output) == 2
    assert_one_line(capsys, f"{tmp_path}/caf\\udce9 is not UTF-8", "give another name")


def test_a_failed_export_leaves_nothing(arguments, tmp_path, capsys, monkeypatch):
    def full(*args):
        args[2].write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "save", full)
    assert run_export(*arguments, "--format", "packed", "--output", tmp_path / "net") == 1
    assert_one_line(capsys, f"{tmp_path}/net cannot be written (No space left", "free space there")
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_none(tmp_path, capsys):
    (tmp_path / "bad").write_bytes(b"\x80\x02.")
    for source in ("nowhere", tmp_path / "bad", tmp_path):
        assert run_export(source, "--format", "packed", "--output", tmp_path / "net") == 1
        assert_one_line(capsys, str(source))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("form, output", [("onnx", "net.onnx"), ("openvino", "net.xml")])
def test_a_missing_package_is_told(form, output, arguments, tmp_path, capsys, monkeypatch):
    if not (ROOT / "deploy" / f"{MODULES[form]}.py").exists():
        pytest.skip(f"deploy/{MODULES[form]}.py is not here")
    for name in [name for name in sys.modules if name.split(".")[0] in ("onnx", "onnxruntime",
                                                                       "openvino")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"deploy.{MODULES[form]}", raising=False)
    monkeypatch.delattr(deploy, MODULES[form], raising=False)
    monkeypatch.setitem(sys.modules, "onnx" if form == "onnx" else "openvino", None)
    assert run_export(*arguments, "--format", form, "--bits", 2, "--output",
                      tmp_path / output) == 1
    assert_one_line(capsys, "pip install -r requirements-export.txt")
    assert not list(tmp_path.iterdir())


# ---- other formats

@pytest.mark.parametrize("form, bits, output", [
    ("onnx", "2", "net.onnx"), ("onnx", "any", "net.onnx"), ("openvino", "2", "net.xml")])
@pytest.mark.parametrize("source", ["checkpoint", "packed"])
def test_formats(form, bits, output, source, arguments, tmp_path):
    needs(form)
    if source == "packed":
        path = tmp_path / "packed"
        assert run_export(*arguments, "--format", "packed", "--bits", "any", "--output", path) == 0
        arguments = [path, *arguments[1:]]
    assert run_export(*arguments, "--format", form, "--bits", bits, "--output", tmp_path / output,
                      "--check", 6) == 0
    assert (tmp_path / output).exists() and (tmp_path / f"net_{form}_check.md").exists()


def test_several_widths_are_several_files(arguments, tmp_path, monkeypatch):
    class Files:
        @staticmethod
        def export(model, bit_widths, path, image_size):
            Files.model = model
            path.write_text(f"{','.join(map(str, bit_widths))} {image_size}")

        @staticmethod
        def load(path):
            def run(images, bits):
                assert path.read_text() == f"{bits} 32"
                return check.forward(Files.model, images, bits)[0]
            return run

    monkeypatch.setattr(export, "exporter", lambda form: Files)
    assert run_export(*arguments, "--format", "onnx", "--bits", "2,32", "--output",
                      tmp_path / "net.onnx") == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "net_2.onnx": "2 32", "net_32.onnx": "32 32"}


@pytest.mark.parametrize("form, output", [("onnx", "net.onnx"), ("openvino", "net.xml")])
@pytest.mark.parametrize("edit", ["alpha", "mean", "scaled"])
def test_an_edit_that_tracing_follows_wrongly_is_not_published(
        edit, form, output, arguments, tmp_path, capsys, monkeypatch):
    needs(form)

    def forward(self, x):
        y = self.layers(self.conv0(x))
        x = self.bn(y)
        if edit == "alpha":
            x = torch.add(x, y, alpha=2)
        if edit == "mean":
            return self.fc(x.mean(1).flatten(1))  # 8 x 8: as many as channels
        if edit == "scaled":
            x = 3 * x
        return self.fc(x.mean((2, 3)))

    monkeypatch.setattr(resnet20q, "forward", forward)
    assert run_export(*arguments, "--format", form, "--bits", 2, "--output",
                      tmp_path / output) == 1
    told = {"alpha": " (add) has no place",
            "mean": "layer mean (mean) has no place",
            "scaled": "layer mul (mul) has no place"}[edit]
    assert_one_line(capsys, f"--format {form}", told, "take the packed format")
    assert not list(tmp_path.iterdir())
    packed_file = tmp_path / "net"  # whose network runs the edit
    assert run_export(*arguments, "--format", "packed", "--output", packed_file) == 0


def test_logits_of_another_shape_are_seen():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))

    def run(images, bits):
        return check.forward(model, images, bits)[0]

    with pytest.raises(ValueError, match=r"of shape \(16, 10, 1\), and the network's of \(16, 10"):
        check.check_logits(model, lambda *args: run(*args)[..., None], [2], 4)
    model[1].bias.data[3] = torch.nan
    with pytest.raises(ValueError, match="at 2 bits the network's logits are not finite"):
        check.check_logits(model, run, [2], 4)


# ---- the check

def results_of(found, expected, labels):
    return {4: check.row(found, expected, expected.astype(float), numpy.zeros(len(labels), bool),
                         labels)}


def test_a_check_that_falls_short():
    labels = numpy.arange(360) % 10
    expected = numpy.eye(10, dtype=numpy.float32)[labels]
    assert check.falls_short(results_of(expected, expected, labels)) == ""
    one = expected.copy()
    one[0] = one[1]
    assert check.falls_short(results_of(one, expected, labels)) == ""  # one image of 360
    two = one.copy()
    two[5] = two[1]
    told = check.falls_short(results_of(two, expected, labels))
    assert "at 4 bits 99.44 % of answers agree, and 99.5 % must" in told and "top-1" in told


def test_a_check_that_falls_short_ends_with_1(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packed, "load_runner", lambda path, **options: lambda images, bits:
                        numpy.eye(10, dtype=numpy.float32)[numpy.arange(len(images))])
    monkeypatch.setattr(check, "check_logits", lambda *args: None)  # which would see it too
    assert run_export(*arguments, "--format", "packed", "--output", tmp_path / "net", "--check",
                      6) == 1
    assert_one_line(capsys, "falls short of the network", "at 2 bits")
    assert json.loads((tmp_path / "net_packed_check.json").read_text())["falls_short"]


def test_levels_that_flip_are_counted():
    class Halves(torch.nn.Module):
        """A network that adds 0.001 in float64 alone."""

        def __init__(self):
            super().__init__()
            self.act, self.weight = check.ActivationQ(), torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            x = x + (1e-3 if x.dtype == torch.float64 else 0)
            return self.act(x)[:, :, 0, 0]

    images = numpy.full((3, 2, 1, 1), 0.2, numpy.float32)
    images[1, 1] = 0.4995
    found = check.compare(Halves(), lambda images, bits: numpy.zeros((len(images), 2), "f4"),
                          images, numpy.zeros(3, int), [1])
    assert found[1]["flipped"] == 1
