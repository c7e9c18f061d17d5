"""Train one network that runs at any precision.

Yu et al., "Any-Precision Deep Neural Networks", AAAI 2021 (arXiv 1911.07346).

    python train.py                                              # svhnq on digits, 1 to 32 bits
    python train.py --loss hard --bit_width_list 2               # a dedicated 2-bit model
    python train.py --resume results/RUN                         # continue where that run stopped
    torchrun --standalone --nproc-per-node 4 train.py ...        # on four GPUs
    python train.py --evaluate --pretrain results/RUN            # its accuracy at every bit-width
    python train.py --evaluate --pretrain results/RUN --bit_width_list 3,5 --calibrate 20
    python train.py --evaluate --pretrain results/RUN --layer_bits mix.json --calibrate 20
"""
if __name__ == "__main__":
    from engine.startup import prepare_process
    prepare_process()

import bisect
import math
import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dataset.data import Samples
from dataset.loader import Loader, count_classes, fingerprint
from engine.arguments import (DEFAULTS, MACHINE, SCHEDULE, arguments_of, flag_name, parse_flags,
                              run_name)
from engine.console import Console, fitted
from engine.cuda_graph import GraphStep
from engine.device import choose_device, describe
from engine.distributed import (any_process, broadcast_buffers, broadcast_parameters,
                                check_same, exchange_gradients, local_rank_zero_first,
                                processes, rank, world_size)
from engine.errors import Stopped, StopRequest, run_program
from engine.evaluation import evaluate, evaluate_checkpoint
from engine.figures import best_and_last, save_training_figure
from engine.forward_pass import ForwardPass, choose_precision
from engine.output import go_on_without_output
from engine.resume import Checkpoint, resolve, start_from
from engine.run_folder import RunFolder, log
from engine.setup import (check_class_names, describe_images, initialize_model,
                          make_forward_pass, make_model, make_optimizer, make_train_loader,
                          make_val_loader, open_data, parameter_groups, synchronize_batch_norm)
from engine.state import TrainingState, seed_generators
from models import BitWidth, highest_first, layer_table
from models.converted import AnyPrecisionNetwork
from utils import flag_text, without_secrets, write_text


TO_VALIDATE = " to validate on"  # ends what a run's data says of its validation split


def main(flags: Namespace) -> Path:
    """Train or evaluate by the flags of parse_flags; return the results folder."""
    given = Namespace(**{**DEFAULTS, **vars(flags)})
    device = choose_device(given.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for helper threads, such as one that pins memory
    with processes(device, given.timeout):
        with local_rank_zero_first():  # the first may have to download the checkpoint
            args, checkpoint = resolve(flags)
        own = {flag_name(name): flag_text(value) for name, value in vars(args).items()
               if name not in arguments_of(MACHINE)}
        epoch = checkpoint and checkpoint.content.get("epoch")
        check_same({**own, "the epoch to go on with": epoch})
        args.precision = choose_precision(args.precision, device)

        seed_generators(args.seed)
        if args.evaluate:
            return evaluate_checkpoint(args, checkpoint, device)

        unused = ["lr_decay"] if args.schedule == "cosine" else []
        defaulted = [name for name in arguments_of(SCHEDULE) if name not in (*vars(flags), *unused)]
        return train(args, checkpoint, device, () if checkpoint else defaulted)


def train(args: Namespace, checkpoint: Checkpoint | None, device: torch.device,
          defaulted: Sequence[str] = ()) -> Path:
    """Train, from a Checkpoint if there is one; return the results folder.

    defaulted: arguments left to their defaults, which the log names.
    """
    state, forward_pass, train_loader, val_loader = make_run(args, device)
    check_same({f"the data's {name}": value for name, value in state.data.items()})
    message = load_initial_state(state, args, checkpoint, forward_pass, train_loader)
    in_place = checkpoint is not None and checkpoint.in_place
    hooked = state.check_rebuilt() if rank() == 0 and not in_place else None
    if args.sync_bn and world_size() > 1:  # in place, once rank 0 alone has run the network
        synchronize_batch_norm(state.model, device)
    step = partial(take_step, state, forward_pass, args.loss)
    if args.cuda_graph:
        step = GraphStep(step, state.optimizer, args.batch_size, device)

    with RunFolder(args.results_dir, run_name(args), in_place, args.save_every) as run:
        if in_place and rank() == 0:  # now that no other run writes to the folder
            checkpoint.check_unchanged()
        go_on_without_output(f"training goes on; its log is in {run.path}")
        run.begin(state.epoch, vars(args), state.best)
        if state.epoch < args.epochs or not in_place:  # else this run trains nothing
            run.write_config(vars(args), device)
        log_run_info(args, device, state, run, message, defaulted, len(train_loader))
        if hooked:
            log.info(f"note: {hooked} has a hook or a forward of its own: no checkpoint holds it")
        if not in_place:
            run.save(state)  # fails now, not after an hour, where it cannot be saved
        console = Console(state.bit_widths, args.epochs, len(train_loader), args.print_freq,
                          rank() == 0 and sys.stdout.isatty())
        with StopRequest() as stop:
            try:
                for epoch in range(state.epoch, args.epochs):
                    factor = learning_rate_factor(args, epoch)
                    for group in state.optimizer.param_groups:
                        group["lr"] = group["initial_lr"] * factor
                    train_metrics, speed = train_one_epoch(
                        state, train_loader, step, console, run, stop)
                    broadcast_buffers(state.model)
                    if world_size() > 1:
                        run.save(state)  # several processes do not stop within the validation
                    val_metrics = evaluate(forward_pass, val_loader, state.bit_widths, device,
                                           f"epoch {epoch + 1}, validation", stop)
                    improved = state.finish_epoch(val_metrics)
                    record = {"epoch": epoch + 1, "lr": args.lr * factor,
                              "images_per_second": speed, "train": train_metrics,
                              "val": val_metrics}
                    run.log_epoch(record)
                    console.row(record)
                    run.save(state, best=improved)
            except Stopped as stopped:
                console.close()
                broadcast_buffers(state.model)
                run.save(state)
                where = f"in epoch {state.epoch + 1}, after step {state.metrics.steps} of "
                where += f"{len(train_loader)}; to go on: {run.command_to_resume()}"
                raise Stopped(stopped.number, where) from None

        finish(run, run_name(args), args.best_by)
    return run.path


def take_step(state: TrainingState, forward_pass: ForwardPass, loss: str, images: Tensor,
              labels: Tensor, bit_widths: Sequence[BitWidth],
              loss_scale: float) -> dict[BitWidth, tuple[Tensor, Tensor]]:
    """Train on a batch; return what forward_pass.backward returns."""
    state.optimizer.zero_grad()
    results = forward_pass.backward(images, labels, bit_widths, loss, loss_scale)
    exchange_gradients(state.model.parameters())
    state.optimizer.step()
    return results


def train_one_epoch(state: TrainingState, loader: Loader, step: Callable, console: Console,
                    run: RunFolder,
                    stop: StopRequest) -> tuple[dict[BitWidth, dict[str, float]], float]:
    """Train the rest of an epoch; return its metrics per bit-width, and images/s.

    step: (images, labels, bit_widths, loss_scale) -> results. Raises Stopped between two steps,
    with several processes at log points alone.
    """
    model = state.model
    metrics = state.metrics
    settings = state.arguments

    model.train()
    batches = loader.batch_sampler
    batches.epoch = state.epoch
    batches.start = metrics.steps
    began = time.perf_counter()
    for images, labels in loader:
        fraction = len(labels) / batches.size(metrics.steps)  # of the batch of all processes
        bit_widths = choose_bit_widths(state.bit_widths, settings["widths_per_step"],
                                       settings["seed"], state.epoch, metrics.steps)
        results = step(images, labels, bit_widths, fraction)
        metrics.add(results, labels)

        log_point = metrics.steps % console.print_freq == 0 or metrics.steps == len(batches)
        if log_point:
            metrics.check_finite(f"epoch {state.epoch + 1}, training")  # synchronizes
        metrics.seconds += time.perf_counter() - began
        console.step(state.epoch, metrics)
        if log_point or world_size() == 1:
            asked, due = any_process([stop.received is not None, run.save_is_due()])
            if asked:
                raise Stopped(stop.received)
            if due:
                broadcast_buffers(model)
                run.save(state)
        began = time.perf_counter()

    totals = metrics.state_dict()
    return metrics.averages(), totals["count"] / totals["seconds"]


def make_run(args: Namespace,
             device: torch.device) -> tuple[TrainingState, ForwardPass, Loader, Loader]:
    """Return a new TrainingState, its ForwardPass, and the loaders to train and to validate."""
    train_set, val_set = open_data(args)
    classes = count_classes(args.dataset, train_set, val_set)
    model = make_model(args, args.bit_width_list, classes).to(device)
    if rank() > 0:
        seed_generators(args.seed + 1_000_003 * rank())  # same weights as rank 0, other dropout
    forward_pass = make_forward_pass(args, model, device)
    train_loader = make_train_loader(args, train_set, forward_pass.memory_format, device)
    val_loader = make_val_loader(args, val_set, forward_pass.memory_format, device)
    optimizer = make_optimizer(args, parameter_groups(model, args))
    bit_widths = sorted(highest_first(args.bit_width_list))
    state = TrainingState(model, optimizer, bit_widths, device, without_secrets(vars(args)),
                          train_loader.batch_sampler.num_samples,
                          describe_images(args.dataset, train_set),
                          fingerprints(train_set, val_set))
    return state, forward_pass, train_loader, val_loader


def fingerprints(train_set: Samples, val_set: Samples) -> dict[str, int | str]:
    """Return what tells a run's data from others, on which it is not resumed."""
    own = {f"{name}{TO_VALIDATE}": value for name, value in fingerprint(val_set).items()}
    return {**fingerprint(train_set), **own}


def load_initial_state(state: TrainingState, args: Namespace, checkpoint: Checkpoint | None,
                       forward_pass: ForwardPass, train_loader: Loader) -> str | None:
    """Restore the checkpoint, or load --pretrain and return a message for the log.

    All processes start with rank 0's network.
    """
    message = None
    quantizers_are_new = not checkpoint
    if checkpoint:
        check_class_names(checkpoint.content, checkpoint.path, state.images)
        state.restore(checkpoint.path, checkpoint.content)
        if not checkpoint.in_place:  # the other folder's best is not in this one
            state.best = (-math.inf, -math.inf)
            state.best_prec1 = -math.inf
    elif args.pretrain:
        message, quantizers_are_new = start_from(state, args.pretrain)

    if quantizers_are_new:
        initialize_model(state.model, forward_pass, train_loader, state.bit_widths)
    broadcast_parameters(state.model)
    broadcast_buffers(state.model)
    return message


def log_run_info(args: Namespace, device: torch.device, state: TrainingState, run: RunFolder,
                 message: str | None, defaulted: Sequence[str], steps_per_epoch: int) -> None:
    """Log what is trained, on what device, from which state and into which folder."""
    loss = args.loss if len(args.bit_width_list) > 1 else "hard"
    several = f", {world_size()} processes" if world_size() > 1 else ""
    log.info(f"{args.model} on {args.dataset} ({args.train_split}), "
             f"{flag_text(args.bit_width_list)} bits, {loss} loss, on {describe(device)}{several}")
    schedule = "cosine" if args.schedule == "cosine" else "constant"
    if args.lr_decay:
        schedule = f"/ 10 after {flag_text(args.lr_decay)}"
    log.info(fitted(
        f"epochs {args.epochs}, steps per epoch {steps_per_epoch}, batch size {args.batch_size}, "
        f"{args.optimizer}, lr {args.lr:g} ({schedule}), weight decay {args.weight_decay:g}, "
        f"width {args.width}, quantizer {args.quantizer}, precision {args.precision}, "
        f"seed {args.seed}"))
    if defaulted:
        defaults = [f"{flag_name(name)} {flag_text(getattr(args, name))}" for name in defaulted]
        log.info(fitted("not set, so by default: " + "  ".join(defaults)))
    if message:
        log.info(message)
    if all(state.data.get(f"{name}{TO_VALIDATE}") == value for name, value in state.data.items()
           if not name.endswith(TO_VALIDATE)):
        log.info("note: the images to validate on are those to train on")
    if rank() == 0 and isinstance(state.model, AnyPrecisionNetwork):
        table = layer_table(state.model)
        write_text(run.path / "layers.md", f"{table}\n")
        log.info("layers, also in layers.md:\n\n%s\n", table)
    if state.epoch > args.start_epoch or state.metrics.steps or args.resume:
        done = f"{state.epoch} of {args.epochs} epochs"
        if state.metrics.steps:
            done += f" and {state.metrics.steps} of {steps_per_epoch} steps"
        nothing = "" if state.epoch < args.epochs else "; nothing is left to train (--epochs)"
        log.info(f"resuming: {done} done, in {run.path}{nothing}")
    else:
        log.info(f"writing to {run.path}")


def learning_rate_factor(args: Namespace, epoch: int) -> float:
    """Return the factor of the learning rates in an epoch, counted from 0.

    It depends on nothing else, so that a resumed run continues it. A cosine's is above 0 in the
    last epoch too.
    """
    if args.schedule == "cosine":
        return (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    return 0.1 ** bisect.bisect_right(args.lr_decay, epoch)


def choose_bit_widths(bit_widths: list[BitWidth], count: int | None, seed: int, epoch: int,
                      step: int) -> list[BitWidth]:
    """Return the bit-widths that a step trains: the highest, the lowest, count - 2 between them.

    count: None for all. They depend on the arguments alone, so that all processes and a resumed run
    choose the same, and other random numbers are unaffected.
    """
    if count is None or count >= len(bit_widths):
        return list(bit_widths)
    lowest, *between, highest = sorted(bit_widths)
    generator = random.Random(f"{seed} {epoch} {step}")
    return [lowest, *generator.sample(between, count - 2), highest]


def finish(run: RunFolder, name: str, best_by: str) -> None:
    """Save the run's figure, and log its best and last accuracy."""
    if rank() > 0:
        return
    if run.history:  # none where a finished run is resumed in another folder
        log.info("\n%s\n", best_and_last(run.history, best_by))
        save_training_figure(run.path / "accuracy.png", run.history, name, best_by)
    log.info(run.contents())


if __name__ == "__main__":
    run_program(main, partial(parse_flags, description=__doc__.splitlines()[0]))
