"""Any-precision networks by name, and the switch that sets their bit-width."""
from models import zoo
from models.bit_widths import calibrate, fit_bit_widths, saved_bit_widths
from models.convert import convert
from models.converted import layer_table
from models.quan_ops import BIT_WIDTHS, check_bit_widths, set_bit_width, trained_bit_widths
from models.resnet_quan import ResNet20 as resnet20q, ResNet50 as resnet50q
from models.svhn_quan import SVHNNet as svhnq

MODELS = {"resnet20q": resnet20q, "resnet50q": resnet50q, "svhnq": svhnq}
DEFAULT_WIDTH = {"resnet20q": 5, "resnet50q": 1, "svhnq": 2}


def build(name, bit_widths, num_classes, width=1, all_conv=False):
    """Return a network of MODELS, or a converted one of torchvision; ValueError for another."""
    if name in MODELS:
        return MODELS[name](bit_widths, num_classes, width, all_conv)
    return convert(zoo.torchvision_network(name, num_classes), bit_widths)
