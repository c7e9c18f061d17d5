"""The accuracy of a network at every bit-width, and --evaluate."""
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset.data import DATASETS, Samples
from dataset.loader import Loader
from engine.arguments import FLAGS, MACHINE, TASK, run_name
from engine.device import describe
from engine.distributed import rank, world_size
from engine.errors import Stopped, StopRequest, UsageError, UserError
from engine.figures import evaluation_table, save_evaluation_figure
from engine.forward_pass import ForwardPass
from engine.metrics import Metrics
from engine.resume import Checkpoint, plain
from engine.run_folder import RunFolder, log
from engine.setup import (check_classes, make_forward_pass, make_train_loader, make_val_loader,
                          open_data)
from models import (Assignment, BitWidth, Width, add_assignment, assignments_of, calibrate,
                    highest_first, packed, read_assignments, saved_bit_widths, set_bit_width)
from models.calibration import copies_quantizers, norms_with_statistics
from models.checkpoint import network_content, network_of, save_checkpoint
from models.cost import Costs, totals
from models.losses import check_forward_loss
from utils import flag_text, one_line, progress, without_secrets, write_json


@torch.no_grad()
def evaluate(forward_pass: ForwardPass, loader: Iterable[tuple[Tensor, Tensor]],
             bit_widths: Sequence[Width], device: torch.device,
             what: str = "validation", stop: StopRequest | None = None,
             ) -> dict[Width, dict[str, float]]:
    """Return {bit-width: {"loss", "top1", "top5"}} of forward_pass.model, over all processes.

    stop: a StopRequest; a single process raises Stopped between two batches. Raises UserError,
    beginning with `what`, where a loss is not finite.
    """
    forward_pass.model.eval()
    metrics = Metrics(bit_widths, device)
    with progress(loader, what) as batches:
        for images, labels in batches:
            metrics.add(forward_pass.evaluate(images, labels, bit_widths), labels)
            if stop and stop.received and world_size() == 1:
                raise Stopped(stop.received)
    metrics.check_finite(what)
    return metrics.averages()


def evaluate_checkpoint(args: Namespace, checkpoint: Checkpoint, device: torch.device) -> Path:
    """Evaluate a checkpoint: write evaluation.json, a table and a figure; return the folder."""
    path = checkpoint.path
    content = checkpoint.content
    present = saved_bit_widths(content["state_dict"])
    trained = [bits for bits in present if bits not in (content.get("calibrated") or ())]
    bit_widths = highest_first({*present, *args.bit_width_list})
    if args.save_calibrated and Path(args.save_calibrated).exists():
        raise UserError(f"--save-calibrated {args.save_calibrated} exists: remove it, or give "
                        "another name")

    weights = packed.digest(content["state_dict"], {})
    assignments = given_assignments(args)
    model, added = network_of(content, path, bit_widths)
    added |= add_assignments(model, assignments, args)
    if args.calibrate is not None and not added:
        raise UsageError(f"--calibrate {args.calibrate} adds bit-widths that {path} lacks, and it "
                         f"has {flag_text([*args.bit_width_list, *assignments])}: leave it out, or "
                         "give others")
    train_set, val_set = open_data(args, train=bool(args.calibrate))
    check_classes(model, content, path, args.dataset, val_set)
    model.to(device)
    forward_pass = make_forward_pass(args, model, device)
    if added and args.calibrate:
        norms_with_statistics(model, max(present))  # refuses others before there is a folder
        batches = calibration_batches(args, train_set, forward_pass, device)
        args.calibrate = batches.batch_sampler.stop  # all, where there are fewer
        size = DATASETS[args.dataset].image_size
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with forward_pass.autocast():
            check_forward_loss(model, images.to(device))
    val_loader = make_val_loader(args, val_set, forward_pass.memory_format, device)

    named = {**vars(args), "bit_width_list": plain(trained)}
    name = f"{run_name(Namespace(**named))}_evaluation"
    with RunFolder(args.results_dir, name) as run:
        split = DATASETS[args.dataset].val_split[args.train_split]
        log.info(f"evaluating {path}, {args.model} trained at {flag_text(trained)} bits, on "
                 f"{args.dataset} ({split}) on {describe(device)} in {args.precision}")
        for width, source in added.items():
            message = f"{width}-bit was not trained: using the {source}-bit BatchNorm"
            if isinstance(width, Assignment):
                message = f"{width} was not trained: using the {flag_text(source)}-bit BatchNorms"
            if copies_quantizers(model):
                message += ", quantizers of the nearest bits"
            if args.calibrate:
                with (forward_pass.autocast(),
                      progress(batches, f"calibrating {width}") as shown):
                    calibrate(model, width, (images for images, _ in shown))
                message += f", statistics re-estimated over {args.calibrate} training batches"
            log.info(message)

        wanted = sorted([*highest_first(args.bit_width_list), *assignments_of(model).values()])
        results = evaluate(forward_pass, val_loader, wanted, device)
        add_costs(results, model, DATASETS[args.dataset].image_size)
        if rank() == 0:
            own = {name: value for name, value in vars(args).items() if is_of_evaluation(name)}
            run.write_config(own, device, checkpoint=str(path), weights=weights,
                             epoch=content.get("epoch"),
                             trained_bit_widths=plain(trained),
                             trained_with=without_secrets(content.get("arguments") or {}),
                             assignments=[each.content for each in wanted
                                          if isinstance(each, Assignment)])
            write_json(run.path / "evaluation.json", results)
            log.info("\n%s\n", evaluation_table(results, trained))
            save_evaluation_figure(run.path / "accuracy.png", results, name, trained)
            if args.save_calibrated:
                save_calibrated(args, checkpoint, model, added)
            log.info(run.contents())
    return run.path


def is_of_evaluation(argument: str) -> bool:
    """Return whether an evaluation has this argument: the others are of the training."""
    flag = FLAGS[argument]
    return (flag.evaluated or flag.identifies or flag.kind in (MACHINE, TASK)
            or argument == "pretrain")


def given_assignments(args: Namespace) -> list[Assignment]:
    """Return the assignments of --layer_bits; raises UserError where its file has none."""
    try:
        return read_assignments(args.layer_bits) if args.layer_bits else []
    except ValueError as error:
        raise UserError(f"--layer_bits: {error}") from None


def add_assignments(model: nn.Module, assignments: Iterable[Assignment],
                    args: Namespace) -> dict[Assignment, list[BitWidth]]:
    """Add assignments to a model; return {added one: bit-widths whose BatchNorms it copies}.

    Raises UserError where one does not fit the model, or has the name of another one of it.
    """
    added = {}
    for assignment in assignments:
        known = assignments_of(model).get(assignment.name)
        if known and not known.is_identical(assignment):
            raise UserError(f"--layer_bits: {args.layer_bits}: the checkpoint has another "
                            f"assignment of the name {assignment}: give this one its own")
        if not known:
            try:
                added[assignment] = add_assignment(model, assignment)
                set_bit_width(model, assignment)
                packed.check_stored(model)
            except ValueError as error:
                raise UserError(f"--layer_bits: {args.layer_bits}: {error}") from None
    return added


def add_costs(results: dict[Width, dict[str, float]], model: nn.Module,
              image_size: int) -> None:
    """Add to each bit-width's results what it costs; log why where that is not known."""
    try:
        costs = Costs(model, image_size)
    except ValueError as error:
        log.info(one_line(error))
        return
    for width, values in results.items():
        values.update(totals(costs.of(width)))


def calibration_batches(args: Namespace, train_set: Samples, forward_pass: ForwardPass,
                        device: torch.device) -> Loader:
    """Return a loader of the first --calibrate training batches, or all, the whole of each."""
    loader = make_train_loader(args, train_set, forward_pass.memory_format, device)
    batches = loader.batch_sampler
    batches.rank = 0  # every process reads whole batches
    batches.world_size = 1
    batches.stop = min(args.calibrate, len(loader))
    return loader


def save_calibrated(args: Namespace, checkpoint: Checkpoint, model: nn.Module,
                    added: Iterable[Width]) -> None:
    """Save a checkpoint that also lists which of its bit-widths were calibrated."""
    content = checkpoint.content
    added = [width for width in added if isinstance(width, BitWidth)]
    save_checkpoint(Path(args.save_calibrated), {
        "epoch": None, "best_prec1": None, **content, "model": args.model, "optimizer": None,
        "state_dict": model.state_dict(),
        "calibrated": plain(sorted(map(BitWidth.of, {*(content.get("calibrated") or ()), *added}))),
        "network": network_content(model),
        "arguments": {**{name: getattr(args, name) for name in FLAGS if FLAGS[name].evaluated},
                      **(content.get("arguments") or {}),
                      "bit_width_list": plain(saved_bit_widths(model.state_dict()))}})
    log.info("calibrated checkpoint: %s", args.save_calibrated)
