"""The published quantizers as functions, and a layer that is Conv2dQ but for its output."""
from torch.nn import functional

from models.quan_ops import ActivationQ, BitWidth, Conv2dQ, DoReFaActivation, DoReFaWeight


class PadOne(Conv2dQ):
    """Pads with ones, as binary networks do."""

    def forward(self, x):
        return self.apply_quantized(x, lambda x, w, b: functional.conv2d(
            functional.pad(x, (1,) * 4, value=1.0), w, b))


def quantize_weight(w, bits):
    """Return a weight, quantized as layers do."""
    quantizer = DoReFaWeight()
    quantizer.switch(bits, str(bits))
    prepared = quantizer.prepare(w)
    if bits == 32:
        return quantizer.full_precision(*prepared)
    integers, scale = quantizer.integers(*prepared)
    return integers * scale


def quantize_activation(x, bits, rounding=True):
    """Return activations, quantized as layers do."""
    layer = ActivationQ(rounding)
    assert isinstance(layer.quantizer, DoReFaActivation)
    layer.switch_bit_width(BitWidth(bits))
    return layer(x)
