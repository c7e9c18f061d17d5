"""Quantizers and the layers that hold them.

Source: Yu et al., AAAI 2021 (arXiv 1911.07346), whose quantizers are DoReFa-Net's (1606.06160).
Where the published code departs from the paper, this follows the code: 32-bit activations are ReLU,
and 32-bit weights also pass through tanh.
"""
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from models.assignment import Assignment, Width
from models.bit_widths import BITS, FULL_PRECISION, BitWidth, highest_first
from models.float_layers import BatchNorm2d, without_autocast

# ---- quantizers: a change here reaches training, evaluation, low precision and export


class Quantizer(nn.Module):
    """Quantizes a tensor to integers times a scale.

    The layer that holds it sets `bits`, 1 to 8 or 32, and `width`, the name of the network's
    bit-width. State per bit-width is keyed by that name: parameters in an nn.ParameterDict whose
    name ends in `_dict`, as BatchNorms in `bn_dict`.
    """

    lr_factor = 1.0  # learning rate of its parameters, as a multiple of --lr
    preparing = False

    def __init__(self):
        super().__init__()
        self.state = None

    @property
    def bits(self) -> int:
        """Bits of the quantized tensor."""
        return self.current[0]

    @property
    def width(self) -> str:
        """The name of the network's bit-width."""
        return self.current[1]

    @property
    def current(self) -> tuple[int, str]:
        """Bits and name of the current bit-width; raises ValueError within `prepare`."""
        if self.preparing:
            raise ValueError(f"{type(self).__name__}.prepare depends on the bit-width, and it is "
                             "computed once for all of them: move that to `integers`")
        if self.state is None:
            raise ValueError(f"a {type(self).__name__} has no bit-width yet: call set_bit_width")
        return self.state

    def switch(self, bits: int, width: str) -> None:
        """Set `bits` and `width`."""
        self.state = bits, width

    def of_width(self, parameters: nn.ParameterDict, name: str) -> Tensor:
        """Return the parameter of the current bit-width; ValueError where it has none.

        name: of quantizer and parameter, for the message, such as "lsq has no step size".
        """
        if self.width not in parameters:
            raise ValueError(f"{name} for {self.bits} bits at bit-width {self.width}: build the "
                             "network with it, or train at it")
        return parameters[self.width]

    def initialize(self, *inputs: Tensor) -> None:
        """Set parameters and buffers from the first batch; called at each bit-width of a new run.

        Of several processes only rank 0 calls it, and the others receive its values.
        """


class WeightQuantizer(Quantizer):
    """Quantizes the weight of a layer; a subclass defines `full_precision` and `integers`."""

    def prepare(self, w: Tensor) -> tuple[Tensor, ...]:
        """Return what does not depend on the bit-width; computed once per step."""
        return (w,)

    def full_precision(self, *prepared: Tensor) -> Tensor:
        """Return the weight at 32 bits."""
        raise NotImplementedError

    def integers(self, *prepared: Tensor) -> tuple[Tensor, Tensor]:
        """Return integers, in floating point, and their scale: one, or one per output channel.

        The integers are evenly spaced, and at most 2^bits in magnitude.
        """
        raise NotImplementedError


class ActivationQuantizer(Quantizer):
    """Quantizes activations; a subclass defines `full_precision` and `integers`."""

    def full_precision(self, x: Tensor) -> Tensor:
        """Return the activation function at 32 bits."""
        raise NotImplementedError

    def integers(self, x: Tensor, rounding: bool = True) -> tuple[Tensor, Tensor | float]:
        """Return integers from 0 to 2^bits - 1, in floating point, and their scale.

        The scale is one number, or a tensor that broadcasts against x.
        rounding: False clips to that range without rounding.
        """
        raise NotImplementedError

    def step_size(self) -> Tensor | float | None:
        """Return the scale of `integers`, without gradient; None where it depends on the input."""
        return None


class DoReFaWeight(WeightQuantizer):
    """Quantizes w to 2^bits evenly spaced values in [-E, E] (DoReFa-Net, eq. 9, times E).

        v = tanh(w) / max |tanh(w)|;  E = mean |w|;  n = 2^bits - 1
        bits <= 8:  E (2 round(n (v / 2 + 1/2)) / n - 1)
        bits = 32:  E v
    """

    def prepare(self, w: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.tanh(w)
        v = t / t.abs().amax()  # the maximum is not detached
        return v, w.abs().mean().detach()

    def full_precision(self, v: Tensor, e: Tensor) -> Tensor:
        return e * v

    def integers(self, v: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        n = 2**self.bits - 1
        return 2 * round_ste(n * (v / 2 + 0.5)) - n, e / n


class DoReFaActivation(ActivationQuantizer):
    """Quantizes x to 2^bits evenly spaced values in [0, 1] (DoReFa-Net, section 2.4).

        bits <= 8:  round(n clamp(x, 0, 1)) / n;  n = 2^bits - 1
        bits = 32:  ReLU(x)
    """

    def full_precision(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def integers(self, x: Tensor, rounding: bool = True) -> tuple[Tensor, float]:
        a = (2**self.bits - 1) * clamp(x, 0, 1)
        return round_ste(a) if rounding else a, self.step_size()

    def step_size(self) -> float:
        return 1 / (2**self.bits - 1)


def round_ste(x: Tensor) -> Tensor:
    """Round half to even, with the gradient of the identity (straight-through estimator)."""
    return RoundSTE.apply(x)


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp x to [low, high]; the gradient passes where low <= x <= high.

    It passes at both ends, where low-bit sums often lie; torch.clamp differs between versions.
    """
    return Clamp.apply(x, low, high)


class RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()  # torch 2.11 compiles a final in-place operation to a zero gradient

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low = low
        ctx.high = high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        x, = ctx.saved_tensors
        # hardtanh_backward excludes its ends: move them outwards by the least that counts.
        limits = torch.finfo(x.dtype)
        low = ctx.low - max(abs(ctx.low) * limits.eps, limits.tiny)
        high = ctx.high + max(abs(ctx.high) * limits.eps, limits.tiny)
        return torch.ops.aten.hardtanh_backward(grad, x, low, high), None, None


# ---- layers

ROUNDING = 2.0**-20  # of a float32 quotient of about 1


class QuantizedLayer:
    """A mixin for a layer whose output is linear in its weight, such as Conv2dQ.

    Its `quantizer` quantizes the weight; the bias stays as it is. bits: of the weight, at every
    bit-width of the network; None: those of the bit-width.
    """

    def __init__(self, *args, bits: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_quantizer(bits)

    def add_quantizer(self, bits: int | None = None) -> None:
        """Add what a quantized layer has; called too for a float layer whose class was changed."""
        self.own_bits = bits
        self.quantizer = DoReFaWeight()
        self.shared = None  # what quantizer.prepare gives, while shared_computation runs
        self.input_quantizer = None  # an ActivationQuantizer, where link_inputs finds it
        self.is_scalable = type(self) is Conv2dQ  # find_scalable finds it out of others
        self.switch_bit_width(BitWidth(FULL_PRECISION))

    @property
    def bits(self) -> int:
        """Bits of the weight at the current bit-width."""
        return self.quantizer.bits

    def switch_bit_width(self, bit_width: BitWidth) -> None:
        """Compute at a bit-width: `.weights` are the bits, str(bit_width) the key of its state."""
        self.activation_bits = bit_width.activations
        self.quantizer.switch(layer_bits(self, bit_width.weights), str(bit_width))

    def prepared_weight(self) -> tuple[Tensor, ...]:
        """Return what the quantizer prepares of the weight, computed once where it is shared."""
        if self.shared is None:
            return self.quantizer.prepare(self.weight)
        if isinstance(self.shared, tuple):  # compiled
            return self.shared
        return self.shared.prepared(self)

    def integer_weight(self) -> tuple[Tensor, Tensor]:
        """Return the quantized weight as integers, in floating point, and their scale.

        Outside autocast, which would round a matrix product of the quantizer.
        """
        with without_autocast(self):
            integers, scale = self.quantizer.integers(*self.prepared_weight())
        return integers, torch.as_tensor(scale, dtype=integers.dtype, device=integers.device)

    def quantized_weight(self) -> Tensor:
        """Return the weight that the layer computes with."""
        if self.bits == FULL_PRECISION:
            with without_autocast(self):
                return self.quantizer.full_precision(*self.prepared_weight())
        integers, scale = self.integer_weight()
        return integers * scale

    def apply_quantized(self, x: Tensor,
                        linear_map: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """Return linear_map(x, weight, bias) with the quantized weight.

        Where autocast or TF32 rounds the operands, they are integers over a power of two, which
        16 bits and TF32 represent exactly; their scales multiply the output.
        """
        edited = (type(self).quantized_weight is not QuantizedLayer.quantized_weight
                  or not self.is_scalable)
        if self.bits == FULL_PRECISION or edited or not self.rounds_operands(x):
            return linear_map(x, self.quantized_weight(), self.bias)
        integers, scale = self.integer_weight()
        if scale.numel() > 1:
            per_output = scale.shape == (len(integers), *[1] * (integers.ndim - 1))
            if not per_output or getattr(self, "transposed", False):
                return linear_map(x, integers * scale, self.bias)
            scale = scale[:, 0]
        weight_unit = 2.0**-self.bits
        input_unit = self.input_unit()
        operand = x / input_unit
        if x.dtype == torch.float32:  # a GPU would cut what division left beside a multiple
            known = self.input_quantizer
            operand = nearest_multiple(operand, known.bits if known else self.activation_bits)
        y = linear_map(operand, integers * weight_unit, None)
        y = y.to(scale.dtype) * (scale * (input_unit / weight_unit))
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (integers.ndim - 2))

    def rounds_operands(self, x: Tensor) -> bool:
        """Return whether the operands of a convolution of x are rounded."""
        return low_precision(x)

    def input_unit(self) -> Tensor | float:
        """Return u such that quantized activations, divided by u, are integers over 2^bits.

        Any u gives the same output; this one makes the operands exact. An unknown quantizer of the
        input is assumed to be DoReFa's, at the network's bit-width.
        """
        if self.input_quantizer is None:
            bits = self.activation_bits
            step = 1 / (2**bits - 1)
        else:
            bits = self.input_quantizer.bits
            step = self.input_quantizer.step_size() if bits != FULL_PRECISION else None
        if bits == FULL_PRECISION or step is None or torch.is_tensor(step) and step.numel() > 1:
            return 1.0
        return step * 2.0**bits


class Conv2dQ(QuantizedLayer, nn.Conv2d):
    """A convolution with a quantized weight: (N, C_in, H, W) -> (N, C_out, H', W')."""

    def forward(self, input: Tensor) -> Tensor:  # a keyword of torch's, too
        return self.apply_quantized(input, self._conv_forward)


class ActivationQ(nn.Module):
    """A quantized activation function.

    rounding: False clips without rounding. limit: maximum at 32 bits, such as 6 for ReLU6. bits: of
    the activations, at every bit-width of the network; None: those of the bit-width.
    """

    def __init__(self, rounding: bool = True, limit: float | None = None, bits: int | None = None):
        super().__init__()
        self.rounding = rounding
        self.limit = limit
        self.own_bits = bits
        self.quantizer = DoReFaActivation()
        self.switch_bit_width(BitWidth(FULL_PRECISION))

    @property
    def bits(self) -> int:
        """Bits of the activations at the current bit-width."""
        return self.quantizer.bits

    def extra_repr(self) -> str:
        limit = f", limit={self.limit}" if self.limit else ""
        return f"rounding={self.rounding}{limit}"

    def switch_bit_width(self, bit_width: BitWidth) -> None:
        """Compute at a bit-width: `.activations` are the bits, str(bit_width) its state's key."""
        self.quantizer.switch(layer_bits(self, bit_width.activations), str(bit_width))

    def forward(self, x: Tensor) -> Tensor:
        if self.bits != FULL_PRECISION:
            integers, scale = self.quantizer.integers(x, self.rounding)
            return integers * scale
        y = self.quantizer.full_precision(x)
        return y.clamp(max=self.limit) if self.limit else y


class SwitchableBatchNorm2d(nn.Module):
    """One BatchNorm2d per bit-width: (N, C, H, W) -> (N, C, H, W).

    In the published networks nothing else differs between bit-widths.
    """

    def __init__(self, num_features: int, bit_widths: Iterable[BitWidth | int | str]):
        super().__init__()
        bit_widths = highest_first(bit_widths)
        self.bn_dict = nn.ModuleDict(
            {str(width): BatchNorm2d(num_features) for width in reversed(bit_widths)})
        self.width = str(bit_widths[0])

    def switch_bit_width(self, bit_width: BitWidth) -> None:
        """Use the BatchNorm of a bit-width."""
        self.width = str(bit_width)

    def forward(self, input: Tensor) -> Tensor:  # a keyword of torch's, too
        return self.bn_dict[self.width](input)


def layer_bits(layer: nn.Module, bits: int) -> int:
    """Return a layer's own bits, or else `bits`; raises ValueError where its own cannot be."""
    if layer.own_bits is None:
        return bits
    if layer.own_bits not in BITS:
        raise ValueError(f"a {type(layer).__name__} has {layer.own_bits} bits of its own: choose "
                         f"from {', '.join(map(str, BITS))}, or None")
    return layer.own_bits


def nearest_multiple(x: Tensor, bits: int) -> Tensor:
    """Round float32 numbers to multiples of 2^-bits where they are within rounding of these.

    Quotients are, and a GPU that cuts them to TF32 would make more of that. Others, such as those
    that a dropout scaled, stay as they are; at 32 bits all do. Float32 has no finer digits where
    1.5 * 2^(23 - bits) is added.
    """
    return x if bits == FULL_PRECISION else NearestMultiple.apply(x, 1.5 * 2.0**(23 - bits))


class NearestMultiple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, large: float) -> Tensor:
        near = (x + large) - large
        return torch.where((near - x).abs() > ROUNDING, x, near)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def low_precision(x: Tensor) -> bool:
    """Return whether autocast or TF32 rounds the operands of a convolution of x."""
    device = x.device.type
    return (device != "meta" and torch.is_autocast_enabled(device)
            or device == "cuda" and torch.backends.cudnn.allow_tf32)


# ---- the switch

def set_bit_width(model: nn.Module, bit_width: Width | int | str) -> None:
    """Switch every layer of the model that has a method `switch_bit_width`.

    bit_width: also an Assignment of the model, or its name. Raises ValueError, and changes nothing,
    where the model was not built for that bit-width, or a layer has `bits` but no such method.
    """
    bit_width = width_of(model, bit_width)
    prefix, _ = assigned_module(model)
    key = str(bit_width)
    layers = []
    for name, layer in model.named_modules():
        kind = type(layer)  # where a search takes a tenth of a module's own
        if hasattr(kind, "check_modules"):
            layer.check_modules()
        if isinstance(layer, SwitchableBatchNorm2d) and key not in layer.bn_dict:
            raise ValueError(f"layer {name} has no {bit_width}-bit BatchNorm, which others have: "
                             "build it for the same bit-widths")
        if hasattr(kind, "switch_bit_width"):
            layers.append((layer, bit_width.of_layer(name.removeprefix(prefix))))
        elif not isinstance(layer, Quantizer) and (hasattr(kind, "bits") or any(
                "bits" in own for own in (vars(layer), layer._parameters, layer._buffers))):
            raise ValueError(f"layer {name or 'of the network'} ({type(layer).__name__}) has bits "
                             "that cannot be switched: give it a method "
                             "switch_bit_width(bit_width)")
    for layer, of_layer in layers:
        layer.switch_bit_width(of_layer)


def width_of(model: nn.Module, value: Width | int | str) -> Width:
    """Return the bit-width or assignment that a value says; ValueError where the model has none."""
    found = assignments_of(model).get(str(value))
    if found:
        if isinstance(value, Assignment) and not value.is_identical(found):
            raise ValueError(f"the network has another assignment of the name {value}: give this "
                             "one a name of its own")
        return found
    if isinstance(value, Assignment):
        raise ValueError(f"assignment {value} is not of this network: add it first, by "
                         "models.add_assignment(model, assignment)")
    bit_width = BitWidth.of(value)
    trained = bit_widths_of(model)
    if trained and bit_width not in trained:
        raise ValueError(f"the network has no {bit_width}-bit BatchNorm; choose from "
                         f"{', '.join(map(str, [*trained, *assignments_of(model)]))}")
    return bit_width


def bit_widths_of(model: nn.Module) -> list[BitWidth]:
    """Return the bit-widths that the model has BatchNorms for, lowest first."""
    assignments = assignments_of(model)
    for layer in model.modules():
        if isinstance(layer, SwitchableBatchNorm2d):
            return sorted(BitWidth.of(name) for name in layer.bn_dict if name not in assignments)
    return []


def assignments_of(model: nn.Module) -> dict[str, Assignment]:
    """Return the model's assignments by name; add_assignment of calibration.py adds them."""
    return vars(assigned_module(model)[1]).get("assignments", {})


def assigned_module(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the module whose layers assignments name, and the prefix of its layers' names.

    It is the model, or what it wraps, once or twice, as torch.compile does.
    """
    level = [("", model)]
    for _ in range(3):
        for prefix, module in level:
            if isinstance(vars(module).get("assignments"), dict):
                return prefix, module
        level = [(f"{prefix}{name}.", child) for prefix, module in level
                 for name, child in module.named_children()]
    compiled = model._modules.get("_orig_mod")  # whose attributes are those of what it wraps
    return ("", model) if compiled is None else ("_orig_mod.", compiled)
