"""Damaged and hostile data: each ends in samples, or in an error that names the file."""

import io
import shutil
import zipfile

import numpy as np
import pytest
from miniature import PLAIN, picture, tiny_imagenet
from PIL import Image

from gmarpp.data import ImageFolder, TinyImageNet

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000")


def damaged(content, generator):
    """Cut, flip, overwrite, repeat or replace a part of some bytes."""
    content = bytearray(content)
    place = int(generator.integers(len(content)))
    match generator.integers(6):
        case 0:
            del content[place:]
        case 1:
            for at in generator.integers(len(content), size=3):
                content[at] ^= 1 << generator.integers(8)
        case 2:
            content[place : place + 8] = generator.bytes(8)
        case 3:
            content[place:place] = content[: len(content) // 2]
        case 4:
            content[:32] = generator.bytes(32)
        case 5:
            content[place : place + 4] = b"\xff\xff\xff\xff"
    return bytes(content)


def outcome(name, act):
    """Return "read", or "refused" for an error that names the file; anything else is a failure."""
    try:
        act()
    except (ValueError, OSError) as error:
        if name not in str(error):
            raise AssertionError(f"the error does not name {name}") from error
        return "refused"
    return "read"


def count_images(folder, cases, seed=0):
    generator, counts = np.random.default_rng(seed), {"read": 0, "refused": 0}
    for case in range(cases):
        file_format = FORMATS[case % len(FORMATS)]
        buffer = io.BytesIO()
        picture(case, (24, 16)).save(buffer, format=file_format)
        # The suffix does not matter: what a file is follows from its content.
        (folder / "case.png").write_bytes(damaged(buffer.getvalue(), generator))
        data = ImageFolder(str(folder), preprocessing=PLAIN, num_workers=0)
        data.setup("predict")
        counts[outcome("case.png", lambda data=data: data.datasets["predict"][0])] += 1
    return counts


def count_annotations(folder, cases, seed=0):
    generator, counts = np.random.default_rng(seed), {"read": 0, "refused": 0}
    root = tiny_imagenet(folder / "made", train=2, val=1)
    files = [root / "wnids.txt", root / "words.txt", root / "val" / "val_annotations.txt"]
    files += sorted(root.glob("train/*/*_boxes.txt"))
    for case in range(cases):
        file = files[case % len(files)]
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, generator))

        def act():
            data = TinyImageNet(str(root), preprocessing=PLAIN, num_workers=0)
            data.setup("fit")
            data.setup("validate")

        counts[outcome("tiny-imagenet-200", act)] += 1
        file.write_bytes(whole)
    return counts


def count_archives(folder, cases, seed=0):
    generator, counts = np.random.default_rng(seed), {"read": 0, "refused": 0}
    shutil.make_archive(str(folder / "whole"), "zip", tiny_imagenet(folder / "made", train=2, val=1).parent)
    whole = (folder / "whole.zip").read_bytes()
    for _ in range(cases):
        (folder / "case.zip").write_bytes(damaged(whole, generator))

        def act():
            data = TinyImageNet(
                str(folder / "case.zip"), preprocessing=PLAIN, num_workers=0, extract_to=str(folder / "out")
            )
            data.prepare_data()
            data.setup("validate")

        try:
            counts[outcome("", act)] += 1
        finally:
            shutil.rmtree(folder / "out", ignore_errors=True)
    return counts


def test_images(tmp_path):
    counts = count_images(tmp_path, 240)
    assert min(counts.values()) > 20


def test_annotations(tmp_path):
    assert min(count_annotations(tmp_path, 40).values()) > 2


def test_archives(tmp_path):
    assert min(count_archives(tmp_path, 20).values()) > 0


def test_archive_that_unfolds_beyond_the_disk(tmp_path):
    """A small archive whose directory promises more than there is room for is refused before anything is written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", b"\0" * 100)
    content = bytearray(buffer.getvalue())
    place = content.index(b"PK\x01\x02") + 24
    content[place : place + 4] = (2**32 - 2).to_bytes(4, "little")
    (tmp_path / "bomb.zip").write_bytes(content)
    data = TinyImageNet(str(tmp_path / "bomb.zip"), preprocessing=PLAIN)
    with pytest.raises((ValueError, OSError), match=r"bomb\.zip"):
        data.prepare_data()
    assert not (tmp_path / "tiny-imagenet-200").exists()


def test_picture_that_unfolds_beyond_the_limit(tmp_path):
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    data = ImageFolder(str(tmp_path), preprocessing=PLAIN)
    data.setup("predict")
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read \(12000 x 12000 pixels are more than"):
        data.datasets["predict"][0]
