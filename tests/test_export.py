"""export.py: what it writes, checks and measures, and what it refuses."""
import copy
import json
import os
import re
import signal
import sys
from functools import partial
from importlib.util import find_spec

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

import deploy
import export
import models
from deploy import benchmark, check, runtimes
from dataset.data import DATASETS, get_transform, imagenet_row
from engine.errors import run_program
from engine.resume import Checkpoint
from exported import network
from models import MODELS, BitWidth, build, packed, resnet20q, set_bit_width
from models.checkpoint import read_checkpoint
from runs import ROOT, assert_one_line, assert_same, compact, evaluation, run


def run_export(*argv):
    """Run export.py in this process; return its exit code."""
    try:
        run_program(export.main, partial(export.parse_args, [str(word) for word in argv]))
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture
def arguments(trained, tiny_cifar10):
    """What every call has: a network of 2 and 32 bits, and where its data are."""
    return [trained, "--data-dir", tiny_cifar10]


@pytest.mark.pictures
def test_packed_with_check_and_benchmark(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "REPEATS", {1: 1, 3: 1})
    monkeypatch.setattr(benchmark, "float_candidates", lambda *_: ([], ["none"]))  # of ONNX below
    output = tmp_path / "net.safetensors"
    more = ["--check", 6, "--benchmark"]
    assert run_export(*arguments, "--format", "packed", "--output", output, *more) == 0
    reports = {"check.md", "check.json", "benchmark.md", "benchmark.json", "benchmark.png"}
    assert {path.name for path in tmp_path.iterdir()} == {
        output.name, *(f"net_packed_{name}" for name in reports)}
    found = json.loads((tmp_path / "net_packed_check.json").read_text())["results"]["torch"]
    values = found["bit_widths"]["2"]
    assert found["falls_short"] == "" and values["images"] == 6 and values["agree"] == 100
    assert values["top1"] == values["network_top1"]
    assert values["mean64"] == pytest.approx(values["torch_mean64"])
    rows = json.loads((tmp_path / "net_packed_benchmark.json").read_text())["rows"]
    assert [(row["name"], row["bits"]) for row in rows] == [("packed file, torch", "2")]
    times = [value for row in rows for name, value in row.items() if "batch" in name]
    assert len(times) >= 2 * len(rows) and all(value > 0 for value in times)
    out = capsys.readouterr().out
    assert "| 2 | 100.00 |" in compact(out) and f"{output}: " in out
    assert "check passed in torch: 6 of 6 predictions agree" in out
    metadata = packed.read(output)[1]
    assert os.fspath(arguments[-1]) not in json.dumps(metadata)
    assert metadata["network"]["bit_widths"] == [2]
    assert metadata["images"]["mean"][0] == 125.3 / 255


def test_what_is_exported_evaluates_as_the_run(arguments, tmp_path, monkeypatch):
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
    again = tmp_path / "again"  # from a packed file, and to check on other data
    monkeypatch.setitem(DATASETS, "other", DATASETS["cifar10"])
    assert run_export(output, *arguments[1:], "--format", "packed", "--bits", 2, "--output",
                      again, "--dataset", "other") == 0
    assert models.load(again).images == models.load(output).images
    assert models.load(again).images["dataset"] == "cifar10"
    images = torch.randn(1, 3, 32, 32)
    first, second = models.load(output), models.load(again)
    for each in (first, second):
        set_bit_width(each, 2)
    with torch.no_grad():
        assert torch.equal(first(images), second(images))


def test_classes_are_counted_beside_quantizers(tmp_path, monkeypatch):
    """A packed linear layer's grid is a matrix too, and stands behind its weight."""
    model, _ = network("svhnq", [2, 4], change="a linear layer")
    monkeypatch.setitem(MODELS, "svhnq", type(model))
    packed.save(model, [2, 4], tmp_path / "net", {"network": {
        "model": "svhnq", "width": 1, "all_conv": False, "classes": 10}})
    assert models.load(tmp_path / "net").fc.out_features == 10
    assert read_checkpoint(tmp_path / "net")["network"]["classes"] == 10


def test_calibrated_widths(arguments, tmp_path):
    calibrated = tmp_path / "calibrated.pth.tar"
    assert run(["--evaluate", "--pretrain", *arguments, "--bit_width_list", "2,5", "--calibrate", 1,
                "--save-calibrated", calibrated, "--device", "cpu", "--results-dir",
                tmp_path / "e"]) == 0
    assert run_export(calibrated, *arguments[1:], "--format", "packed", "--bits", "2,5",
                      "--output", tmp_path / "net", "--check", 6) == 0
    about = packed.read(tmp_path / "net")[1]
    assert about["network"]["bit_widths"] == [2, 5] and about["calibrated"] == [5]


# ---- wrong input

@pytest.mark.parametrize("argv, code, parts", [
    (["--bits", "4"], 1, ["no BatchNorm for 4 bits", "--calibrate 20 --save-calibrated FILE"]),
    (["--bits", "2,32"], 1, ["32 bits is not stored", "choose from 1 to 8"]),
    (["--bits", "2,9"], 2, ["bit-width '9' does not exist"]),
    (["--bits", "so.me"], 2, ["bit-width 'so.me' does not exist"]),
    (["--bits", "some"], 1, ["has no assignment some, but none", "--layer_bits JSON"]),
    (["--input", "uint8"], 2, ["--input uint8 has no --format packed"]),
    (["--format", "tflite"], 2, ["tflite", "packed"]),
    (["--check", "0"], 2, ["'0' is not allowed"])])
def test_wrong_arguments(argv, code, parts, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--format", "packed", "--output", "net", *argv]
    assert run_export(*arguments, *given) == code
    assert_one_line(capsys, *parts)
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_called_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_export("None", "--format", "packed", "--output", "net") == 1
    assert_one_line(capsys, "checkpoint None does not exist")


def test_an_output_that_is_a_folder(arguments, tmp_path, capsys):
    for folder in (tmp_path, "..", "/", "."):
        assert run_export(*arguments, "--format", "packed", "--output", folder) == 2
        assert_one_line(capsys, "is a folder: name a file in it")


def test_a_size_that_the_network_does_not_take(tmp_path):
    model, _ = network("svhnq", [2])
    with pytest.raises(ValueError, match="does not run on images of size 48"):
        deploy.export(model, tmp_path / "net", [2], about_images={"size": 48})


def test_a_weight_of_zeros_is_named(tmp_path):
    onnx_file = pytest.importorskip("deploy.onnx_file")
    model, _ = network("svhnq", [2])
    with torch.no_grad():
        model.layers[6].weight.zero_()
    with pytest.raises(ValueError, match="layer layers.6 computes numbers that are not finite"):
        onnx_file.export(model, [2], tmp_path / "net.onnx", 40)


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


def test_a_signal_leaves_nothing_of_an_export(arguments, tmp_path, monkeypatch):
    def stopped(*args):
        args[2].write_text("half")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(packed, "save", stopped)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # else it ends the tests
    try:
        code = run_export(*arguments, "--format", "packed", "--output", tmp_path / "net")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_none(tmp_path, capsys):
    (tmp_path / "bad").write_bytes(b"\x80\x02.")
    for source in ("nowhere", tmp_path / "bad", tmp_path):
        assert run_export(source, "--format", "packed", "--output", tmp_path / "net") == 1
        assert_one_line(capsys, str(source))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_missing_package_is_named(arguments, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("onnx", "onnxruntime")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "deploy.onnx_file", raising=False)
    monkeypatch.delattr(deploy, "onnx_file", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run_export(*arguments, "--format", "onnx", "--bits", 2, "--output",
                      tmp_path / "net.onnx") == 1
    assert_one_line(capsys, "pip install -r requirements-export.txt")
    assert not list(tmp_path.iterdir())


# ---- ONNX

@pytest.mark.parametrize("bits, source, more", [
    ("2", "checkpoint", ["--input", "uint8"]), ("any", "checkpoint", []), ("2", "packed", [])])
def test_onnx(bits, source, more, arguments, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    if source == "packed":
        path = tmp_path / "packed"
        assert run_export(*arguments, "--format", "packed", "--bits", "any", "--output", path) == 0
        arguments = [path, *arguments[1:]]
    output = tmp_path / "net.onnx"
    assert run_export(*arguments, "--format", "onnx", "--bits", bits, "--output", output,
                      "--check", 6, *more) == 0
    assert (tmp_path / "net_onnx_check.md").exists()
    assert "check passed in ONNX Runtime: 6 of 6 predictions agree" in capsys.readouterr().out
    found = onnxruntime.InferenceSession(output).get_modelmeta().custom_metadata_map
    assert found["model"] == "resnet4q" and found["dataset"] == "cifar10" and found["bits"] == "2"
    assert json.loads(found["size"]) == 32 and found["top1_images"] == "6"
    assert list(json.loads(found["top1"])) == ["2"] and len(json.loads(found["mean"])) == 3


def test_the_benchmark_of_onnx(arguments, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(benchmark, "REPEATS", {1: 1})
    assert run_export(*arguments, "--format", "onnx", "--bits", 2, "--output",
                      tmp_path / "net.onnx", "--benchmark") == 0
    content = json.loads((tmp_path / "net_onnx_benchmark.json").read_text())
    rows = {(row["name"], row["bits"]): row for row in content["rows"]}
    expected = {("file, ONNX Runtime", "2"), ("torch float32", "32"),
                ("ONNX Runtime float32", "32"),
                ("ONNX Runtime int8 by quantize_static", "8" if benchmark.has_vnni() else "w7a8")}
    if find_spec("openvino"):
        expected |= {("file, OpenVINO", "2"), ("OpenVINO float32", "32")}
    assert expected <= set(rows)
    assert all(row["top1"] is not None and row["bytes"] > 0 for row in rows.values())
    assert rows["ONNX Runtime float32", "32"]["top1"] == rows["torch float32", "32"]["top1"]
    is_missing = ("OpenVINO int8 by NNCF", "8") not in rows
    assert is_missing == any("without OpenVINO int8" in note for note in content["measured"])


def test_several_widths_are_several_files(arguments, tmp_path):
    pytest.importorskip("onnxruntime")
    assert run_export(*arguments, "--format", "onnx", "--bits", "2,32", "--output",
                      tmp_path / "net.onnx") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"net_2.onnx", "net_32.onnx"}
    assert runtimes.onnxruntime_run(tmp_path / "net_32.onnx")(
        numpy.zeros((1, 3, 32, 32), numpy.float32), 32).shape == (1, 10)


@pytest.mark.parametrize("edit", ["alpha", "mean", "scaled"])
def test_an_edit_that_tracing_follows_wrongly_is_not_published(edit, arguments, tmp_path, capsys,
                                                               monkeypatch):
    pytest.importorskip("onnxruntime")

    def forward(self, x):
        y = self.layers(self.conv0(x))
        x = self.bn(y)
        if edit == "alpha":
            x = torch.add(x, y, alpha=2)
        if edit == "mean":
            return self.fc(x.mean((2, 3), keepdim=True).flatten(1))
        if edit == "scaled":
            x = 3 * x
        return self.fc(x.mean((2, 3)))

    monkeypatch.setattr(resnet20q, "forward", forward)
    assert run_export(*arguments, "--format", "onnx", "--bits", 2, "--output",
                      tmp_path / "net.onnx") == 1
    message = {"alpha": " (add) has no place", "mean": "layer mean (mean) has no place",
               "scaled": "layer mul (mul) has no place"}[edit]
    assert_one_line(capsys, "--format onnx", message, "take the packed format")
    assert not list(tmp_path.iterdir())
    packed_file = tmp_path / "net"  # whose network runs the edit
    assert run_export(*arguments, "--format", "packed", "--output", packed_file) == 0


# ---- in Python

def test_export_in_python(tmp_path):
    model, images = network("svhnq", [2, 4, 32])
    about = {"size": 40, "mean": [0.5] * 3, "std": [0.25] * 3}
    with pytest.raises(ValueError, match="nothing says of what images"):
        deploy.export(model, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="nothing says of what images"):
        deploy.export(model, tmp_path / "net.onnx", input="uint8", about_images={"size": 40})
    with pytest.raises(ValueError, match=r"is torch.float64, .*: call its float\(\) first"):
        deploy.export(copy.deepcopy(model).double(), tmp_path / "net.onnx", about_images=about)
    with pytest.raises(ValueError, match="has no spec"):
        deploy.export(MODELS["svhnq"]([2]).eval(), tmp_path / "net", format="packed",
                      about_images=about)
    with pytest.raises(ValueError, match="no BatchNorm for 3 bits, but for 2, 4, 32"):
        deploy.export(model, tmp_path / "net.onnx", [3], about_images=about)
    pytest.importorskip("onnxruntime")
    found = deploy.export(model, tmp_path / "net.onnx", about_images=about)
    assert {path.name for path in tmp_path.iterdir()} == {"net_2.onnx", "net_4.onnx"}
    assert found.files[BitWidth(2)] == tmp_path / "net_2.onnx"
    assert found.results[BitWidth(4)]["images"] == 16
    with pytest.raises(FileExistsError, match="net_2.onnx exists"):
        deploy.export(model, tmp_path / "net.onnx", about_images=about)
    with pytest.raises(FileNotFoundError):
        deploy.export(model, tmp_path / "no" / "net.onnx", about_images=about)


def test_a_network_of_images_of_no_data_set_is_exported(tmp_path, capsys):
    model = build("svhnq", [2], 10, 1)
    model.images = {"dataset": "mine", "size": 40, "mean": [0.5] * 3, "std": [0.5] * 3}
    models.save(model, tmp_path / "mine.pth.tar")
    command = [tmp_path / "mine.pth.tar", "--format", "packed", "--output"]
    assert run_export(*command, tmp_path / "net") == 0
    assert models.load(tmp_path / "net").images["dataset"] == "mine"
    capsys.readouterr()
    assert run_export(*command, tmp_path / "checked", "--check", 2) == 2
    assert_one_line(capsys, "--dataset mine does not exist", "add its row to dataset/data.py")


def test_a_packed_file_of_images_of_no_data_set_is_read_by_every_program(tmp_path):
    model = build("svhnq", [2], 10).eval()
    deploy.export(model, tmp_path / "net", [2], "packed", about_images={"size": 40},
                  images=torch.rand(3, 3, 40, 40, dtype=torch.float64))
    checkpoint = Checkpoint(tmp_path / "net")
    assert checkpoint.images("digits")["size"] == 40
    assert not checkpoint.content["arguments"]


def test_a_network_in_training_mode_is_refused_and_left_alone(tmp_path):
    model, _ = network("svhnq", [2])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    with pytest.raises(ValueError, match=r"in training mode: call its eval\(\) first"):
        deploy.export(model, tmp_path / "net", [2], "packed", about_images={"size": 40})
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("error", [0.02, numpy.nan])
def test_a_file_that_differs_is_not_published(error, tmp_path, monkeypatch):
    onnx_file = pytest.importorskip("deploy.onnx_file")
    model, _ = network("svhnq", [2])
    right = onnx_file.affine_of
    monkeypatch.setattr(onnx_file, "affine_of",
                        lambda layer: [(1 + error) * part for part in right(layer)])
    with pytest.raises(ValueError, match="the file falls short of the network: at 2 bits"):
        deploy.export(model, tmp_path / "net.onnx", about_images={"size": 40})
    assert not list(tmp_path.iterdir())


def test_the_lines_in_the_docs(tmp_path, monkeypatch):
    """docs/deploy.md shows a few lines for each runtime: they run as they stand."""
    pytest.importorskip("onnxruntime")
    model, _ = network("svhnq", [4])
    about = {"size": 40, "mean": [0.5] * 3, "std": [0.25] * 3, "class_names": None}  # of digits
    deploy.export(model, tmp_path / "net_4.onnx", [4], input="uint8", about_images=about)
    draws = numpy.random.default_rng(0)
    path = tmp_path / "photo.jpg"
    Image.fromarray(draws.integers(0, 256, (8, 8, 3), numpy.uint8)).save(path)
    evaluated = get_transform("digits", train=False, normalized=False)(Image.open(path))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.S)
    blocks = [block for block in blocks if "net_4.onnx" in block and "import" in block]
    assert len(blocks) == 2
    answers = []
    for block in blocks:
        if "openvino" in block:
            pytest.importorskip("openvino")
        names = {}
        exec(block, names)
        answers.append(names["name"])
        assert numpy.array_equal(numpy.asarray(names["image"]), evaluated.permute(1, 2, 0))
    assert answers[0] in set("0123456789") and len(set(answers)) == 1


@pytest.mark.parametrize("size", [32, 37, 224])
@pytest.mark.parametrize("shape", [(375, 500), (501, 374), (60, 60)])
def test_the_lines_in_the_docs_on_a_photo_are_an_evaluation_s_transforms(size, shape, monkeypatch):
    block, = re.findall(r"```python\n(def middle.*?)```",
                        (ROOT / "docs" / "deploy.md").read_text(), re.S)
    names = {"Image": Image}
    exec(block, names)
    draws = numpy.random.default_rng(0)
    photo = Image.fromarray(draws.integers(0, 256, (*shape, 3), numpy.uint8))
    monkeypatch.setitem(DATASETS, "own", imagenet_row(None, size))
    evaluated = get_transform("own", train=False, normalized=False)(photo).permute(1, 2, 0)
    assert numpy.array_equal(numpy.asarray(names["middle"](photo, size)), evaluated)


def test_logits_of_another_shape_are_seen():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    images = numpy.zeros((16, 3, 4, 4), numpy.float32)

    def run(images, bits):
        return check.forward(model, images, bits)[0]

    with pytest.raises(ValueError, match=r"of shape \(16, 10, 1\), and the network's of \(16, 10"):
        check.compare(model, lambda *args: run(*args)[..., None], images, None, [2])
    model[1].bias.data[3] = torch.nan
    found = check.compare(model, run, images, None, [2])
    assert check.shortfall(found) == "at 2 bits there are logits that are not finite"


# ---- the check

def results_of(found, expected, labels):
    return {4: check.row(found, expected, expected.astype(float), numpy.zeros(len(labels), bool),
                         labels)}


def test_a_difference_in_most_images_is_a_shortfall():
    exact = numpy.random.default_rng(0).normal(size=(16, 10))
    ours = exact.astype(numpy.float32)

    def found(count, difference, flipped=0):
        logits = ours.copy()
        logits[:count] += difference
        is_flipped = numpy.arange(16) < flipped
        return check.shortfall({4: check.row(logits, ours, exact, is_flipped)})

    assert found(16, 1e-5) == "" and found(3, 1e-2) == ""  # rounding, and three levels
    assert "in 16 of 16 images by more than rounding" in found(16, 1e-3)
    assert "in 4 of 16" in found(4, 1e-2) and found(4, 1e-2, flipped=1) == ""
    ours += 1e-3  # as of levels that float32 rounds otherwise in most images
    assert found(16, 5e-3, flipped=14) == "" and "in 16 of 16" in found(16, 5e-2, flipped=14)
    logits = exact[:3] + 0.2
    few = check.row(logits, ours[:3], exact[:3], numpy.zeros(3, bool))
    assert "in 3 of 3 images" in check.shortfall({4: few})


def test_a_check_that_falls_short():
    labels = numpy.arange(360) % 10
    expected = numpy.eye(10, dtype=numpy.float32)[labels]
    assert check.shortfall(results_of(expected, expected, labels)) == ""
    one = expected.copy()
    one[0] = one[1]
    assert check.shortfall(results_of(one, expected, labels)) == ""  # one image of 360
    two = one.copy()
    two[5] = two[1]
    message = check.shortfall(results_of(two, expected, labels))
    assert message == "at 4 bits 99.44 % of predictions agree, and 99.5 % must"
    for count in (1, 3):  # of few images none may be another
        assert f"in 1 of {count} images" in check.shortfall(
            results_of(one[:count], expected[:count], labels[:count]))


def test_a_check_that_falls_short_ends_with_1(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtimes, "packed_run", lambda path, **options: lambda images, bits:
                        numpy.eye(10, dtype=numpy.float32)[numpy.arange(len(images))])
    assert run_export(*arguments, "--format", "packed", "--output", tmp_path / "net", "--check",
                      6) == 1
    assert_one_line(capsys, "falls short of the network", "at 2 bits")
    assert not list(tmp_path.iterdir())


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
    assert found[1]["torch_flipped"] == 1
