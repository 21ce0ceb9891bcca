"""Damaged and hostile data: each ends in samples, or in an error that names the file."""

import io
import shutil
import zipfile

import datasets
import numpy as np
import pytest
from miniature import PLAIN, picture, tiny_imagenet
from PIL import Image

from gmarpp.data import HubDataset, ImageFolder, TinyImageNet
from gmarpp.data.row_images import RowImages

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


def outcome(act, *names):
    """Return "read", or "refused" for an error that names the file; anything else is a failure."""
    try:
        act()
    except (ValueError, OSError) as error:
        if not any(name in str(error) for name in names):
            raise AssertionError(f"{error!r} names none of {names}") from error
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
        counts[outcome(lambda data=data: data.datasets["predict"][0], "case.png")] += 1
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

        counts[outcome(act, "tiny-imagenet-200")] += 1
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
            counts[outcome(act, "case.zip", "tiny-imagenet-200")] += 1
        finally:
            shutil.rmtree(folder / "out", ignore_errors=True)
    return counts


def count_tables(folder, cases, seed=0):
    generator, counts = np.random.default_rng(seed), {"read": 0, "refused": 0}
    contents = []
    for k in range(3):
        buffer = io.BytesIO()
        picture(k, (24, 16)).save(buffer, format="PNG")
        contents.append({"bytes": buffer.getvalue(), "path": f"{k}.png"})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_dict({"image": contents, "label": [0, 1, 2]}, features=features).to_parquet(folder / "whole")
    whole = (folder / "whole").read_bytes()
    for _ in range(cases):
        (folder / "case.parquet").write_bytes(damaged(whole, generator))

        def act():
            files = {"valid": str(folder / "case.parquet")}
            data = HubDataset("parquet", data_files=files, preprocessing=PLAIN, num_workers=0, streaming=True)
            data.setup("validate")
            assert len(list(data.datasets["val"])) <= 3

        counts[outcome(act, "case.parquet", "valid/", "0.png", "1.png", "2.png")] += 1
    return counts


def count_rows(folder, cases, seed=0):
    generator, counts = np.random.default_rng(seed), {"read": 0, "refused": 0}
    picture(0).save(folder / "1.png")
    content = (folder / "1.png").read_bytes()
    paths = [
        *(None, "", "1.png", "absent.png", "../1.png", "/etc/passwd", "/dev/zero", ".", "a" * 300, "\0", "\ud800"),
        *("file:///etc/passwd", "zip://1.png::/etc/passwd", "zip://a::hf://datasets/x/y@main/b.zip", "::", "://", "~"),
        *("http://127.0.0.1:9/1.png", "hf://datasets/x/y@main/../z", "memory://1.png", "local://1.png", "\n"),
    ]
    values = [None, b"", content, content[:50], b"text"]
    images = RowImages([str(folder)], listed=False), RowImages([str(folder)], listed=True)
    for case in range(cases):
        path, value = paths[generator.integers(len(paths))], values[generator.integers(len(values)) * (case % 3 == 0)]
        row = {"bytes": value, "path": path} if case % 20 else [None, 3, "1.png", {}][generator.integers(4)]
        names = ("valid/7", path or "valid/7")
        counts[outcome(lambda row=row, case=case: images[case % 2].read(row, "valid/7"), *names)] += 1
    return counts


def test_tables(tmp_path):
    assert min(count_tables(tmp_path, 30).values()) > 2


def test_rows(tmp_path):
    assert min(count_rows(tmp_path, 200).values()) > 10


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
    with pytest.raises(
        ValueError, match=r"bomb\.png cannot be read \(expected at most .* pixels .*, got 12000 x 12000"
    ):
        data.datasets["predict"][0]
