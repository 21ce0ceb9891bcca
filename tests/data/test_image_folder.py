import os
from pathlib import Path

import numpy as np
import pytest
from miniature import PLAIN, picture
from PIL import Image

from gmarpp.data import ImageFolder


def write(root, *names):
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k, (20, 16)).save(root / name)


def opened(root, stage="predict", **options):
    data = ImageFolder(str(root), preprocessing=PLAIN, num_workers=0, **options)
    data.prepare_data()
    data.setup(stage)
    return data


def samples(dataset):
    return [dataset[k] for k in range(len(dataset))]


def test_any_image_in_the_order_of_paths(tmp_path):
    write(tmp_path, "b.PNG", "a/z.jpg", "a/b/c.JpEg", "a/c.tiff", "d.webp", "e.gif", "f.bmp")
    (tmp_path / "notes.txt").write_text("not an image")
    write(tmp_path, ".hidden/x.png", "._a.png")
    data = opened(tmp_path)
    found = samples(data.datasets["predict"])
    assert [sample["path"] for sample in found] == [
        "a/b/c.JpEg",
        "a/c.tiff",
        "a/z.jpg",
        "b.PNG",
        "d.webp",
        "e.gif",
        "f.bmp",
    ]
    assert {sample["label"] for sample in found} == {-1}
    assert (data.classes, data.class_names) == ((), ())
    assert set(found[0]) == {"image", "label", "index", "path"}


def test_single_image(tmp_path):
    write(tmp_path, "a.png", "b.png")
    (sample,) = samples(opened(tmp_path / "b.png").datasets["predict"])
    assert sample["path"] == "b.png"


def test_nothing_to_explain_is_named(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"photos: expected images .*, got none"):
        opened(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match=r"image folder .*absent does not exist"):
        opened(tmp_path / "absent")


def test_labels_are_needed_to_train(tmp_path):
    write(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"train needs labels: set --data\.labelled true"):
        opened(tmp_path, "fit")
    with pytest.raises(ValueError, match=r"a\.png: expected images in folders named by class"):
        opened(tmp_path, "predict", labelled=True)
    (tmp_path / "a.png").rename(tmp_path / ".a.png")
    write(tmp_path, "cat/a.png")
    with pytest.raises(FileNotFoundError, match=r"has no folder 'train', which fit needs"):
        opened(tmp_path, "fit", labelled=True)


def test_class_folders(tmp_path):
    write(tmp_path, "train/n02124075/1.png", "train/n02124075/deep.png", "train/n01443537/2.png")
    write(tmp_path, "val/n02124075/3.png", "val/n01443537/4.png")
    data = opened(tmp_path, "fit", labelled=True)
    assert data.classes == ("n01443537", "n02124075")
    assert data.class_names == ("goldfish", "Egyptian cat")
    assert [(s["path"], s["label"]) for s in samples(data.datasets["train"])] == [
        ("train/n01443537/2.png", 0),
        ("train/n02124075/1.png", 1),
        ("train/n02124075/deep.png", 1),
    ]
    for stage, name in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        found = samples(opened(tmp_path, stage, labelled=True).datasets[name])
        assert [(s["path"], s["label"]) for s in found] == [("val/n01443537/4.png", 0), ("val/n02124075/3.png", 1)]
    write(tmp_path, "test/n02124075/5.png")
    found = samples(opened(tmp_path, "test", labelled=True).datasets["test"])
    assert [(s["path"], s["label"]) for s in found] == [("test/n02124075/5.png", 1)]


def test_class_folders_without_splits(tmp_path):
    write(tmp_path, "dog/1.png", "cat/2.png")
    data = opened(tmp_path, labelled=True)
    assert (data.classes, data.class_names) == (("cat", "dog"), ("cat", "dog"))
    assert [(s["path"], s["label"]) for s in samples(data.datasets["predict"])] == [("cat/2.png", 0), ("dog/1.png", 1)]


def test_class_missing_from_training(tmp_path):
    write(tmp_path, "train/cat/1.png", "val/cat/2.png", "val/dog/3.png")
    with pytest.raises(ValueError, match=r"unknown class 'dog' in .*val: expected the classes of .*train"):
        opened(tmp_path, "fit", labelled=True)


def write_mask(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((16, 20), np.uint8)
    mask[:rows] = 255
    Image.fromarray(mask).save(path)


def test_masks_by_path_and_by_name(tmp_path):
    write(tmp_path, "a/cat.jpg", "b/cat.jpg", "b/dog.jpg")
    masks = tmp_path / "masks"
    write_mask(masks / "a" / "cat.png", 4)
    write_mask(masks / "b" / "cat.png", 8)
    write_mask(masks / "dog.png", 12)
    found = samples(opened(tmp_path, masks=str(masks)).datasets["predict"])
    assert [sample["path"] for sample in found] == ["a/cat.jpg", "b/cat.jpg", "b/dog.jpg"]  # and no mask
    assert [int(sample["mask"][:, 0].sum()) for sample in found] == [4, 8, 12]
    assert {tuple(sample["mask"].shape) for sample in found} == {(16, 16)}


def test_masks_that_do_not_match_are_named(tmp_path):
    write(tmp_path / "photos", "cat.jpg")
    masks = tmp_path / "masks"
    with pytest.raises(FileNotFoundError, match=r"mask folder .*masks does not exist"):
        opened(tmp_path / "photos", masks=str(masks))
    write_mask(masks / "dog.png", 1)
    with pytest.raises(
        ValueError, match=r"image .*cat\.jpg: expected one mask in .*masks, got none\. Name it cat\.png"
    ):
        opened(tmp_path / "photos", masks=str(masks))
    write_mask(masks / "x" / "cat.png", 1)
    write_mask(masks / "y" / "cat.png", 1)
    with pytest.raises(ValueError, match=r"got 2: x/cat\.png, y/cat\.png"):
        opened(tmp_path / "photos", masks=str(masks))


def test_linked_folders_and_files_are_followed(tmp_path):
    write(tmp_path / "photos", "train/cat/1.png", "val/cat/2.png")
    write(tmp_path / "store", "dog/3.png", "4.png")
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "dog").symlink_to(tmp_path / "store" / "dog")
    (tmp_path / "photos" / "val" / "cat" / "5.png").symlink_to(tmp_path / "store" / "4.png")
    data = opened(tmp_path / "photos", "fit", labelled=True)
    assert data.classes == ("cat", "dog")
    assert sorted((s["path"], s["label"]) for s in samples(data.datasets["val"])) == [
        ("val/cat/2.png", 0),
        ("val/cat/5.png", 0),
        ("val/dog/3.png", 1),
    ]


def test_links_that_lead_back_are_named_and_left_out(tmp_path, caplog):
    write(tmp_path, "a/b/1.png")
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path / "a")
    assert [s["path"] for s in samples(opened(tmp_path).datasets["predict"])] == ["a/b/1.png"]
    assert f"{tmp_path / 'a/b/back'} leads back to {tmp_path / 'a'}" in caplog.text


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    write(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def forbidding(folder):
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("os.scandir", forbidding)
    with pytest.raises(PermissionError, match=r"folder cannot be read \(Permission denied\): .*: '.*/b'"):
        opened(tmp_path)


def test_results_below_the_root_are_left_out(tmp_path, caplog):
    write(tmp_path, "1.png", "results/photos/overlays/rollout/1.png", "results/photos/comparison.png", "results/2.png")
    (tmp_path / "results" / "photos" / "maps").mkdir()
    (tmp_path / "results" / "photos" / "run.json").write_text('{"status": "complete"}')
    assert [s["path"] for s in samples(opened(tmp_path).datasets["predict"])] == ["1.png", "results/2.png"]
    assert f"{tmp_path / 'results/photos'} holds the results of a predict run: it is left out" in caplog.text
    with pytest.raises(ValueError, match="holds the results of a predict run, not images to explain"):
        opened(tmp_path / "results" / "photos")


def test_what_is_no_file_is_refused_without_opening_it(tmp_path):
    write(tmp_path, "1.png")
    os.mkfifo(tmp_path / "bad.jpg")
    with pytest.raises(ValueError, match=r"bad\.jpg is a named pipe, expected a file: remove or rename it"):
        opened(tmp_path)
    (tmp_path / "bad.jpg").unlink()
    (tmp_path / "bad.jpg").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"bad\.jpg is a device"):
        opened(tmp_path)
    (tmp_path / "bad.jpg").unlink()
    (tmp_path / "bad.jpg").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"bad\.jpg is a link to nowhere, which does not exist"):
        opened(tmp_path)


def test_paths_are_expanded(tmp_path, monkeypatch):
    write(tmp_path, "photos/1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PHOTOS", "photos")
    for root in ("~/photos", "$HOME/${PHOTOS}"):
        assert len(opened(root).datasets["predict"]) == 1
    with pytest.raises(ValueError, match=r"\$ABSENT/photos names the environment variable \$ABSENT, which is not set"):
        opened("$ABSENT/photos")
