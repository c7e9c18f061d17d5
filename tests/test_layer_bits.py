"""Bits of layers: what an assignment sets and costs, in files, and the search for one."""
import copy
import json
import re
from functools import partial

import pytest
import torch
from torch import nn

import deploy
import models
import report
import search
from engine.bit_search import find_units
from engine.errors import UserError, run_program
from engine.forward_pass import ForwardPass
from float_networks import SMALL
from models import Assignment, add_assignment, bit_widths_of, calibrate, set_bit_width
from models.checkpoint import network_content
from models.cost import Costs, LayerCost, cost_table, totals
from models.fields import FileError
from models.float_layers import Classifier
from models.quan_ops import ActivationQ, Conv2dQ, DoReFaWeight, SwitchableBatchNorm2d
from models.sharing import shared_computation
from runs import assert_one_line, compact, evaluation, load, run, snapshot, tiny

MIX = {"layers.0.*": 1, "layers.1.conv0": "w4a1", "layers.1.act*": 2, "layers.2.conv?": 4}
BITS = {"layers.0.act0": 1, "layers.0.conv1": 1, "layers.1.conv0": 4, "layers.1.conv1": 2,
        "layers.1.act1": 2, "layers.2.act0": 2, "layers.2.conv0": 4, "layers.2.conv1": 4}


def network(bit_widths=(1, 2, 4), quantizer="dorefa"):
    """Return a ResNet8 in evaluation mode, whose BatchNorms differ, and images of it."""
    torch.manual_seed(0)
    model = models.build("resnet8q", bit_widths, 10, 1, quantizer=quantizer)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(0, 0.5)
                part.running_mean.normal_()
            if isinstance(part, nn.ParameterDict):
                for step in part.values():
                    step *= torch.empty(()).uniform_(0.5, 2)
    return model.eval(), torch.randn(8, 3, 32, 32)


@torch.no_grad()
def logits(model, width, images):
    set_bit_width(model, width)
    return model(images)


# ---- what an assignment is

@pytest.mark.parametrize("name", ["", "4", "32", "w2a4", "any", "keys", "training", "a.b", "a b",
                                  "-a", "ä", "x" * 33, 5])
def test_names_that_cannot_be(name):
    with pytest.raises(ValueError, match="cannot have the name"):
        Assignment(name, 8)


@pytest.mark.parametrize("content, part", [
    ([], "is not an assignment"), ({"name": "mix", "default": 8}, "is not an assignment"),
    ({"name": "mix", "default": 9, "layers": {}}, "mix: bit-width 9 does not exist"),
    ({"name": "mix", "default": 8, "layers": {"a": 4.5}}, "mix: bit-width 4.5 does not exist"),
    ({"name": "mix", "default": 8, "layers": [4]}, "the layers of an assignment are [4]")])
def test_contents_that_cannot_be(content, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        Assignment.of(content)


def test_an_assignment_among_bit_widths():
    mix = Assignment("mix", "w2a4", {"a.*": 4, "a.b": 1})
    assert Assignment.of(mix.content).is_identical(mix)
    assert not Assignment("mix", "w2a4", {"a.b": 1, "a.*": 4}).is_identical(mix)  # the last counts
    assert [mix.of_layer(name).weights for name in ("a.b", "a.c", "b")] == [1, 4, 2]
    widths = [mix, models.BitWidth(32), models.BitWidth(1)]
    assert sorted(widths) == [1, 32, mix] and max(widths) is mix
    assert {mix: 5}["mix"] == 5 and f"{mix:>5}" == "  mix"


@pytest.mark.parametrize("quantizer", ["dorefa", "lsq"])
@pytest.mark.parametrize("bits", [1, 4])
def test_a_uniform_one_is_the_bit_width(bits, quantizer):
    model, images = network(quantizer=quantizer)
    expected = {width: logits(model, width, images) for width in (1, 2, 4)}
    assert add_assignment(model, Assignment("uniform", bits)) == [bits]
    assert torch.equal(logits(model, "uniform", images), expected[bits])
    add_assignment(model, Assignment("uniform", 2, {"*": bits}))  # in the place of the first
    assert torch.equal(logits(model, "uniform", images), expected[bits])
    for width in expected:  # which are as they were
        assert torch.equal(logits(model, width, images), expected[width])
    calibrate(model, "uniform", [images])
    assert not torch.equal(logits(model, "uniform", images), expected[bits])
    assert torch.equal(logits(model, bits, images), expected[bits])


def test_each_layer_has_its_bits():
    model, _ = network(quantizer="lsq")
    model.layers[1].conv1.own_bits = 2
    add_assignment(model, Assignment("mix", 2, MIX))
    set_bit_width(model, "mix")
    assert {name: model.get_submodule(name).bits for name in BITS} == BITS
    for name, bits in BITS.items():  # the quantizer's state is that of the layer's bits
        ranges = model.get_submodule(name).quantizer.log_range_dict
        assert torch.equal(ranges["mix"], ranges[str(bits)]), name
    for name, bits in {"layers.0.bn0": 1, "layers.1.bn0": 2, "bn": 2}.items():
        norms = model.get_submodule(name).bn_dict  # that of the activation behind
        assert torch.equal(norms["mix"].running_mean, norms[str(bits)].running_mean), name
    with pytest.raises(ValueError, match="choose from 1, 2, 4, mix"):
        set_bit_width(model, 8)


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.Sequential])
def test_a_wrapper_of_the_network_has_its_assignments(wrap):
    model, images = network()
    wrapper = wrap(model)
    add_assignment(model, Assignment("mix", 2, MIX))
    set_bit_width(wrapper, "mix")
    assert {name: model.get_submodule(name).bits for name in BITS} == {**BITS, "layers.1.conv1": 2}
    add_assignment(wrapper, Assignment("other", 1, {"layers.0.*": 2}))
    assert [*models.assignments_of(model)] == ["mix", "other"]
    calibrate(wrapper, "other", [images])
    set_bit_width(wrapper, 2)
    assert bit_widths_of(wrapper) == [1, 2, 4]


def test_an_assignment_that_a_compiled_network_gets():
    model, _ = network()
    compiled = torch.compile(model, backend="eager")
    add_assignment(compiled, Assignment("mix", 2, MIX))
    set_bit_width(compiled, "mix")
    assert {name: model.get_submodule(name).bits for name in BITS} == {**BITS, "layers.1.conv1": 2}
    assert [*models.assignments_of(model)] == ["mix"]


def test_a_head_per_name_is_no_state_of_a_bit_width():
    model, _ = network()
    model.head_dict = nn.ModuleDict({"boxes": nn.Linear(2, 2), "1x1": nn.Linear(2, 2)})
    add_assignment(model, Assignment("mix", 2, MIX))
    assert [*model.head_dict] == ["boxes", "1x1"]


def test_refusals():
    model, _ = network()
    with pytest.raises(ValueError, match="'layers.7.*' matches no layer with bits: choose "
                       "from layers.0.act0, "):
        add_assignment(model, Assignment("mix", 4, {"layers.0.*": 2, "layers.7.*": 2}))
    with pytest.raises(ValueError, match="'layers.0.bn0' matches no layer"):
        add_assignment(model, Assignment("mix", 4, {"layers.0.bn0": 2}))
    with pytest.raises(ValueError, match="assignment mix is not of this network: add it first"):
        set_bit_width(model, Assignment("mix", 4))
    assert not models.assignments_of(model)
    add_assignment(model, Assignment("mix", 4))
    with pytest.raises(ValueError, match="another assignment of the name mix"):
        set_bit_width(model, Assignment("mix", 2))


def test_what_is_shared_stays_right():
    model, images = network()
    add_assignment(model, Assignment("mix", 2, MIX))
    widths = [4, "mix", 1, "mix"]
    alone = [logits(model, width, images) for width in widths]
    calls = []
    hook = model.conv0.register_forward_hook(lambda *args: calls.append(args))
    with shared_computation(model, images):
        for width, expected in zip(widths, alone):
            assert torch.equal(logits(model, width, images), expected)
    hook.remove()
    assert len(calls) == 4 and not torch.equal(alone[1], alone[2])


# ---- costs

class Switched(nn.Module):
    """At 1 bit the second layer runs twice; or its output is multiplied with itself."""

    def __init__(self, product=None):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = SwitchableBatchNorm2d(4, [1, 2])
        self.second = Conv2dQ(4, 4, 3, padding=1)
        self.product = product

    def forward(self, x):
        x = self.second(self.bn(self.first(x)))
        if self.product:
            return self.product(x)
        return self.second(x) if self.second.bits == 1 else x


@pytest.mark.parametrize("product, message", [
    (None, "second does not do the same work at each bit-width"),
    (lambda x: x @ x, "matmul is a function"), (lambda x: x.matmul(x), "matmul is a function"),
    (lambda x: torch.einsum("nchw,nchv->nchw", x, x), "einsum is a function"),
    (lambda x: nn.functional.scaled_dot_product_attention(x, x, x), "scaled_dot_product")])
def test_costs_that_are_not_those_of_layers_are_not_known(product, message):
    model = Switched(product)
    set_bit_width(model, 1)
    with pytest.raises(ValueError, match=f"what it costs is not known: {message}"):
        Costs(model, 8)


def test_costs_count_the_scales_of_each_bit_width():
    class PerChannelBelow8(DoReFaWeight):
        def integers(self, v, e):
            integers, scale = super().integers(v, e)
            return integers, scale if self.bits == 8 else scale.expand(len(v), 1, 1, 1)

    model = models.build("svhnq", [4, 8], 10, 1)
    layer = model.layers[6]
    layer.quantizer = PerChannelBelow8()
    set_bit_width(model, 8)
    costs = Costs(model, 40)
    found = {bits: next(each.weight_bytes for each in costs.of(bits) if each.name == "layers.6")
             for bits in (8, 4)}
    floats = layer.bias is not None and layer.bias.numel()
    assert found[8] == layer.weight.numel() + 4 * (1 + floats)
    assert found[4] == layer.weight.numel() // 2 + 4 * (len(layer.weight) + floats)


def test_costs_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), SwitchableBatchNorm2d(4, [1, 2, 32]), ActivationQ(),
        Conv2dQ(4, 6, 3, stride=2, groups=2), SwitchableBatchNorm2d(6, [1, 2, 32]), ActivationQ(),
        Conv2dQ(6, 2, 1, bias=False, bits=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        Classifier(2, 10))
    add_assignment(model, Assignment("mix", 2, {"3": "w1a2", "5": 32}))
    costs = Costs(model, 9)  # maps of 7 x 7, 3 x 3 and 3 x 3
    assert costs.inputs == {"3": ["2"], "6": ["5"]}
    stem = LayerCost("0", False, 4 * 49 * 27, 32, 32, 4 * 108)
    head = LayerCost("9", False, 20, 32, 32, 4 * 20 + 40)
    expected = {
        1: [(6 * 9 * 18, 1, 1, 14 + 4 + 24), (2 * 9 * 6, 8, 1, 12 + 4)],
        "mix": [(972, 1, 2, 14 + 4 + 24), (108, 8, 32, 16)],
        32: [(972, 32, 32, 432 + 24), (108, 8, 32, 16)]}
    for width, (first, second) in expected.items():
        found = costs.of(width)
        assert found == [stem, LayerCost("3", True, *first), LayerCost("6", True, *second), head]
    assert totals(costs.of("mix")) == {
        "bit_operations": 972 * 2 + 108 * 256, "weight_bytes": 58,
        "float_bit_operations": 1024 * 5312, "float_weight_bytes": 552}
    rows = [line.replace(" ", "") for line in cost_table(costs.of("mix")).splitlines()]
    assert "|3|1|2|972|1,944|42|" in rows and "|floatlayers|||5,312|5,439,488|552|" in rows


def test_costs_that_are_not_known():
    class Branches(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="cannot trace the network"):
        Costs(Branches(nn.Conv2d(3, 4, 3)), 8)

    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3, 1, 1))

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight)

    with pytest.raises(ValueError, match="conv2d is a function"):
        Costs(Direct(), 8)


def test_weights_of_other_layers_have_no_known_cost():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Bilinear(1, 1, 2))
    model[2].forward = lambda x: x
    with pytest.raises(ValueError, match="2.weight is not the weight of a convolution or a linear"):
        Costs(model, 8)


# ---- files

def checkpoint(folder, quantizer="dorefa", assignment=None):
    """Save a network as a checkpoint; return its path, the network, and images of it."""
    model, images = network(quantizer=quantizer)
    if assignment:
        add_assignment(model, assignment)
        calibrate(model, assignment, [images])
    path = folder / "net.pth.tar"
    torch.save({"model": "resnet8q", "network": network_content(model),
                "images": {"dataset": "cifar10", "size": 32}, "state_dict": model.state_dict()},
               path)
    return path, model, images


@pytest.mark.parametrize("quantizer", ["dorefa", "lsq"])
def test_files_hold_it(quantizer, tmp_path):
    mix = Assignment("mix", 2, MIX)
    path, model, images = checkpoint(tmp_path, quantizer, mix)
    found = models.load(path)
    assert found.assignments["mix"].is_identical(mix)
    assert torch.equal(logits(found, "mix", images), logits(model, "mix", images))

    for bits in ("any", [1, "mix"]):
        file = tmp_path / f"{bits[0]}.safetensors"
        exported = deploy.export(found, file, bits, "packed")
        assert list(map(str, exported.files))[-1] == "mix"
        again = models.load(file)
        assert torch.equal(logits(again, "mix", images), logits(model, "mix", images))
        assert again.assignments["mix"].is_identical(mix)
    deploy.export(found, tmp_path / "none.safetensors", [1, 2], "packed")
    assert not models.assignments_of(models.load(tmp_path / "none.safetensors"))

    few = models.load(path, [1])  # without a bit-width that it has, without the assignment
    assert not models.assignments_of(few)
    assert torch.equal(logits(few, 1, images), logits(model, 1, images))


def test_onnx_holds_it(tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    path, model, images = checkpoint(tmp_path, assignment=Assignment("mix", 2, MIX))
    model = models.load(path)
    assert set(deploy.export(model, tmp_path / "any.onnx", "any").files) == {1, 2, 4}
    assert set(deploy.export(model, tmp_path / "one.onnx", 4).files) == {4}
    files = deploy.export(model, tmp_path / "net.onnx", ["mix", 4]).files
    assert files["mix"].name == "net_mix.onnx"
    session = runtime.InferenceSession(files["mix"])
    assert session.get_modelmeta().custom_metadata_map["bits"] == "mix"
    found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    torch.testing.assert_close(found, logits(model, "mix", images), rtol=1e-3, atol=1e-3)

    parse = partial(export_args, path, tmp_path / "more.onnx")
    import export
    export.main(parse("any"))
    assert "left out: mix, as the input" in capsys.readouterr().out
    with pytest.raises(export.UserError, match="has no assignment other, but mix: calibrate"):
        export.main(parse("4,other"))


def export_args(path, output, bits):
    import export

    return export.parse_args(list(map(str, [path, "--format", "onnx", "--bits", bits, "--output",
                                            output])))


@pytest.mark.parametrize("saved, part", [
    ("mix", "'mix' is not a list"), ([{"name": "4"}], "is not an assignment"),
    ([{"name": "mix", "default": 4, "layers": {"x": 1}}], "'x' matches no layer with bits"),
    ([{"name": "mix", "default": 4, "layers": {}}] * 2, "two assignments have the name mix")])
def test_damaged_checkpoints(saved, part, tmp_path):
    path, *_ = checkpoint(tmp_path)
    content = torch.load(path, weights_only=True)
    content["network"]["assignments"] = saved
    torch.save(content, path)
    with pytest.raises(FileError, match=re.escape(part)):
        models.load(path)


def test_bits_that_a_packed_file_lacks(tiny_cifar10, tmp_path, capsys):
    path, *_ = checkpoint(tmp_path)
    file = tmp_path / "net.safetensors"
    about = {"size": 32, "dataset": "cifar10"}
    deploy.export(models.load(path), file, [1, 2], "packed", about_images=about)
    (tmp_path / "mix.json").write_text(json.dumps(Assignment("mix", 2, {"*.0.conv1": 4}).content))
    assert run(["--evaluate", "--pretrain", file, "--data-dir", tiny_cifar10, "--layer_bits",
                tmp_path / "mix.json", "--calibrate", 1, "--results-dir", tmp_path / "e"]) == 1
    assert_one_line(capsys, "layer layers.0.conv1: 4-bit, of mix, is not in the packed file: "
                    "choose from 1, 2")


# ---- train.py

def test_evaluation(trained, tiny_cifar10, tmp_path, capsys):
    """It stands in every file and table; the saved checkpoint gives the same, and trains on."""
    file = tmp_path / "mix.json"
    mix = {"name": "mix", "default": 2, "layers": {"layers.0.*": 32}}
    file.write_text(json.dumps([mix, {"name": "uniform", "default": 2, "layers": {}}]))
    folder = tmp_path / "e"
    common = ["--evaluate", "--data-dir", tiny_cifar10, "--device", "cpu"]
    saved = tmp_path / "c.pth.tar"
    assert run([*common, "--pretrain", trained, "--layer_bits", file, "--calibrate", 2,
                "--results-dir", folder, "--save-calibrated", saved]) == 0
    out = capsys.readouterr().out
    assert "mix was not trained: using the 2,32-bit BatchNorms, statistics re-estimated" in out
    assert re.search(r"^    mix .* not trained$", out, re.MULTILINE)
    assert max(len(line) for line in out.splitlines() if "/" not in line) <= 100  # of a path
    found = evaluation(folder)
    assert list(found) == ["2", "32", "mix", "uniform"]
    assert found["uniform"]["bit_operations"] == found["2"]["bit_operations"]
    assert found["2"]["bit_operations"] < found["mix"]["bit_operations"]
    assert json.loads((folder / "config.json").read_text())["assignments"][0] == mix

    again = tmp_path / "again"
    assert run([*common, "--pretrain", saved, "--results-dir", again]) == 0
    assert evaluation(again) == found
    assert load_names(saved) == ["mix", "uniform"]
    run_program(report.main, partial(report.parse_args, [
        str(folder), str(again), "--output", str(tmp_path / "report")]))
    assert "| model | 2 | 32 | mix | uniform |" in compact((tmp_path / "report.md").read_text())

    assert run(tiny(tiny_cifar10, tmp_path / "t", "--pretrain", saved, "--epochs", 1,
                    "--lr_decay", "")) == 0  # which leaves them out
    assert not [key for key in load(tmp_path / "t")["state_dict"] if "mix" in key]


def load_names(path):
    return list(models.load(path).assignments)


@pytest.mark.parametrize("text, parts", [
    (None, ["mix.json cannot be read (No such file or directory)"]),
    ("{", ["mix.json: Expecting property name"]), ("[]", ["mix.json: there is no assignment"]),
    ('{"name": "mix", "default": 3, "layers": {"layers.9": 2}}', ["'layers.9' matches no layer"]),
    ('{"name": "mix", "default": 3, "layers": {"a": 2, "a": 4}}', ["its key 'a' is repeated"]),
    ('{"name": "mix", "default": 33, "layers": {}}', ["mix: bit-width 33 does not exist"])])
def test_files_of_bits_that_cannot_be(text, parts, trained, tiny_cifar10, tmp_path, capsys):
    file = tmp_path / "mix.json"
    if text is not None:
        file.write_text(text)
    assert run(["--evaluate", "--pretrain", trained, "--data-dir", tiny_cifar10, "--layer_bits",
                file, "--calibrate", 1, "--results-dir", tmp_path / "e"]) == 1
    assert_one_line(capsys, "--layer_bits: ", *parts)
    assert not (tmp_path / "e").exists()


def test_bits_of_layers_need_calibration(trained, capsys):
    assert run(["--evaluate", "--pretrain", trained, "--layer_bits", "x.json"]) == 2
    assert_one_line(capsys, "--layer_bits x.json goes with --evaluate --calibrate N")


# ---- search.py

def searched(*argv):
    """Run search.py in this process; return its exit code."""
    try:
        run_program(search.main, partial(search.parse_args, list(map(str, argv))))
    except SystemExit as ended:
        return ended.code
    return 0


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_a_search(tiny_cifar10, tmp_path, monkeypatch, capsys):
    """It reaches its budgets, reads no validation image, and goes on to the same path."""
    path, model, _ = checkpoint(tmp_path)
    opened = []

    def get_dataset(name, split, **kwargs):
        opened.append(split)
        return original(name, split, **kwargs)

    original = search.get_dataset
    monkeypatch.setattr(search, "get_dataset", get_dataset)
    common = [path, "--data-dir", tiny_cifar10, "--device", "cpu", "--images", 6, "--results-dir"]
    whole = tmp_path / "whole"
    assert searched(*common, whole, "--budget", "50%,2bit") == 0
    assert opened == ["train"]
    steps = read(whole, "path.json")["steps"]
    costs = Costs(model, 32)
    highest = totals(costs.of(4))["bit_operations"]
    budgets = {"ops-50pct": highest // 2, "ops-2bit": totals(costs.of(2))["bit_operations"]}
    assert steps[0]["cost"]["bit_operations"] == highest and steps[0]["unit"] == []
    for content in read(whole, "layer_bits.json"):
        assignment = Assignment.of(content)
        add_assignment(model, assignment)
        budget = budgets.pop(assignment.name)
        assert totals(costs.of(assignment))["bit_operations"] <= budget
        place, = [place for place, step in enumerate(steps) if step["layers"] == content["layers"]]
        assert steps[place - 1]["cost"]["bit_operations"] > budget
    assert not budgets and len(steps) == place + 1
    assert (whole / "path.png").exists() and "ops-2bit" in (whole / "path.md").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "/" not in line) <= 100
    with pytest.raises(report.UserError, match="no-run does not exist: name results folders"):
        report.read_runs([str(whole), "no-run"])  # as results/* has a search beside runs

    parts = tmp_path / "parts"  # in two commands, of which the second goes on
    assert searched(*common, parts, "--budget", "50%") == 0
    assert len(read(parts, "path.json")["steps"]) < len(steps)
    assert searched(*common, parts, "--budget", "50%,2bit") == 0
    for name in ("path.json", "layer_bits.json", "path.md"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()

    steps = read(parts, "path.json")
    for damage in (lambda steps: steps[-1]["cost"].update(bit_operations=1),
                   lambda steps: steps[1].update(layers={"layers.99": 2}),
                   lambda steps: steps[1].update(unit=["zzz"]), lambda steps: steps.pop(0)):
        edited = copy.deepcopy(steps)
        damage(edited["steps"])
        (parts / "path.json").write_text(json.dumps(edited))
        capsys.readouterr()
        assert searched(*common, parts, "--budget", "50%,2bit") == 1
        assert_one_line(capsys, "path.json: its step ", "not one that follows from the step before")
    (parts / "path.json").unlink()
    assert searched(*common, parts, "--budget", "50%,2bit") == 1
    assert_one_line(capsys, "layer_bits.json is not of a search that could go on")
    (parts / "path.json").write_bytes((whole / "path.json").read_bytes())

    before = snapshot(parts)
    assert searched(*common, parts, "--budget", "50%", "--seed", 1) == 1
    assert_one_line(capsys, "parts holds another search: its seed is 0, not 1")
    monkeypatch.setattr(search, "get_dataset", lambda *args, **kwargs: [
        *original(*args, **kwargs)][::-1])
    assert searched(*common, parts, "--budget", "50%") == 1
    assert_one_line(capsys, "parts holds another search: its data is ")
    assert {name: text for name, text in snapshot(parts).items() if "log" not in name.name} == {
        name: text for name, text in before.items() if "log" not in name.name}


def test_bit_widths_that_cost_the_same_do_not_end_a_search(monkeypatch):
    model, _ = network((1, "w1a2", "w2a1", 4))
    tried = search.Search(model, ForwardPass(model, torch.device("cpu")), Costs(model, 32),
                          bit_widths_of(model), [], [], "bit_operations")
    monkeypatch.setattr(tried, "measure", lambda unit, layers: search.Step(
        unit, layers, 0.0, 0.0, {"bit_operations": tried.cost(layers)}))
    path = []
    tried.descend(path, tried.least_cost(), lambda steps: None)
    assert path[-1].cost["bit_operations"] == tried.least_cost()


def test_the_input_of_a_layer_may_be_of_several_activations():
    """In the table, in costs and in the search, of a network that concatenates and shuffles."""
    model = models.build(SMALL, [4, 8], 10)
    costs = Costs(model, 32)
    bits = {layer.name: layer.input_bits for layer in costs.of(4)}
    quantized = {layer.name for layer in model.layers if layer.input == "quantized"}
    assert quantized and {name for name, number in bits.items() if number == 4} == {
        f"network.{name}" for name in quantized}
    assert max(map(len, costs.inputs.values())) > 1
    units = find_units(costs)
    names = [name for unit in units for name in unit]
    assert len(names) == len(set(names))
    assert set(names) == {*costs.inputs, *(name for read in costs.inputs.values() for name in read)}
    for layer, activations in costs.inputs.items():
        unit, = [unit for unit in units if layer in unit]
        assert set(activations) <= set(unit)


@pytest.mark.parametrize("join", [
    lambda a, b: torch.cat([a, b], a.dim() - 3), lambda a, b: torch.cat(tensors=(a, b), dim=1)])
def test_a_concatenation_is_of_its_tensors_alone(join):
    class Joined(nn.Sequential):
        def forward(self, x):
            a = self[2](self[1](self[0](x)))
            return self[4](self[3](join(a, a))).mean((2, 3))

    network = Joined(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(8, 4, 1),
                     nn.Conv2d(4, 5, 1))
    model = models.convert(network, [2, 4])
    assert [layer.input for layer in model.layers] == ["not", "quantized", "not"]
    assert Costs(model, 8).inputs == {"network.3": ["network.2"]}


def test_a_layer_that_is_called_with_a_keyword():
    class Called(nn.Sequential):
        def forward(self, x):
            return self[4](self[3](input=self[2](self[1](input=self[0](x))))).mean((2, 3))

    network = Called(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1),
                     nn.Conv2d(4, 5, 1))
    model = models.convert(network, [2, 4])
    assert Costs(model, 8).inputs == {"network.3": ["network.2"]}
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_the_least_cost_is_that_of_the_cheapest_bit_width():
    """By bytes w1a8 costs less than w4a1, which stands before it."""
    model, _ = network(("w4a1", "w1a8", 4))
    costs = Costs(model, 32)
    tried = search.Search(model, ForwardPass(model, torch.device("cpu")), costs,
                          sorted(models.highest_first(["w4a1", "w1a8", 4])), [], [],
                          "weight_bytes")
    assert tried.least_cost() == totals(costs.of(models.BitWidth.of("w1a8")))["weight_bytes"]


def test_a_search_of_a_network_of_several_outputs_is_refused():
    model, _ = network((2, 4))
    model.register_forward_hook(lambda model, inputs, logits: (logits, logits))
    batch = torch.randn(2, 3, 32, 32), torch.arange(2)
    with pytest.raises(UserError, match="the network returns a tuple"):
        search.Search(model, ForwardPass(model, torch.device("cpu")), Costs(model, 32),
                      models.highest_first([2, 4]), [], [batch], "weight_bytes")


def test_a_step_takes_the_least_divergence_per_cost(monkeypatch):
    """By hand: of two units, the one that saves less is taken where answers change far less."""
    model, _ = network((2, 4))
    costs = Costs(model, 32)
    tried = search.Search(model, ForwardPass(model, torch.device("cpu")), costs,
                          models.highest_first([2, 4]), [], [], "weight_bytes")
    units = [["layers.0.act0", "layers.0.conv0"], ["layers.2.act1", "layers.2.conv1"]]
    assert [unit for unit in tried.units if unit in units] == units
    tried.units = units
    rises = {"layers.0.conv0": 0.1, "layers.2.conv1": 3.0}

    def measure(unit, layers):
        divergence = sum(rises[name] for name in rises if name in layers)
        return search.Step(unit, layers, divergence, 0.0, {"weight_bytes": tried.cost(layers)})

    monkeypatch.setattr(tried, "measure", measure)
    path = []
    tried.descend(path, tried.least_cost(), lambda steps: None)
    saved = [before.cost["weight_bytes"] - after.cost["weight_bytes"]
             for before, after in zip(path, path[1:])]
    assert saved == [4 * 4 * 9 * 2 // 8, 16 * 16 * 9 * 2 // 8]
    rises["layers.2.conv1"] = 0.8  # less than 16 times that of the other
    path = []
    tried.descend(path, tried.least_cost(), lambda steps: None)
    assert [step.unit for step in path[1:]] == units[::-1]


@pytest.mark.parametrize("argv, code, part", [
    (["--budget", "8bit"], 1, "--budget 8bit: the network was not trained at 8 bits: choose from "
     "1,2,4"),
    (["--bytes", "10"], 1, "--bytes 10 is 10, and all layers at their cheapest take"),
    (["--budget", "4bits,0"], 2, "'0' is not a budget"),
    (["--budget", "12_5%"], 2, "'12_5%' is not a budget"), ([], 2, "give one of --budget"),
    (["--budget", "1e9", "--cost"], 2, "give one of --budget"),
    (["--cost", "8"], 1, "--cost: the network has no 8-bit BatchNorm; choose from 1, 2, 4")])
def test_searches_that_cannot_be(argv, code, part, tiny_cifar10, tmp_path, capsys):
    path, *_ = checkpoint(tmp_path)
    assert searched(path, "--data-dir", tiny_cifar10, "--device", "cpu", *argv) == code
    assert_one_line(capsys, part)


def test_a_search_needs_two_bit_widths(trained, tiny_cifar10, capsys):
    assert searched(trained, "--data-dir", tiny_cifar10, "--budget", "50%") == 1
    assert_one_line(capsys, "was trained at 2,32 bits: a search needs two bit-widths of 1 to 8")
    assert searched(trained, "--data-dir", tiny_cifar10, "--cost") == 0
    assert "| layers.0.conv0 " in capsys.readouterr().out


def test_a_search_has_a_folder_of_its_own(trained, tiny_cifar10, tmp_path, capsys, monkeypatch):
    path, *_ = checkpoint(tmp_path)
    common = [path, "--data-dir", tiny_cifar10, "--device", "cpu", "--images", 6, "--results-dir"]
    before = snapshot(trained)
    assert searched(*common, trained, "--budget", "50%") == 1
    assert_one_line(capsys, f"{trained} holds a run already")
    assert snapshot(trained) == before
    assert searched(*common, tmp_path / "s", "--budget", "50%") == 0
    assert searched(*common, tmp_path / "s", "--budget", "90%") == 0
    assert [each["name"] for each in read(tmp_path / "s", "layer_bits.json")] == [
        "ops-50pct", "ops-90pct"]
    capsys.readouterr()
    assert run(["--evaluate", "--pretrain", path, "--data-dir", tiny_cifar10, "--results-dir",
                tmp_path / "s"]) == 1
    assert_one_line(capsys, f"{tmp_path / 's'} holds a run already")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert searched(*common, tmp_path / "s", "--budget", "50%") == 1
    assert_one_line(capsys, "a search runs in one process, and WORLD_SIZE is 2")


def test_the_table_of_costs(tmp_path, tiny_cifar10, capsys):
    path, *_ = checkpoint(tmp_path, assignment=Assignment("mix", 2, MIX))
    assert searched(path, "--data-dir", tiny_cifar10, "--device", "cpu", "--cost", "mix") == 0
    assert "| layers.1.conv0 " in capsys.readouterr().out


@pytest.mark.parametrize("damage", [
    lambda content: [], lambda content: {**content, "steps": [{"divergence": 1}]},
    lambda content: {**content, "steps": [{**content["steps"][0], "layers": {"a": 9}}]}])
def test_damaged_paths(damage, tmp_path, capsys):
    file = tmp_path / "path.json"
    good = {"seed": 0, "steps": [{"unit": [], "layers": {"a": 4}, "divergence": 0.5, "top1": 90.0,
                                  "cost": {"bit_operations": 5, "weight_bytes": 6}}]}
    file.write_text(json.dumps(copy.deepcopy(good)))
    step, = search.read_path(file, {"seed": 0})
    assert step.layers == {"a": models.BitWidth(4)}
    file.write_text(json.dumps(damage(good)))
    with pytest.raises(search.UserError, match="path.json: its (content|step) is"):
        search.read_path(file, {"seed": 0})
