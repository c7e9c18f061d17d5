"""A network from a file: a checkpoint of this project, a published one, or a packed file.

A checkpoint is a dict. Besides `state_dict` it holds `network`, the arguments that build its
network: model, width, classes, all_conv, quantizer, bit_widths, own_bits, and assignments,
where it has some; and `images`, a description of the images that it was trained on: dataset, size,
transforms of an evaluation, mean, std, class_names (or None). Older and published checkpoints lack
both: what is missing is inferred from the shapes of their weights.
"""
import copy
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from models import (DEFAULT_WIDTH, MODELS, QUANTIZERS, Assignment, BitWidth, add_assignment,
                    add_missing_bit_widths, assignments_of, bit_widths_of, build, packed,
                    quantizers, saved_bit_widths, set_bit_width, set_quantizers, zoo)
from models.archive import add_hash, read_archive
from models.assignment import check_assignments
from models.attributes import (attributes_of, draw_zeros, is_hooked, is_unchanged,
                               keeping_attributes)
from models.bit_widths import BITS, FULL_PRECISION
from models.calibration import ENTRY, without_assignments
from models.convert import SIZES
from models.converted import CLASSIFIER
from models.fields import (FileError, are_bit_widths, check_field, check_images,
                           check_images_to_save, is_count, is_dense, is_named_values, take)
from models.float_layers import BatchNorm2d
from utils import (WriteError, brief, escaped, keeping_random_states, one_line, replacing,
                   writing)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Attributes that an evaluation does not need, or that are found anew; those that checkpoints hold.
FOR_TRAINING = ("momentum", "p", "inplace", "is_scalable")
SAVED = ("own_bits", "calibrated", "images", "spec")
BEST = "model_best.pth.tar"
LATEST = "model_latest.pth.tar"


def load(path: str | Path, bit_widths: Iterable[BitWidth | int | str] | None = None) -> nn.Module:
    """Load a network from a file, in evaluation mode, at its highest bit-width.

    path: a checkpoint, a packed file, or a results folder, whose best checkpoint is loaded.
    bit_widths: of the network; None: those of the file. One that the file lacks is a copy of the
    nearest; where one that it has is left out, so are its assignments. The network's attribute
    `images` describes its images, and `calibrated` lists the bit-widths that were not trained.
    Raises FileError where the file is missing, damaged, or does not fit its network.
    """
    path = find_file(path, BEST)
    content = read_checkpoint(path)
    model, _ = network_of(content, path, bit_widths)
    return model


def save(model: nn.Module, path: str | Path) -> None:
    """Save a network that `build` built or `load` loaded, for `load` and the three programs.

    Its attribute `images`, where it has one, describes its images (see above). Raises ValueError
    for another network, or one that would be loaded as another, such as a pruned or a compiled one,
    one whose layers were replaced, or one with an attribute that was set after it was built and on
    which its logits depend; and WriteError where the file cannot be written.
    """
    network = network_content(model)
    if any(isinstance(layer.quantizer, packed.PackedWeight)
           for layer in quantizers.layers_with_quantizer(model).values()):
        raise ValueError("a packed network has no float weights to save: copy its file")
    content = {
        "epoch": None, "model": model.spec["model"], "best_prec1": None,
        "network": network, "images": getattr(model, "images", None),
        "state_dict": model.state_dict(), "calibrated": getattr(model, "calibrated", [])}
    check_images_to_save(content["images"], path)
    again = rebuilt(content, path)
    check_same_layers(model, again)
    hooked = find_hooked(model, again)
    if hooked:
        raise ValueError(f"{hooked} has a hook or a forward of its own, which no file holds: "
                         "remove it first")
    save_checkpoint(Path(path), content)


def rebuilt(content: dict, path: str | Path) -> nn.Module:
    """Return the network that is built for a checkpoint's content; keeps random states."""
    with keeping_random_states():  # which initial weights are drawn from
        model, _ = network_of(content, path)
    return model


def check_same_layers(model: nn.Module, again: nn.Module) -> None:
    """Raise ValueError naming a layer that is another one in the network that was built again.

    Compared are a layer's class, what it prints of itself without what training alone uses, and
    the logits where attributes of both hold different numbers or texts.
    """
    layers, others = dict(model.named_modules()), dict(again.named_modules())
    for name in {**layers, **others}:
        here, there = layer_text(layers.get(name)), layer_text(others.get(name))
        if here != there:
            layer = f"layer {name}" if name else "the network"
            raise ValueError(f"{layer} is {here}, and {there} in the network that is built for its "
                             "checkpoints: change it where it is built, in models.MODELS or "
                             "models.QUANTIZERS")

    width = min(bit_widths_of(model))
    with keeping_attributes(model):  # its bit-width, too
        values, built = attributes_of(model, width), attributes_of(again, width)
    differing = {}  # by attribute of a module
    for name in values.keys() & built.keys():
        value = values[name]
        attribute = name.partition("[")[0]
        if attribute.rpartition(".")[2] not in (*FOR_TRAINING, *SAVED) and not (
                torch.is_tensor(value) or is_unchanged(built[name], value)):
            differing[attribute] = name
    for attribute, name in differing.items():
        if changes_logits(again, attribute, model):
            raise ValueError(f"{name} of the network is {brief(values[name])}, and "
                             f"{brief(built[name])} in the network that is built for its "
                             "checkpoints: set it where that is built, in models.MODELS or "
                             "models.QUANTIZERS, or make it a buffer")


@torch.no_grad()
def changes_logits(network: nn.Module, attribute: str, other: nn.Module) -> bool:
    """Return whether a network gives other logits with an attribute of another network.

    True too where that is not known, as it takes images of none of SIZES. Changes its parameters
    that are 0.
    """
    owner, _, name = attribute.rpartition(".")
    module = network.get_submodule(owner)
    own = vars(module)[name]
    drawn = torch.Generator().manual_seed(0)
    draw_zeros(network, drawn)
    for size in SIZES:
        images = torch.randn(2, 3, size, size, generator=drawn)
        found = []
        try:
            for value in (own, vars(other.get_submodule(owner))[name]):
                setattr(module, name, copy.deepcopy(value))
                for width in bit_widths_of(network):
                    with keeping_random_states(), keeping_attributes(network):
                        set_bit_width(network.eval(), width)
                        found.append(network(images))
        except Exception:  # of the network's own code
            continue
        finally:
            setattr(module, name, own)
        first, second = found[:len(found) // 2], found[len(found) // 2:]
        return not all(map(is_unchanged, first, second))
    return True


def find_hooked(model: nn.Module, again: nn.Module) -> str | None:
    """Return the name of a layer with a hook, or a forward of its own, that `again` lacks."""
    others = dict(again.named_modules())
    return next((f"layer {name}" if name else "the network" for name, layer in
                 model.named_modules() if is_hooked(layer) and not is_hooked(others[name])), None)


def layer_text(layer: nn.Module | None) -> str:
    """Return a layer's class, and what it prints of itself without what training alone uses."""
    if layer is None:
        return "none"
    kind = type(layer)
    if isinstance(layer, nn.SyncBatchNorm):
        kind = BatchNorm2d  # what it was converted from
    own = [part for part in layer.extra_repr().split(", ")
           if not part.startswith(("momentum=", "p=", "inplace="))]
    return f"{kind.__module__}.{kind.__qualname__}({', '.join(own)})"


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint whole or not at all; raises WriteError where the disk is full."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            raise WriteError(path, f"{one_line(error)}, as on a full disk") from None
        add_hash(temporary)


def find_file(path: str | Path, *names: str) -> Path:
    """Return the file, or the first of `names` in a folder or its ckpt/; raises FileError."""
    path = Path(path)
    if path.is_dir():
        for candidate in (path / place / name for name in names for place in ("ckpt", "")):
            if candidate.is_file():
                return candidate
        raise FileError(f"{path} holds no checkpoint: looked there and in its ckpt/ for "
                        f"{', '.join(names)}; give a results folder of train.py, or a file")
    if not path.exists():
        raise FileError(f"checkpoint {path} does not exist: give a file or a results folder")
    return path


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint or a packed file onto the CPU, as data alone: code in it is refused.

    Returns its dict, with DataParallel's prefix removed from the keys. Raises FileError where it
    cannot be read, or its weights or what describes network and images are of another type.
    """
    if Path(path).exists() and not Path(path).is_file():  # reading a pipe could last for ever
        raise FileError(f"{path} is not a file but a folder, a pipe or a device: give a checkpoint")
    content = (packed.read_checkpoint if packed.is_packed(path) else read_archive)(path)
    content["state_dict"] = weights_of(content, path)
    for field in ("arguments", "network", "images"):
        check_field(path, field, content.get(field), is_named_values, "a dict with names as keys")
    check_images(content.get("images") or {}, path)
    check_field(path, "list of calibrated bit-widths", content.get("calibrated"), are_bit_widths,
                "a list of bit-widths")
    return content


def weights_of(content: dict, path: str | Path) -> dict[str, Tensor]:
    """Return a checkpoint's state dict without DataParallel's prefix, which ours never have.

    Raises FileError for what are no weights.
    """
    weights = content["state_dict"]
    prefix = "" if "network" in content else "module."
    state_dict = {key.removeprefix(prefix): value for key, value in weights.items()}
    if len(state_dict) < len(weights):
        raise FileError(f"{path}: its state_dict has a key twice, with and without module.: the "
                        "file may be damaged")
    for key, value in state_dict.items():
        if not is_dense(value) or value.is_floating_point() and value.dtype not in FLOATS:
            raise FileError(f"{path}: {escaped(key)} of its state_dict is {kind_of(value)}, not "
                            "a dense tensor of numbers: the file may be damaged")
    return state_dict


def kind_of(value: object) -> str:
    """Return what a value of a state dict is, for a message."""
    if not torch.is_tensor(value):
        return brief(value)
    where = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"a tensor of {value.dtype} and layout {value.layout}{where}"


def check_finite(state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Raise FileError naming the first entry with values that are not finite."""
    for key, value in state_dict.items():
        if value.is_floating_point():
            name = f"{path}: {escaped(key)}"
            count = int((~value.isfinite()).sum())
            if count:
                raise FileError(f"{name} has {count} values that are not finite: it is damaged, or "
                                "of a run that diverged; take an earlier checkpoint")
            if key.endswith(".running_var") and (value < 0).any():
                raise FileError(f"{name} has variances below 0: it is damaged; take an earlier "
                                "checkpoint")


def network_of(content: dict, path: str | Path,
               bit_widths: Iterable[BitWidth | int | str] | None = None,
               ) -> tuple[nn.Module, dict[BitWidth, BitWidth]]:
    """Build the network of a dict that read_checkpoint returned, and load its weights.

    Returns the network and {added bit-width: the one that it copies}. Raises FileError, naming
    `path`, where the content does not fit.
    """
    spec = network_spec(content, path)
    present = spec.pop("bit_widths")
    assignments = spec.pop("assignments")
    bit_widths = present if bit_widths is None else list(map(BitWidth.of, bit_widths))
    model = build_for(path, **spec, bit_widths=bit_widths)
    own_bits = saved_own_bits(content, path)
    if own_bits is not None:
        try:
            quantizers.set_own_bits(model, own_bits)
        except ValueError as error:
            raise FileError(f"{path}: {error}: the file may be damaged") from None

    state_dict = content["state_dict"]
    if own_bits and QUANTIZERS[spec["quantizer"]] and "packed" not in content:
        saved, own = ({key for key in entries if ".quantizer." in key}
                      for entries in (state_dict, model.state_dict()))
        if saved != own:  # they were made where layers had these bits
            set_quantizers(model, spec["quantizer"], bit_widths)
    if not set(present) <= set(bit_widths):
        state_dict = without_assignments(state_dict, map(str, assignments))
        assignments = []
    for assignment in assignments:
        try:
            add_assignment(model, assignment)
        except ValueError as error:
            raise FileError(f"{path}: {error}: the file may be damaged") from None
    if "packed" in content:
        try:
            packed.install(model, state_dict, **content["packed"])
        except ValueError as error:
            raise FileError(f"{path} cannot be loaded ({one_line(error)}): give bit-widths that "
                            "it holds, or export it anew") from None
    saved = saved_bit_widths(state_dict)
    state_dict, added = add_missing_bit_widths(state_dict, model)
    check_keyed_by_name(model, saved, path)
    load_weights(model, state_dict, path)
    set_bit_width(model, max(bit_widths))
    model.images = content.get("images")
    names = (model.images or {}).get("class_names")
    if names and len(names) != model.spec["classes"]:
        raise FileError(f"{path} names {len(names)} classes, and its network has "
                        f"{model.spec['classes']}: the file may be damaged")
    untrained = {*map(BitWidth.of, content.get("calibrated") or ()), *added}
    model.calibrated = [width.plain for width in sorted(untrained)]
    return model.eval(), added


def build_for(path: str | Path, name: str, **spec: object) -> nn.Module:
    """Build the network of a file; raises FileError where torchvision's cannot be converted."""
    try:
        return build(name, **spec)
    except ValueError as error:
        if name in MODELS:  # a mistake in its code
            raise
        raise FileError(f"{path}: its network {name} cannot be built ({one_line(error)}): the file "
                        "may be damaged") from None


def check_keyed_by_name(model: nn.Module, saved: Iterable[BitWidth], path: str | Path) -> None:
    """Raise FileError where a state dict's entries would be another bit-width's in this network.

    This happens where a layer keeps them by place, in a list or in one tensor, and file and network
    have equally many bit-widths, but not the same. saved: those of the file.
    """
    own = set(bit_widths_of(model))
    if own >= set(saved) or own <= set(saved):
        return  # then a list's entries are missing or unexpected
    spec = model.spec
    with keeping_random_states():
        both = build(spec["model"], own.union(saved), spec["classes"], spec["width"],
                     spec["all_conv"], spec["quantizer"])
    entries = model.state_dict()
    has_own_bits = bool(quantizers.own_bits_of(model))  # of which quantizers may hold other entries
    for key, value in both.state_dict().items():
        if ENTRY.fullmatch(key) or has_own_bits and ".quantizer." in key:
            continue
        if key not in entries or entries[key].shape != value.shape:
            raise FileError(f"{path} has other bit-widths than the network, which keeps {key} by "
                            "its place among them: keep it by a bit-width's name, in a module or "
                            "parameter dict whose name ends in _dict")


def network_spec(content: dict, path: str | Path) -> dict:
    """Return the arguments of models.build for a checkpoint's network.

    Raises FileError for a value of another type, or where the network cannot be inferred.
    """
    state_dict = content["state_dict"]
    saved = content.get("network") or old_spec(content, path)
    spec = {"name": check_model(saved.get("model"), path), "num_classes": saved.get("classes"),
            "width": saved.get("width"), "all_conv": saved.get("all_conv", False),
            "quantizer": saved.get("quantizer", "dorefa")}
    try:
        for key in state_dict:
            entry = ENTRY.fullmatch(key)
            if entry:
                BitWidth.of(entry["width"])
        spec["bit_widths"] = saved_bit_widths(state_dict)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None
    if not spec["bit_widths"]:
        raise FileError(f"{path} does not fit the model: it has BatchNorms for no bit-width")
    # No network has more classes, or a larger width, than its largest layer has channels.
    largest = max((size for value in state_dict.values() for size in value.shape), default=1)
    for field, is_right, what in (
            ("num_classes", lambda value: is_count(value) and value <= largest,
             f"a number up to {largest}, the size of its largest layer"),
            ("width", lambda value: is_count(value) and value <= largest,
             f"a number up to {largest}, the size of its largest layer"),
            ("all_conv", lambda value: isinstance(value, bool), "True or False"),
            ("quantizer", lambda value: isinstance(value, str), "a name")):
        take(path, spec, field, is_right, what, of="network's ")
    if spec["quantizer"] not in QUANTIZERS:
        raise FileError(f"{path}: its network's quantizer is {brief(spec['quantizer'])}, which is "
                        f"not one of {', '.join(QUANTIZERS)}: add it to models/quantizers.py")
    spec["assignments"] = saved_assignments(saved.get("assignments", []), path)
    return spec


def saved_assignments(saved: object, path: str | Path) -> list[Assignment]:
    """Return the assignments of a checkpoint's network; FileError where they are none."""
    try:
        assignments = list(map(Assignment.of, saved)) if isinstance(saved, list) else None
        if assignments is None:
            raise ValueError(f"{brief(saved)} is not a list")
        if assignments:
            check_assignments(assignments)
    except ValueError as error:
        raise FileError(f"{path}: its network's assignments: {error}: the file may be damaged"
                        ) from None
    return assignments


def network_content(model: nn.Module) -> dict:
    """Return what a checkpoint of a network that `build` built holds as its `network`.

    Raises ValueError for another network.
    """
    if not hasattr(model, "spec"):
        raise ValueError("the network has no spec, by which it could be built again: add its class "
                         "to models.MODELS, and build it by models.build")
    found = {**model.spec, "own_bits": quantizers.own_bits_of(model)}
    assignments = [assignment.content for assignment in assignments_of(model).values()]
    return {**found, "assignments": assignments} if assignments else found


def saved_own_bits(content: dict, path: str | Path) -> dict[str, int] | None:
    """Return a checkpoint's {layer: bits} of layers with bits of their own; None: it says none.

    Raises FileError where it is something else.
    """
    def is_right(value: object) -> bool:
        return is_named_values(value) and all(type(bits) is int and bits in BITS
                                              for bits in value.values())

    saved = (content.get("network") or {}).get("own_bits")
    check_field(path, "network's own_bits", saved, is_right, "a dict of layers and bits")
    return saved


def check_model(name: object, path: str | Path) -> str:
    """Return the name of a checkpoint's model; FileError where there is none of it."""
    if not isinstance(name, str) or not (name in MODELS or zoo.is_torchvision(name)):
        raise FileError(f"{path} is of model {brief(name)}: choose a checkpoint of "
                        f"{', '.join(MODELS)}")
    if name in MODELS:
        return name
    try:
        return zoo.check_name(name)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None


def old_spec(content: dict, path: str | Path, given: dict | None = None) -> dict:
    """Return the spec of a checkpoint that does not hold one: by its arguments, and by shapes.

    given: model, all_conv and quantizer, of a checkpoint that has no arguments either.
    """
    arguments = content.get("arguments") or given or {}
    name = check_model(content.get("model") or arguments.get("model"), path)
    spec = {"model": name, "all_conv": arguments.get("all_conv", False),
            "quantizer": arguments.get("quantizer", "dorefa"), "width": arguments.get("width")}
    state_dict = content["state_dict"]
    if name in MODELS:
        with torch.device("meta"):
            smallest = MODELS[name]([FULL_PRECISION], 1, 1, False)
        key = next(iter(smallest.state_dict()))
        if spec["width"] is None and key in state_dict:
            spec["width"] = first_size(state_dict[key]) // len(smallest.state_dict()[key])
        last = [key for key in smallest.state_dict() if key.endswith("weight")][-1]
    else:
        spec["width"] = 1
        layers = build_for(path, name, bit_widths=[FULL_PRECISION], num_classes=2).layers
        last = next(f"network.{layer.name}.weight" for layer in layers
                    if layer.why == CLASSIFIER)
    spec["width"] = spec["width"] or DEFAULT_WIDTH.get(name, 1)
    if last not in state_dict:
        raise FileError(f"{path} does not fit the model: it has no classifier ({last})")
    spec["classes"] = first_size(state_dict[last])
    return spec


def first_size(value: Tensor) -> int:
    """Return the first dimension of a tensor; 0 of what has none."""
    return len(value) if value.ndim else 0


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict; raises FileError naming missing, unexpected and mis-shaped entries."""
    own = model.state_dict()
    both = sorted(own.keys() & state_dict.keys())
    problems = {
        "missing": sorted(own.keys() - state_dict.keys()),
        "unexpected": sorted(state_dict.keys() - own.keys()),
        "of another shape": [key for key in both if own[key].shape != state_dict[key].shape],
        "of another type": [key for key in both if kind_of_numbers(own[key])
                            != kind_of_numbers(state_dict[key])]}
    if any(problems.values()):
        found = "; ".join(
            f"{len(keys)} {what} ({', '.join([*map(escaped, keys[:3]), '...'][:len(keys)])})"
            for what, keys in problems.items() if keys)
        hint = ""
        if any(".quantizer." in key for key in problems["missing"]):
            hint = ("; a quantizer learns its parameters at the bit-widths that are trained, and "
                    "none at 32 bits: train at bit-widths of 1 to 8, too")
        if any(f".quantizer.{name}." in key for key in problems["unexpected"]
               for name in ("step_dict", "log_step_dict")):
            hint = "; it is of an older lsq, which learned other parameters: train it anew"
        raise FileError(f"{path} does not fit the model: {found}; check --model, --width, "
                        f"--quantizer, --bit_width_list and, by its classes, --dataset{hint}")

    check_finite(state_dict, path)
    versioned = OrderedDict(state_dict)
    versioned._metadata = own._metadata  # which torchvision's MNASNet asks for
    model.load_state_dict(versioned)


def kind_of_numbers(value: Tensor) -> str | torch.dtype:
    """Return what a tensor's values may be copied to: any floating-point type, or their own."""
    return "floating point" if value.is_floating_point() else value.dtype
