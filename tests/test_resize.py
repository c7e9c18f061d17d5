"""A copy of a folder of images with their shorter side at 256 pixels."""
import sys

import pytest
from PIL import Image
from runs import ROOT, assert_one_line

import tiny_data
from engine.errors import UserError

sys.path.append(str(ROOT / "benchmarks"))
import resize_imagenet  # noqa: E402


@pytest.fixture
def source(tmp_path):
    """Six images; those of one class have a shorter side of 60 and 70 pixels."""
    folder = tiny_data.imagenet(tmp_path, classes=("a",)) / "train"
    pixels = Image.effect_noise((300, 400), 50).convert("RGB")
    pixels.save(folder / "a" / "large.JPEG", quality=100)
    return folder


def copy(source, target, *more):
    words = [source, target, "--size", 65, "--processes", 1, *more]
    resize_imagenet.main(resize_imagenet.parse_args([str(word) for word in words]))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.JPEG")}


def test_large_images_are_made_smaller_and_small_ones_stay(source, tmp_path):
    copy(source, tmp_path / "copy")
    found = contents(tmp_path / "copy")
    before = contents(source)
    assert found.keys() == before.keys()
    kept = [path.name for path in before if found[path] == before[path]]
    assert kept == ["a_0.JPEG"]  # of 60 x 80
    for name, size in (("large", (65, 87)), ("a_1", (74, 65))):
        with Image.open(tmp_path / "copy" / "a" / f"{name}.JPEG") as image:
            assert image.size == size and image.format == "JPEG"


def test_a_copy_goes_on_where_it_stopped(source, tmp_path):
    copy(source, tmp_path / "copy")
    before = contents(tmp_path / "copy")
    (tmp_path / "copy" / "a" / "a_0.JPEG").unlink()
    (tmp_path / "copy" / "a" / ".a_0.JPEG.tmp").write_bytes(b"half")
    done = tmp_path / "copy" / "a" / "large.JPEG"
    written = done.stat().st_mtime_ns
    copy(source, tmp_path / "copy")
    assert contents(tmp_path / "copy") == before and done.stat().st_mtime_ns == written
    with pytest.raises(UserError, match="give another folder"):
        copy(source, tmp_path / "copy", "--quality", 80)


def test_images_that_cannot_be_read_are_named_and_the_others_copied(source, tmp_path, capsys):
    (source / "a" / "bad.JPEG").write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 4 images cannot be read, as named above"):
        copy(source, tmp_path / "copy")
    assert_one_line(capsys, f"{source}/a/bad.JPEG is not a readable image")
    assert len(contents(tmp_path / "copy")) == 3


def test_a_copy_within_its_source_is_refused(source):
    for target in (source, source / "copy"):
        with pytest.raises(UserError, match="give a folder outside of it"):
            copy(source, target)
