"""Float networks that tests convert: torchvision's, and twins of ours of torch's layers."""
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import ShuffleNetV2
from torchvision.models._api import register_model

from models import zoo

SMALL = "torchvision:small_shufflenet"


@register_model()
def small_shufflenet(*, weights=None, progress=True, **kwargs):
    """Torchvision's ShuffleNetV2 with 4 blocks of its 16, one of which keeps its size."""
    return ShuffleNetV2([1, 2, 1], [24, 16, 32, 64, 128], **kwargs)


small_shufflenet.__module__ = ShuffleNetV2.__module__  # so that list_models lists it


def on_meta(name):  # regnet computes its sizes by tensors
    return torch.device("cpu" if name.startswith("regnet") else "meta")


def build(name):
    """Return a float network in evaluation mode, with weights that are cheap to draw."""
    with on_meta(name):
        network = zoo.torchvision_network(f"torchvision:{name}", 10)
        if name == "vgg11_bn":  # 120 million weights less
            network.avgpool = nn.AdaptiveAvgPool2d(1)
            network.classifier[0], network.classifier[3] = nn.Linear(512, 16), nn.Linear(16, 16)
            network.classifier[6] = nn.Linear(16, 10)
    return draw(network).eval()


def draw(network):
    """Give a network weights and statistics that are cheap to draw; return it on the CPU."""
    network.to_empty(device="cpu")
    torch.manual_seed(0)
    for key, value in network.state_dict().items():
        if value.dim() > 1:
            value.uniform_(-1, 1).mul_((6 / value[0].numel())**0.5)
        elif key.endswith(("weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif value.dtype.is_floating_point:
            value.uniform_(-0.1, 0.1)
        else:
            value.zero_()
    return network


def noise():
    """Return two images of 32 x 32, always the same."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def float_svhn(e=1):
    def conv(c_in, c_out, size, padding=0):
        return nn.Conv2d(c_in, c_out, size, padding=padding, bias=False)

    network = nn.Sequential()
    network.layers = nn.Sequential(
        nn.Conv2d(3, 6 * e, 5), nn.MaxPool2d(2), nn.ReLU(),
        conv(6 * e, 8 * e, 3, 1), nn.BatchNorm2d(8 * e), nn.ReLU(),
        conv(8 * e, 8 * e, 3, 1), nn.BatchNorm2d(8 * e), nn.MaxPool2d(2), nn.ReLU(),
        conv(8 * e, 16 * e, 3), nn.BatchNorm2d(16 * e), nn.ReLU(),
        conv(16 * e, 16 * e, 3, 1), nn.BatchNorm2d(16 * e), nn.ReLU(),
        conv(16 * e, 16 * e, 3), nn.BatchNorm2d(16 * e), nn.ReLU(inplace=True), nn.Dropout(0.5),
        conv(16 * e, 64 * e, 5), nn.ReLU())
    network.flatten = nn.Flatten()
    network.fc = nn.Linear(64 * e, 10)
    return network, ()


class FloatBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn0, self.bn1 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        if stride == 2:
            self.skip_conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.skip_bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        a = functional.relu(self.bn0(x))
        shortcut = self.skip_bn(self.skip_conv(a)) if hasattr(self, "skip_bn") else x
        return self.conv1(torch.relu(self.bn1(self.conv0(a)))) + shortcut


class FloatResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        sizes = [16] * 4 + [32] * 3 + [64] * 3
        self.layers = nn.Sequential(*(FloatBlock(c_in, c_out, c_out // c_in)
                                      for c_in, c_out in zip(sizes, sizes[1:])))
        self.bn, self.fc = nn.BatchNorm2d(64), nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.bn(self.layers(self.conv0(x))).mean((2, 3)))


def float_resnet20():
    shared = [f"layers.{block}.skip_{kind}" for block in (3, 6) for kind in ("conv", "bn")]
    return FloatResNet20(), shared
