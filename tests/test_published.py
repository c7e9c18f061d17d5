"""Where checkpoints come from: published names, URLs, downloads that are whole or not there."""
import pwd

import numpy
import pytest
import torch
from runs import assert_same, evaluation, load, run, snapshot, tiny

import reference
import tiny_data
from dataset.data import get_dataset, get_transform
from engine import published
from engine.errors import UserError
from models.checkpoint import read_checkpoint
from models import MODELS, set_bit_width

ALL = (1, 2, 4, 8, 32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dropbox(http_folder, monkeypatch):
    """A folder served as the published files' host."""
    folder, url = http_folder
    monkeypatch.setattr(published, "PREFIX", f"{url}/")
    return folder


def publish(folder, name, legacy, prefix="", bits=ALL):
    """Write a file as the published ones: their keys, no arguments.

    legacy: in torch 1.1's serialisation.
    """
    model = reference.fill(MODELS[name.split("_")[0]](bits, num_classes=10), seed=3)
    path = folder / published.FILES[name]["link"]
    path.parent.mkdir(parents=True)
    torch.save({
        "epoch": 200, "model": name.split("_")[0],
        "state_dict": {prefix + key: value for key, value in model.state_dict().items()},
        "best_prec1": numpy.float64(93.5) if legacy else torch.tensor(93.5),
        "optimizer": torch.optim.Adam(model.parameters()).state_dict()},
        path, _use_new_zipfile_serialization=not legacy)
    return path, model


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name, prefix, bits", [
    ("svhnq_any_recursive", "", ALL), ("svhnq_any_hard", "module.", ALL), ("svhnq_4", "", (4,))])
def test_published_checkpoint_by_name(name, prefix, bits, legacy, dropbox, tmp_path, monkeypatch,
                                      capsys):
    tiny_data.svhn(tmp_path / "data", monkeypatch)
    path, model = publish(dropbox, name, legacy, prefix, bits)
    argv = ["--evaluate", "--pretrain", name, "--data-dir", tmp_path / "data", "--device", "cpu"]
    assert run([*argv, "--results-dir", tmp_path / "e"]) == 0, capsys.readouterr().err
    results = evaluation(tmp_path / "e")
    assert list(results) == [str(width) for width in bits]

    test = get_dataset("svhn", "test", get_transform("svhn", False), tmp_path / "data")
    images, labels = map(torch.tensor, zip(*[(image.tolist(), label) for image, label in test]))
    model.eval()
    for width in bits:
        set_bit_width(model, width)
        right = (model(images).argmax(1) == labels).sum().item()
        assert results[str(width)]["top1"] == pytest.approx(100 * right / 6)

    path.unlink()  # from now on it comes from the cache
    assert run([*argv, "--results-dir", tmp_path / "e2"]) == 0
    assert [file.name for file in published.cache_folder().iterdir()] == [f"{name}.pth.tar"]


def test_published_names_are_complete():
    assert len(published.FILES) == 8 + 8 + 6
    for name, file in published.FILES.items():
        assert file["link"].endswith(f"/{name}.pth.tar") and name.split("_")[0] in MODELS


def test_checkpoint_by_url(dropbox, http_folder):
    path, model = publish(dropbox, "svhnq_2", legacy=True, bits=(2,))
    url = f"{http_folder[1]}/{published.FILES['svhnq_2']['link']}?dl=1"
    found = published.find_checkpoint(url)
    assert_same(read_checkpoint(found)["state_dict"], dict(model.state_dict()))
    path.unlink()
    assert published.find_checkpoint(url) == found


@pytest.mark.parametrize("content, told", [
    ("cut short", "can be read safely"), ("page", "can be read safely"),
    ("missing", "404")])
def test_a_download_is_whole_or_not_at_all(content, told, dropbox):
    path, _ = publish(dropbox, "svhnq_2", legacy=True, bits=(2,))
    if content == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif content == "page":
        path.write_text("<!DOCTYPE html><html>Too many requests</html>")
    else:
        path.unlink()
    told = f"could not be downloaded as a whole checkpoint .*{told}"
    with pytest.raises(UserError, match=told):
        published.find_checkpoint("svhnq_2")
    assert list(published.cache_folder().iterdir()) == []


def test_without_a_home_directory(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="no home directory to keep downloads in: set XDG_CACHE_HO"):
        published.find_checkpoint("svhnq_2")


def test_what_may_be_a_token_in_a_url_is_kept_nowhere(trained, http_folder, tmp_path, tiny_cifar10,
                                                      capfd):
    folder, url = http_folder
    best = trained / "ckpt" / "model_best.pth.tar"
    (folder / "x.pth.tar").write_bytes(best.read_bytes())
    url = url.replace("http://", "http://me:SECRET@")

    argv = tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)
    for source, code in ((f"{url}/no?key=SECRET", 1), (f"{url}/x.pth.tar?key=SECRET&a=b", 0)):
        if code == 0:  # Python's client takes no name and password
            source = source.replace("me:SECRET@", "")
        assert run([*argv, "--pretrain", source]) == code
    shown = capfd.readouterr()
    assert "/no?*** could not be downloaded" in shown.err
    assert "downloading http://127.0.0.1" in shown.out and "/x.pth.tar?***" in shown.out
    assert "SECRET" not in shown.out + shown.err
    for path, content in snapshot(tmp_path / "r").items():
        assert b"SECRET" not in content, path
    assert load(tmp_path / "r")["arguments"]["pretrain"].endswith("/x.pth.tar?***")
    assert run([*argv, "--pretrain", source]) == 0  # the same command goes on
