"""Images of one's own, --dataset folder:PATH: a folder per class, and a split by names."""
import hashlib
import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from dataset.files import DataError, ImageFolder, load_image
from utils import one_line

PREFIX = "folder:"
PARTS = ("train", "val")
VAL_FRACTION = 0.2  # of a folder that is not split


def is_folder(name: str) -> bool:
    """Return whether a data set's name is folder:PATH."""
    return name.startswith(PREFIX)


class ClassFolders(ImageFolder):
    """The images of a folder that holds two or more folders of images, one per class."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the sorted names of the class folders, and {name: index}; hidden ones are none.

        Raises DataError where there are fewer than two, or where an image is in none of them.
        """
        names = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    names.append(entry.name)
                elif has_file_allowed_extension(entry.name, IMG_EXTENSIONS):
                    raise DataError(f"{entry.path} is in no class folder: put one folder of images "
                                    f"per class in {directory}, and no image beside them")
        if not names:
            raise DataError(f"{directory} holds no folders: put one folder of images per class "
                            "there")
        if len(names) == 1:
            raise DataError(f"{directory} holds the folder {names[0]} alone, and a network needs "
                            "two classes or more: put another beside it, or if the classes are "
                            f"in it, give {PREFIX}{os.path.join(directory, names[0])}")
        names.sort()
        return names, {name: index for index, name in enumerate(names)}


def open_folder(root: str | Path, split: str) -> ClassFolders:
    """Open a split, train or val, of a folder of images.

    The folder holds train/ and val/, each with a folder of images per class, or it holds the
    folders of the classes; split_by_name says which of their images are for validation. Raises
    DataError naming a folder that is missing, empty, or neither of the two.
    """
    try:
        parts = [part for part in PARTS if Path(root, part).is_dir()]
        missing = [part for part in (split, "val") if part not in parts]
        if parts and missing:
            raise DataError(f"{root} has {parts[0]}/ but no {missing[0]}/: add it, with a folder "
                            f"of images per class; or if {parts[0]} is a class, rename its folder")
        folder = Path(root, split) if parts else Path(root)
        dataset = ClassFolders(folder, loader=load_image)
    except OSError as error:
        raise DataError(f"{root} is not a folder of images ({one_line(error)}): give --dataset "
                        f"{PREFIX}PATH, whose PATH holds a folder of images per class, or train/ "
                        "and val/ with such folders") from None
    check_flat(dataset)
    if not parts:
        split_by_name(dataset, split)
    return dataset


def check_flat(dataset: ClassFolders) -> None:
    """Raise DataError where images are in folders within a class folder."""
    for path, label in dataset.samples:
        expected = os.path.join(dataset.root, dataset.classes[label])
        folder = os.path.dirname(path)
        if folder != expected:
            raise DataError(f"{folder} holds images within the class folder {expected}: move them "
                            f"there, or if the classes are in that, give {PREFIX}{expected}")


def split_by_name(dataset: ClassFolders, split: str) -> None:
    """Leave a data set the images of its split: about a fifth of each class is for validation.

    An image's own name, with its class, decides, whatever --seed and the other images are: it
    stays in its split where images are added or the folder is moved. Each class has an image at
    least in both splits; raises DataError for a class of one image.
    """
    by_class = [[] for _ in dataset.classes]
    for path, label in dataset.samples:
        by_class[label].append(path)

    held_out = set()
    for name, paths in zip(dataset.classes, by_class):
        if len(paths) < 2:
            raise DataError(f"{os.path.join(dataset.root, name)} holds one image alone, and one is "
                            "needed to train on and one to validate on: add others")
        places = {path: place_of(f"{name}/{os.path.basename(path)}") for path in paths}
        count = sum(place < VAL_FRACTION for place in places.values())
        count = min(max(count, 1), len(paths) - 1)
        held_out.update(sorted(paths, key=places.get)[:count])

    is_val = split == "val"
    dataset.samples = [sample for sample in dataset.samples if (sample[0] in held_out) == is_val]
    dataset.imgs = dataset.samples  # torchvision's other name
    dataset.targets = [label for _, label in dataset.samples]


def place_of(name: str) -> float:
    """Return a number in [0, 1) that a name determines, evenly distributed over names."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
