"""Copy a folder of images with their shorter side at 256 pixels, which decode in half the time.

    python benchmarks/resize_imagenet.py data/imagenet /fast/imagenet
    ./train_imagenet.sh --data-dir /fast

All images keep their names and folders, smaller ones their bytes. The same command again goes on
where it stopped. Images that cannot be read are named, and left out.
"""
import json
import multiprocessing
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

from reference_way import ROOT  # noqa: F401  first: it adds the project to the path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from dataset.files import DataError, list_images, load_image
from engine.arguments import OneLineParser, number
from engine.errors import UserError, run_program
from utils import progress, replacing, write_json

SETTINGS = "resized.json"  # what the copy was made with


def resize(path, source, target, size, quality):
    """Make the copy of an image, unless it is there; return why it cannot be read, or None."""
    copy = Path(target, os.path.relpath(path, source))
    if copy.exists():
        return None
    try:
        image = load_image(path)
    except DataError as error:
        return str(error)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with replacing(copy) as temporary:
        shorter = min(image.size)
        if shorter <= size:
            shutil.copyfile(path, temporary)
        else:
            width, height = (max(size, round(side * size / shorter)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            image.save(temporary, "JPEG", quality=quality)
    return None


def images_of(folder):
    """Return the paths of all images in a folder, in any depth."""
    found = list_images(str(folder), IMG_EXTENSIONS, ())
    return [os.path.join(inner, name) for inner, names in sorted(found) for name in names]


def check_target(options):
    """Raise UserError where the copy would lie in its source, or was begun with other settings."""
    source = Path(options.source).resolve()
    target = Path(options.target).resolve()
    if not source.is_dir():
        raise UserError(f"{options.source} is no folder: give one of images, such as data/imagenet")
    if source == target or source in target.parents:
        raise UserError(f"{options.target} lies in {options.source}: give a folder outside of it")
    settings = {"shorter side": options.size, "JPEG quality": options.quality}
    target.mkdir(parents=True, exist_ok=True)
    if not (target / SETTINGS).exists():
        write_json(target / SETTINGS, settings)
    try:
        before = json.loads((target / SETTINGS).read_text())
    except ValueError:
        before = "damaged"
    if before != settings:
        raise UserError(f"{target / SETTINGS} is {before}, and this copy would be {settings}: give "
                        "another folder")


def main(options):
    check_target(options)
    paths = images_of(options.source)
    copy = partial(resize, source=options.source, target=options.target, size=options.size,
                   quality=options.quality)
    unreadable = []
    with multiprocessing.Pool(options.processes, signal.signal,
                              (signal.SIGINT, signal.SIG_IGN)) as pool:
        with progress(paths, "resizing") as shown:
            for path, problem in zip(shown, pool.imap(copy, paths, chunksize=16)):
                if problem:
                    unreadable.append(path)
                    print(problem, file=sys.stderr)
    print(f"{len(paths) - len(unreadable):,} images in {options.target}, shorter side "
          f"{options.size} pixels or less, JPEG quality {options.quality}")
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(paths):,} images cannot be read, as named "
                        "above: replace them, and give the same command again")


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("source", help="folder of images, in any depth")
    parser.add_argument("target", help="folder of the copy")
    parser.add_argument("--size", type=number(int, 1), default=256, help="pixels, shorter side")
    parser.add_argument("--quality", type=number(int, 1, 95), default=95, help="of the JPEG files")
    parser.add_argument("--processes", type=number(int, 1), default=os.cpu_count())
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
