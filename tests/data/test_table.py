"""Tables of paths and labels, in every form that people have them."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from miniature import PLAIN, picture, trainer
from PIL import Image

from gmarpp.data import Augmentation, Table

WHOLE = Augmentation(scale=(1.0, 1.0), horizontal_flip=0.0)


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        picture(number, (32, 32)).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder, text, name="images.csv"):
    (folder / name).write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")
    return str(folder / name)


def opened(table, stage="fit", module=None, **options):
    data = Table(table, batch_size=2, num_workers=0, preprocessing=PLAIN, augmentation=WHOLE, **options)
    data.trainer = trainer(**(module or {}))
    data.setup(stage)
    return data


def content(data, split):
    dataset = data.datasets[split]
    return {dataset.source.path(row): label.tolist() for row, label in zip(dataset.rows, dataset.labels, strict=True)}


def test_classes_and_splits(folder):
    table = write(folder, """
        path,label,split
        0.png,cat,training
        1.png,ant,training
        2.png,ant,valid
        3.png,cat,valid
        4.png,bee,test
        5.png,,test""")  # fmt: skip
    data = opened(table, only_classes=["ant", "cat"])
    assert data.classes == ("ant", "cat")
    assert content(data, "train") == {"0.png": 1, "1.png": 0}
    assert content(data, "val") == {"2.png": 0, "3.png": 1}
    assert content(opened(table, "test"), "test") == {"4.png": 1, "5.png": -1}
    for split, paths in (("val", ["2.png", "3.png"]), ("test", ["4.png", "5.png"]), ("train", ["0.png", "1.png"])):
        assert list(content(opened(table, "predict", predict_split=split), "predict")) == paths
    with pytest.raises(ValueError, match="predict_split: unknown split 'fold1': choose from train, val, test"):
        opened(table, "predict", predict_split="fold1")
    sample = data.datasets["val"][0]
    assert sample["image"].shape == (3, 16, 16)
    assert isinstance(sample["label"], int)
    with pytest.raises(ValueError, match="no training image of 1 of its 3 classes, the first of them 'bee'"):
        opened(table)


def test_a_share_is_held_out_of_every_class_and_always_the_same(folder):
    rows = [f"{number}.png,{number % 2}" for number in range(6)]
    table = write(folder, "\n".join(["path,label", *rows]))
    data = opened(table, val_share=0.3)
    train, validation = content(data, "train"), content(data, "val")
    assert sorted(validation.values()) == [0, 1]
    assert sorted([*train, *validation]) == [f"{number}.png" for number in range(6)]
    assert content(opened(table, "validate", val_share=0.3), "val") == validation


def test_tables_by_split_in_a_folder(folder):
    for name, row in (("train", "0.png\tcat"), ("dev", "1.png\tcat")):
        write(folder, f"path\tlabel\n{row}", f"{name}.tsv")
    data = opened(str(folder))
    assert (content(data, "train"), content(data, "val")) == ({"0.png": 0}, {"1.png": 0})


@pytest.mark.parametrize("form", ["separator", "rows", "columns", "lists"])
def test_several_labels(folder, form):
    """The same labels in four forms."""
    options = {}
    if form == "separator":
        table = write(folder, "path,label,split\n0.png,a|b,train\n1.png,,train\n2.png,b,train\n3.png,a,val")
        options = {"separator": "|"}
    elif form == "rows":
        rows = "0.png,a,train\n0.png,b,train\n1.png,,train\n2.png,b,train\n3.png,a,val"
        table = write(folder, f"path,label,split\n{rows}")
    elif form == "columns":
        table = write(
            folder, "path,a,b,split\n0.png,1,1.0,train\n1.png,0,false,train\n2.png,0,1,train\n3.png,True,0,val"
        )
        options = {"label_columns": ["a", "b"]}
    else:
        table = str(folder / "images.parquet")
        columns = {"path": [f"{k}.png" for k in range(4)], "label": [["a", "b"], [], ["b"], ["a"]]}
        pq.write_table(pa.table({**columns, "split": ["train"] * 3 + ["val"]}), table)
    data = opened(table, **options)
    assert data.classes == ("a", "b")
    assert content(data, "train") == {"0.png": [1, 1], "1.png": [0, 0], "2.png": [0, 1]}
    batch = next(iter(data.val_dataloader()))
    assert batch["label"].dtype == torch.long
    assert batch["label"].tolist() == [[1, 0]]
    # the network's own order, and a label that the data lacks
    data = opened(table, module={"classes": ("b", "c", "a"), "class_names": ("B", "C", "A")}, **options)
    assert content(data, "train") == {"0.png": [1, -1, 1], "1.png": [0, -1, 0], "2.png": [1, -1, 0]}


def test_unknown_labels_and_values(folder):
    table = write(folder, "path,a,b,age\n0.png,1,,3.5\n1.png,0,-1,4\n2.png,1,0,\n3.png,0,1,6")
    data = opened(table, "validate", label_columns=["b", "a"], val_share=0.9)
    assert content(data, "val")["1.png"] == [-1, 0]
    assert content(data, "val")["2.png"] == [0, 1]
    data = opened(table, "predict", value_columns=["age"], val_share=0.9)
    values = content(data, "predict")
    assert data.classes == ("age",)
    assert math.isnan(values["2.png"][0])
    assert values["1.png"] == [4.0]
    assert data.datasets["predict"][0]["label"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"row \d of train has no label"):
        opened(write(folder, "path,age\n0.png,1\n1.png,\n2.png,", "ages.csv"), value_columns=["age"])


def test_two_classes_of_a_network_with_one_output(folder):
    from types import SimpleNamespace

    table = write(folder, "path,label,split\n0.png,well,train\n1.png,ill,train\n2.png,well,val\n3.png,ill,val")
    network = {"model": SimpleNamespace(task="binary", num_classes=1)}
    data = opened(table, module=network)
    assert data.classes == ("well",), "the latter one"
    assert content(data, "train") == {"0.png": [1], "1.png": [0]}
    data = opened(table, module={**network, "classes": ("ill",)})
    assert data.classes == ("ill",)
    assert content(data, "val") == {"2.png": [0], "3.png": [1]}
    with pytest.raises(ValueError, match="the network's label is 'dead', and the data's classes are 'ill' and 'well'"):
        opened(table, module={**network, "classes": ("dead",)})


def test_boxes_and_masks_move_with_the_image(folder):
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(folder / "mask.png")
    table = write(folder, """
        path,label,x0,y0,x1,y1,mask,split
        0.png,a,0,8,32,24,mask.png,train
        1.png,b,,,,,mask.png,train
        2.png,b,2,4,6,8.5,mask.png,val""")  # fmt: skip
    data = opened(table, box_columns=["x0", "y0", "x1", "y1"], mask_column="mask")
    sample = data.datasets["val"][0]
    assert sample["box"].tolist() == [1, 2, 3, 4.25], "of an image of half the size"
    assert sample["mask"].shape == (16, 16)
    several = write(folder, """
        path,label,x0,y0,x1,y1
        0.png,a,0,8,32,24
        0.png,b,16,0,32,16
        1.png,b,,,,""", "several.csv")  # fmt: skip
    data = opened(several, "validate", box_columns=["x0", "y0", "x1", "y1"], val_share=0.6)
    (sample,) = (each for each in map(data.datasets["val"].__getitem__, range(1)))
    expected = {"0.png": [[0, 4, 16, 12], [8, 0, 16, 8]], "1.png": [[0, 0, 0, 0], [0, 0, 0, 0]]}
    assert sample["box"].tolist() == expected[sample["path"]]


def test_paths_start_from_a_root_with_variables(folder, monkeypatch):
    monkeypatch.setenv("PICTURES", str(folder))
    (folder / "tables").mkdir()
    table = write(folder / "tables", "path\n3.png\n1.png")
    data = opened("$PICTURES/tables/images.csv", "predict", root="$PICTURES")
    assert content(data, "predict") == {"3.png": -1, "1.png": -1}
    assert len(next(iter(data.predict_dataloader()))["image"]) == 2
    with pytest.raises(ValueError, match="train needs labels: there is no column 'label'"):
        opened(table, root=str(folder))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("path,label\n0.png", {}, r"images\.csv, line 2: expected 2 cells, got 1"),
        ("path,path\n0.png,1", {}, "expected a first line of different column names"),
        ("file,label\n0.png,1", {}, "unknown column 'path': choose from file, label"),
        ("path,label\n,1", {}, r"row 1: expected a path in column 'path', got none"),
        ("path,label\n0.png,a", {"classes": ["b"]}, "unknown class 'a' in column 'label': classes has to list it"),
        ("path,a\n0.png,maybe", {"label_columns": ["a"]}, r"column 'a', row 1: expected 1, 0 or nothing, got 'maybe'"),
        ("path,a\n0.png,x", {"value_columns": ["a"]}, r"column 'a', row 1: expected a number, got 'x'"),
        ("path,a\n0.png,1\n0.png,0", {"label_columns": ["a"]}, "expected every path once"),
        ("path,label,split\n0.png,a,test", {}, "train and val and test in column 'split', got test"),
        ("path,label,a,b,c,d\n0.png,a,3,0,2,2", {"box_columns": list("abcd")}, "row 1: expected a box x0 < x1"),
        ("path,label,a,b,c,d\n0.png,x|y,0,0,2,2", {"box_columns": list("abcd"), "separator": "|"}, "1: expected one l"),
        (
            "path,label,a,b,c,d\n0.png,x,0,0,2,2\n0.png,x,1,1,2,2",
            {"box_columns": list("abcd")},
            "row 2: expected one box for each label of an image",
        ),
        ("path,label,split\n0.png,a,train\n0.png,b,val", {}, "row 2: expected one text per image, got 'val'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(folder, text, options, message):
    with pytest.raises(ValueError, match=message):
        opened(write(folder, text), **options)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("absent.csv", FileNotFoundError, r"table .*absent\.csv does not exist"),
        ("0.png", ValueError, r"0\.png: expected a table \(\.csv, \.tsv, \.parquet\)"),
        ("damaged.parquet", ValueError, r"damaged\.parquet cannot be read as a table"),
        ("damaged.csv", ValueError, r"damaged\.csv cannot be read as a table .*UTF-8"),
    ],
)
def test_files_that_are_no_tables(folder, name, error, message):
    (folder / "damaged.parquet").write_bytes(b"PAR1 and nothing")
    (folder / "damaged.csv").write_bytes(b"path,label\n\xff\xfe,1\n")
    with pytest.raises(error, match=message):
        opened(str(folder / name))
