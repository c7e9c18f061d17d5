"""The packed file: a network of every bit-width, with a byte (or nine bits) a quantized weight.

It is a safetensors file: of each quantized layer E, and numbers of rows of a table of levels (see
levels.py); the BatchNorms of its bit-widths; all else in float32; and one JSON text, with a
SHA-256.
"""
import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from models import build, check_bit_widths, set_bit_width
from models.bit_widths import BATCH_NORM_ENTRY
from models.levels import combinations, encode, rows_of
from models.quan_ops import FULL_PRECISION, Conv2dQ

KEY = "any_precision"  # the one metadata entry: several are written in another order each time
FORMAT = 1
ANY = (1, 2, 3, 4, 5, 6, 7, 8)
COUNTED = ".num_batches_tracked"  # not stored: evaluation does not need it


class PackedConv2dQ(Conv2dQ):
    """A Conv2dQ of stored levels. Its weight, uint8, is the low byte of numbers into `levels`."""

    def operand(self, bits, integers=False):
        self.shared = self.normalized(bits)
        try:
            return super().operand(bits, integers)
        finally:
            self.shared = None

    def normalized(self, bits):
        """Return (v, E) of the levels k; v = 2 k / n - 1, which quantizing keeps, bit for bit."""
        if bits not in self.stored_bits:
            stored = ", ".join(map(str, self.stored_bits))
            raise ValueError(f"{bits} bits is not in the packed file: choose from {stored}")
        column = self.stored_bits.index(bits)
        numbers = self.weight.contiguous().flatten().long()
        if self.ninth is not None:
            eight = torch.arange(8, device=numbers.device)
            numbers += ((self.ninth[:, None] >> eight & 1).flatten()[:len(numbers)].long() << 8)
        k = self.levels[:, column][numbers]
        if self.mended is not None:
            k[self.mended.long()] = self.mended_levels[:, column]
        v = 2 * (k.to(self.scale.dtype) / (2**bits - 1)) - 1
        # In the weight's layout, which a network in channels-last format convolves with.
        like = torch.empty_like(self.weight, dtype=v.dtype)
        return like.copy_(v.view(self.weight.shape)), self.scale

    def pack(self, weight, scale, levels, stored_bits, ninth=None, mended=None,
             mended_levels=None):
        """Become a layer of these tensors, by the names that they have in a file."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.stored_bits = tuple(stored_bits)
        self.register_buffer("levels", levels, persistent=False)  # one table for all layers
        self.register_buffer("scale", scale)
        self.register_buffer("ninth", ninth)
        self.register_buffer("mended", mended)
        self.register_buffer("mended_levels", mended_levels)
        if (weight.dtype != torch.uint8 or levels.shape[1:] != (len(stored_bits),)
                or ninth is None and int(weight.max()) >= len(levels)
                or ninth is not None and 8 * len(ninth) < weight.numel()
                or mended is not None and not 0 <= int(mended.min()) <= int(mended.max())
                < weight.numel()):
            raise ValueError("weights and their table do not fit each other")


def quantized_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Conv2dQ)}


# ---- write

@torch.no_grad()
def save(model, bit_widths, path, about, stored_bits=None):
    """Write a model's weights at `stored_bits` (None: bit_widths) and BatchNorms of bit_widths.

    about: what to build it from (model, width, all_conv, classes), and what else to tell of it.
    Raises ValueError where the model's quantizer gives weights that integers do not stand for.
    """
    bit_widths, stored_bits = sorted(bit_widths), sorted(stored_bits or bit_widths)
    if FULL_PRECISION in (*bit_widths, *stored_bits):
        raise ValueError("32 bits is not stored in a packed file, which holds integers: choose "
                         "from 1 to 8, and keep the checkpoint for 32")
    layers = quantized_layers(model)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()
               if not key.endswith(COUNTED) and kept_entry(key, bit_widths)
               and (key.rpartition(".")[0] not in layers or key.endswith(".bias"))}
    others, packed = encode({name: combinations(layer, stored_bits)
                             for name, layer in layers.items()}, stored_bits)
    levels = rows_of(others, stored_bits)
    for name, parts in packed.items():
        layer = layers[name]
        parts["scale"] = layer.operand(stored_bits[0])[1].clone()
        parts["weight"] = parts["weight"].view(layer.weight.shape)
        check(name, layer, {**parts, "levels": levels, "stored_bits": stored_bits})
        tensors.update((f"{name}.{part}", value) for part, value in parts.items())
    if len(others):
        tensors["others"] = others
    about = {**about, "format": FORMAT, "bit_widths": bit_widths, "stored_bits": stored_bits}
    about["sha256"] = digest(tensors, about)
    content = safetensors.torch.save(tensors, {KEY: json.dumps(about, sort_keys=True)})
    Path(path).write_bytes(content)


def kept_entry(key, bit_widths):
    """Return whether a state dict's entry is that of no bit-width, or of one of bit_widths."""
    found = BATCH_NORM_ENTRY.fullmatch(key)
    return not found or int(found[2]) in bit_widths


def check(name, layer, parts):
    """Raise ValueError unless a packed layer has the layer's own weights, to the last bit."""
    packed = PackedConv2dQ(1, 1, 1)
    packed.pack(**parts)
    for bits in parts["stored_bits"]:
        if not torch.equal(packed.operand(bits)[0], layer.operand(bits)[0]):
            raise ValueError(f"{name} at {bits} bits cannot be packed: quantizing its "
                             "quantized weights again changes them")


def digest(tensors, about):
    """Return the SHA-256 of all that a file holds, but of the digest itself."""
    about = {name: value for name, value in about.items() if name != "sha256"}
    total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


# ---- read

def is_packed(path):
    """Return whether a file begins as safetensors do: a length in 8 bytes, and JSON."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def read(path):
    """Return a packed file's {name: tensor} and what is told of it; ValueError where it is none.

    Besides what the file has: `levels`, the table, and the state of BatchNorms that it leaves out.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a packed file, or cut short ({error}): export it "
                         "anew") from None
    try:
        about = json.loads(metadata[KEY])
        version, told = about["format"], about["sha256"]
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{path} is a safetensors file of something else: give one that "
                         "export.py wrote") from None
    if version != FORMAT:
        raise ValueError(f"{path} has packed format {version}, and this version of the project "
                         f"reads {FORMAT}: update it, or export the network anew")
    if digest(tensors, about) != told:
        raise ValueError(f"{path} is damaged: its content is not that of its SHA-256; copy or "
                         "export it anew")
    stored = about["stored_bits"]
    others = tensors.pop("others", torch.zeros(0, len(stored), dtype=torch.uint8))
    tensors["levels"] = rows_of(others, stored)
    tensors.update({f"{key.rpartition('.')[0]}{COUNTED}": torch.tensor(0)
                    for key in list(tensors) if key.endswith(".running_mean")})
    return tensors, about


def read_checkpoint(path):
    """Return a packed file as the dict that a checkpoint holds; ValueError where it is none."""
    tensors, about = read(path)
    try:
        return {"model": about["model"], "epoch": None, "arguments": about["arguments"],
                "packed": {"levels": tensors.pop("levels"), "stored_bits": about["stored_bits"]},
                "state_dict": tensors}
    except KeyError as error:
        raise ValueError(f"{path} does not tell its {error}: export it anew") from None


def install(model, tensors, levels, stored_bits):
    """Turn the quantized layers of a model into packed ones, of the tensors that a file holds."""
    optional = ("ninth", "mended", "mended_levels")
    for name, layer in quantized_layers(model).items():
        layer.__class__ = PackedConv2dQ  # in place, with its hooks and its name
        parts = {part: tensors.get(f"{name}.{part}") for part in optional}
        layer.pack(tensors[f"{name}.weight"], tensors[f"{name}.scale"], levels, stored_bits,
                   **parts)


def load(path):
    """Return the network of a packed file, in evaluation mode; set_bit_width switches it.

    At every stored bit-width its weights are those that were packed, bit for bit. Raises ValueError
    where the file is damaged, of a newer version, or not a packed one.
    """
    tensors, about = read(path)
    try:
        bit_widths, levels = check_bit_widths(about["bit_widths"]), tensors.pop("levels")
        model = build(about["model"], bit_widths, about["classes"], about["width"],
                      about["all_conv"])
        install(model, tensors, levels, about["stored_bits"])
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path} does not fit the networks of this project ({told})") from None
    return model.eval()


def load_runner(path, memory_format=torch.contiguous_format):
    """Return run(images, bits) of a packed file: NumPy (N, 3, H, W) to logits (N, classes).

    The usual memory format has the logits of the network that was packed, bit for bit.
    """
    model = load(path).to(memory_format=memory_format)

    def run(images, bits):
        set_bit_width(model, bits)
        with torch.no_grad():
            return model(torch.from_numpy(images).contiguous(memory_format=memory_format)).numpy()
    return run
