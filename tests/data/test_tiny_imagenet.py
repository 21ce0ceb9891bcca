import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import PLAIN, tiny_imagenet
from PIL import Image

from gmarpp.data import Preprocessing, TinyImageNet
from gmarpp.data import tiny_imagenet as module

SORTED = ("n01443537", "n02124075", "n07920052")


def opened(root, *stages, **options):
    data = TinyImageNet(str(root), **{"preprocessing": PLAIN, "num_workers": 0, **options})
    data.prepare_data()
    for stage in stages:
        data.setup(stage)
    return data


def paths(dataset):
    return [dataset[k]["path"] for k in range(len(dataset))]


@pytest.mark.parametrize("root", [".", "tiny-imagenet-200"])
def test_classes_are_sorted_and_named(tmp_path, root):
    tiny_imagenet(tmp_path)
    data = opened(tmp_path / root, "validate")
    assert data.classes == SORTED
    assert data.class_names == ("goldfish", "Egyptian cat", "espresso")


def test_validation_images_labels_and_boxes(tmp_path):
    root = tiny_imagenet(tmp_path)
    dataset = opened(tmp_path, "validate", preprocessing=Preprocessing((64, 64), (0, 0, 0), (1, 1, 1))).datasets["val"]
    assert paths(dataset) == [f"val/images/val_{k}.JPEG" for k in range(6)]
    # val_0 is of the first line of wnids.txt, n02124075, which is second when sorted
    assert [dataset[k]["label"] for k in range(6)] == [1, 0, 2, 1, 0, 2]
    assert dataset[0]["box"].tolist() == [0, 32, 45, 63]
    gray = np.asarray(Image.open(root / "val" / "images" / "val_0.JPEG"))
    assert gray.ndim == 2
    assert torch.equal((dataset[0]["image"] * 255).round(), torch.tensor(gray, dtype=torch.float32).expand(3, 64, 64))


def test_training_boxes_belong_to_their_images(tmp_path):
    tiny_imagenet(tmp_path, train=12)
    preprocessing = Preprocessing((64, 64), (0, 0, 0), (1, 1, 1))
    dataset = opened(tmp_path, "predict", split="train", selection_fraction=0, preprocessing=preprocessing).datasets[
        "predict"
    ]
    assert paths(dataset) == sorted(paths(dataset))
    assert len(dataset) == 36
    for sample in (dataset[k] for k in range(36)):
        wnid, k = Path(sample["path"]).stem.split("_")
        assert sample["path"].startswith(f"train/{wnid}/images/")
        assert sample["label"] == SORTED.index(wnid)
        assert sample["box"].tolist() == [int(k), int(k) + 1, int(k) + 11, int(k) + 21]


def test_stages_report_on_the_official_split_and_fit_selects_on_another(tmp_path):
    tiny_imagenet(tmp_path, train=10)
    data = opened(tmp_path, "fit", selection_fraction=0.2)
    train, selection = paths(data.datasets["train"]), paths(data.datasets["val"])
    assert len(train) == 24
    assert Counter(path.split("/")[1] for path in selection) == dict.fromkeys(SORTED, 2)
    assert not set(train) & set(selection)
    assert "box" in data.datasets["val"][0]
    assert "box" not in data.datasets["train"][0]
    data = opened(tmp_path, "validate", "test", "predict")
    for name in ("val", "test", "predict"):
        assert paths(data.datasets[name]) == [f"val/images/val_{k}.JPEG" for k in range(6)]


def test_selection_is_the_same_in_every_run_whatever_the_other_classes(tmp_path):
    tiny_imagenet(tmp_path, train=10)

    def selected(**options):
        return set(paths(opened(tmp_path, "fit", selection_fraction=0.3, **options).datasets["val"]))

    assert selected() == selected()
    assert selected() != selected(selection_seed=1)
    cats = {path for path in selected() if "n02124075" in path}
    assert selected(only_classes=["n02124075"]) == cats
    # a part of the data without the first class
    (tmp_path / "tiny-imagenet-200" / "wnids.txt").write_text("n02124075\nn07920052\n")
    assert {path for path in selected() if "n02124075" in path} == cats


def test_no_selection_validates_on_the_official_split(tmp_path):
    tiny_imagenet(tmp_path)
    data = opened(tmp_path, "fit", selection_fraction=0)
    assert len(data.datasets["train"]) == 12
    assert sorted(paths(data.datasets["val"])) == [f"val/images/val_{k}.JPEG" for k in range(6)]


def test_one_image_per_class_is_kept_for_training(tmp_path):
    tiny_imagenet(tmp_path, train=2)
    data = opened(tmp_path, "fit", selection_fraction=0.9)
    assert (len(data.datasets["train"]), len(data.datasets["val"])) == (3, 3)


def test_unlabeled_test_split(tmp_path):
    tiny_imagenet(tmp_path)
    sample = opened(tmp_path, "predict", split="test").datasets["predict"][0]
    assert (sample["label"], sample["path"]) == (-1, "test/images/test_0.JPEG")
    assert "box" not in sample


def test_zip_that_the_user_has(tmp_path):
    tiny_imagenet(tmp_path / "made")
    shutil.make_archive(str(tmp_path / "mine"), "zip", tmp_path / "made")
    content = (tmp_path / "mine.zip").read_bytes()
    assert len(opened(tmp_path / "mine.zip", "validate").datasets["val"]) == 6
    assert (tmp_path / "tiny-imagenet-200" / "wnids.txt").is_file()
    opened(tmp_path / "mine.zip", "fit", extract_to=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "tiny-imagenet-200" / "wnids.txt").is_file()
    assert (tmp_path / "mine.zip").read_bytes() == content


def test_zip_is_extracted_once(tmp_path):
    tiny_imagenet(tmp_path / "made")
    shutil.make_archive(str(tmp_path / "mine"), "zip", tmp_path / "made")
    opened(tmp_path / "mine.zip")
    (tmp_path / "tiny-imagenet-200" / "mark").touch()
    opened(tmp_path / "mine.zip")
    assert (tmp_path / "tiny-imagenet-200" / "mark").exists()


def test_download(tmp_path, monkeypatch):
    tiny_imagenet(tmp_path / "made")
    archive = Path(shutil.make_archive(str(tmp_path / "remote"), "zip", tmp_path / "made"))
    monkeypatch.setattr(module, "URL", archive.as_uri())
    with pytest.raises(FileNotFoundError, match=r"new neither is nor holds a folder tiny-imagenet-200 .*download"):
        opened(tmp_path / "new")
    with pytest.raises(ValueError, match=r"remote\.zip arrived damaged"):
        opened(tmp_path / "new", download=True)
    monkeypatch.setattr(module, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(opened(tmp_path / "new", "validate", download=True).datasets["val"]) == 6
    archive.unlink()
    opened(tmp_path / "new", "validate", download=True)


FISH, CAT, CUP = (f"train/{wnid}" for wnid in SORTED)
BOXES, ANNOTATIONS = f"{FISH}/{SORTED[0]}_boxes.txt", "val/val_annotations.txt"


@pytest.mark.parametrize(
    ("stage", "file", "edit", "message"),
    [
        ("fit", CAT, None, r"class n02124075 of .*wnids\.txt has no folder"),
        ("fit", f"{FISH}/images/n01443537_2.JPEG", None, r"n01443537_2\.JPEG is missing.*line 3"),
        ("fit", f"{CUP}/n07920052_boxes.txt", None, r"n07920052_boxes\.txt is missing"),
        ("fit", f"{CUP}/images/extra.JPEG", ("", ""), r"extra\.JPEG is not listed in"),
        ("fit", BOXES, ("\t11\t21", "\t11"), r"n01443537_boxes\.txt, line 2: expected file, x0"),
        ("fit", BOXES, ("\t11\t21", "\t-1\t21"), r"line 2: expected"),
        ("fit", BOXES, ("\t1\t2\t11", "\t12\t2\t11"), r"line 2: expected"),
        ("validate", ANNOTATIONS, ("n07920052", "n00000001"), r"line 3: unknown class 'n00000001': expected one of"),
        ("validate", ANNOTATIONS, ("val_4", "val_3"), r"val_3\.JPEG is missing, or listed twice.*line 5"),
        ("validate", ANNOTATIONS, ("\t44", ""), r"val_annotations\.txt, line 1: expected file, class, x0"),
        ("validate", ANNOTATIONS, None, r"val_annotations\.txt is missing"),
        ("validate", "words.txt", None, r"words\.txt is missing"),
    ],
)
def test_what_is_wrong_with_the_files_is_named(tmp_path, stage, file, edit, message):
    path = tiny_imagenet(tmp_path) / file
    if edit is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        text = path.read_text() if path.exists() else ""
        assert edit[0] in text
        path.write_text(text.replace(*edit, 1))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(tmp_path, stage)


def test_splits_that_are_not_needed_may_be_missing(tmp_path):
    root = tiny_imagenet(tmp_path)
    shutil.rmtree(root / "train")
    opened(tmp_path, "validate", "test", "predict")


def test_selection_fraction_out_of_range():
    with pytest.raises(ValueError, match="selection_fraction"):
        TinyImageNet(selection_fraction=1.0)


def test_corrected_archive_is_not_hidden_by_what_was_extracted(tmp_path):
    def archive(images):
        root = tiny_imagenet(tmp_path / f"made{images}", train=images)
        shutil.make_archive(str(tmp_path / "tiny"), "zip", root.parent)

    archive(3)
    opened(tmp_path / "tiny.zip", "fit")
    opened(tmp_path / "tiny.zip", "fit")  # extracted before, from the same archive
    archive(4)
    with pytest.raises(ValueError, match=r"200 was extracted from another archive than the current .*tiny\.zip"):
        opened(tmp_path / "tiny.zip", "fit")
    shutil.rmtree(tmp_path / "tiny-imagenet-200")
    data = opened(tmp_path / "tiny.zip", "fit", selection_fraction=0)
    assert len(data.datasets["train"]) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"wnids\.txt: expected the names of classes, got none"),
        (b"n01443537\n\nn01443537\n", r"wnids\.txt, line 3: .* each once, got 'n01443537'"),
        (b"n01443537\n../../secret\n", r"wnids\.txt, line 2: expected the name of a folder, each once, got '\.\./"),
        (b"/etc\n", r"wnids\.txt, line 1: expected the name of a folder"),
        (b"n01\x00\n", r"wnids\.txt, line 1: expected the name of a folder"),
        (b"\xff\xfe\n", r"wnids\.txt cannot be read: .*utf-8"),
        (b"n" * 2000, r"wnids\.txt cannot be read: expected at most 0 MiB"),
    ],
)
def test_names_of_classes_are_names_of_folders(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 1000)
    (tiny_imagenet(tmp_path) / "wnids.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, "fit")


def test_pipes_and_unreadable_folders_are_named(tmp_path, monkeypatch):
    root = tiny_imagenet(tmp_path)
    (root / "val" / "val_annotations.txt").unlink()
    os.mkfifo(root / "val" / "val_annotations.txt")
    with pytest.raises(ValueError, match=r"val_annotations\.txt is a named pipe"):
        opened(tmp_path, "validate")
    (root / CAT / "images" / "n02124075_0.JPEG").unlink()
    os.mkfifo(root / CAT / "images" / "n02124075_0.JPEG")
    with pytest.raises(ValueError, match=r"n02124075_0\.JPEG is a named pipe"):
        opened(tmp_path, "fit")
    scandir = os.scandir

    def forbidding(folder):
        if str(folder).endswith("n01443537/images"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("os.scandir", forbidding)
    with pytest.raises(PermissionError, match=r"folder cannot be read \(Permission denied\).*n01443537/images"):
        opened(tmp_path, "fit")


def test_linked_classes_are_followed(tmp_path):
    root = tiny_imagenet(tmp_path)
    (tmp_path / "store").mkdir()
    (root / CAT).rename(tmp_path / "store" / "cats")
    (root / CAT).symlink_to(tmp_path / "store" / "cats")
    assert len(opened(tmp_path, "fit", selection_fraction=0).datasets["train"]) == 12


@pytest.mark.parametrize(("option", "value"), [("selection_seed", -1), ("selection_fraction", -0.1)])
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=rf"^data: {option}: expected a number in .*, got {value}"):
        TinyImageNet(**{option: value})


def test_unknown_split():
    with pytest.raises(ValueError, match="unknown split 'valid': choose from val, train, selection, test"):
        TinyImageNet(split="valid")


def test_paths_are_expanded(tmp_path, monkeypatch):
    tiny_imagenet(tmp_path / "made")
    shutil.make_archive(str(tmp_path / "mine"), "zip", tmp_path / "made")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    opened("~/mine.zip", "validate", extract_to="$SCRATCH/data")
    assert (tmp_path / "scratch" / "data" / "tiny-imagenet-200" / "wnids.txt").is_file()
