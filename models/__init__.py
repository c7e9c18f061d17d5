"""Any-precision networks by name, and the switch that sets their bit-width."""
from collections.abc import Iterable

from torch import nn

from models import zoo
from models.assignment import Assignment, Width, read_assignments
from models.bit_widths import BITS, FULL_PRECISION, BitWidth, highest_first
from models.calibration import (add_assignment, add_missing_bit_widths, calibrate,
                                saved_bit_widths)
from models.convert import convert
from models.converted import layer_table
from models.fields import FileError
from models.quan_ops import assignments_of, bit_widths_of, set_bit_width
from models.quantizers import (QUANTIZERS, initialize_quantizers, layers_to_initialize,
                               set_quantizers)
from models.resnet_quan import ResNet20 as resnet20q
from models.resnet_quan import ResNet50 as resnet50q
from models.svhn_quan import SVHNNet as svhnq

MODELS = {"resnet20q": resnet20q, "resnet50q": resnet50q, "svhnq": svhnq}
DEFAULT_WIDTH = {"resnet20q": 5, "resnet50q": 1, "svhnq": 2}


def build(name: str, bit_widths: Iterable[BitWidth | int | str], num_classes: int, width: int = 1,
          all_conv: bool = False, quantizer: str = "dorefa") -> nn.Module:
    """Build a network of MODELS, or convert one of torchvision's.

    The network's attribute `spec` holds what built it, as checkpoints store it. Raises ValueError
    for an unknown name, and for bit-widths or a quantizer that do not exist.
    """
    bit_widths = highest_first(bit_widths)
    if name in MODELS:
        model = MODELS[name](bit_widths, num_classes, width, all_conv)
    else:
        model = convert(zoo.torchvision_network(name, num_classes), bit_widths)
    if quantizer not in QUANTIZERS or QUANTIZERS[quantizer]:  # which refuses an unknown one
        set_quantizers(model, quantizer, bit_widths)
    model.spec = {"model": name, "width": width, "classes": num_classes, "all_conv": all_conv,
                  "quantizer": quantizer,
                  "bit_widths": [bits.plain for bits in sorted(bit_widths)]}
    return model


from models.checkpoint import load, save  # noqa: E402  it imports `build`
