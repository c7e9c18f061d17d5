"""The published quantizers as functions, for tests."""
from models.quan_ops import ActivationQ, BitWidth, DoReFaActivation, DoReFaWeight


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
