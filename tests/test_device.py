"""The choice of a device."""
from types import SimpleNamespace

import gpustat
import pytest
import torch

from engine.device import choose_device
from engine.errors import UsageError, UserError


def fake_gpus(monkeypatch, free):
    """Let torch and gpustat tell of two GPUs, in opposite orders. free: MiB by UUID."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda index: SimpleNamespace(uuid="ab"[index]))
    gpus = [SimpleNamespace(uuid=f"GPU-{uuid}", memory_total=100, memory_used=100 - free[uuid])
            for uuid in "ba"]
    monkeypatch.setattr(gpustat, "new_query", lambda: gpus)


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("free, index", [({"a": 10, "b": 60}, 1), ({"a": 70, "b": 60}, 0)])
def test_the_gpu_with_the_most_free_memory_is_chosen(name, free, index, monkeypatch):
    fake_gpus(monkeypatch, free)
    assert choose_device(name) == torch.device("cuda", index)


def test_named_devices(monkeypatch):
    fake_gpus(monkeypatch, {"a": 1, "b": 2})
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")
    told = "no device cuda:2; available: auto, cpu, cuda:0, cuda:1"
    with pytest.raises(UserError, match=told):
        choose_device("cuda:2")


def test_gpustat_that_cannot_tell(monkeypatch, capsys):
    fake_gpus(monkeypatch, {"a": 1, "b": 2})

    def refuse():
        raise RuntimeError("no driver library")

    monkeypatch.setattr(gpustat, "new_query", refuse)
    assert choose_device("auto") == torch.device("cuda", 0)
    assert "no driver library" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == torch.device("cpu")
    told = "no device cuda; available: auto, cpu"
    with pytest.raises(UserError, match=told):
        choose_device("cuda")


def test_a_device_that_does_not_exist():
    with pytest.raises(UsageError, match="--device 'gpu' does not exist: choose auto, cpu, cuda"):
        choose_device("gpu")
