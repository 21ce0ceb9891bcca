import io
import os
from itertools import islice

import datasets
import lightning as L
import numpy as np
import pyarrow.parquet
import pytest
import torch
from miniature import PLAIN, WNIDS, picture, tiny_imagenet, trainer
from PIL import Image
from quiet_trainer import quiet_trainer

from gmarpp.callbacks import ExplanationWriter
from gmarpp.data import Augmentation, HubDataset, TinyImageNet
from gmarpp.training.module import ViTClassifier
from gmarpp.training.optim import Optimization

SORTED = sorted(WNIDS)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # seconds that the library waits for its threads after each pass over a shuffled stream
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
    datasets.disable_progress_bars()


def parquet(folder, rows, label=None, columns=("image", "label")):
    """Writes one split per name: rows of encoded image (or Pillow's) and label."""
    folder.mkdir(exist_ok=True)
    files = {}
    features = datasets.Features(
        {columns[0]: datasets.Image(), columns[1]: label or datasets.ClassLabel(names=list(SORTED))}
    )
    for split, content in rows.items():
        images = [
            {"bytes": image if isinstance(image, bytes) else encoded(image), "path": None} for image, _ in content
        ]
        table = {columns[0]: images, columns[1]: [value for _, value in content]}
        files[split] = str(folder / f"{split}.parquet")
        datasets.Dataset.from_dict(table, features=features).to_parquet(files[split])
    return files


def encoded(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def opened(files, *stages, **options):
    data = HubDataset("parquet", data_files=files, preprocessing=PLAIN, num_workers=0, **options)
    data.prepare_data()
    for stage in stages:
        data.setup(stage)
    return data


def ten(start=0):
    return [(picture(start + k, (20, 16)), k % 3) for k in range(10)]


def test_same_images_and_labels_as_the_folder(tmp_path):
    root = tiny_imagenet(tmp_path, train=5)
    folder = TinyImageNet(str(tmp_path), preprocessing=PLAIN, num_workers=0, split="train", selection_fraction=0)
    folder.setup("predict")
    folder.setup("validate")
    rows = {
        split: [((root / sample["path"]).read_bytes(), sample["label"]) for sample in folder.datasets[name]]
        for split, name in (("train", "predict"), ("valid", "val"))
    }
    hub = opened(parquet(tmp_path / "hub", rows), "validate", "predict", predict_split="train")
    assert hub.classes == folder.classes
    assert hub.class_names == folder.class_names
    for name in ("val", "predict"):
        pairs = list(zip(folder.datasets[name], hub.datasets[name], strict=True))
        assert len(pairs) in (6, 15)
        for theirs, ours in pairs:
            assert torch.equal(theirs["image"], ours["image"])
            assert (theirs["label"], theirs["index"]) == (ours["label"], ours["index"])


def test_batches(tmp_path):
    data = opened(parquet(tmp_path / "hub", {"train": ten(), "valid": ten(50)}), "fit", batch_size=4)
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {"image", "label", "index", "path"}
    assert set(batch["path"]) <= {f"valid/{k}" for k in range(10)}
    assert sum(len(batch["label"]) for batch in data.train_dataloader()) == 8


def test_classes_and_images_can_be_chosen(tmp_path):
    files = parquet(tmp_path / "hub", {"train": ten(), "valid": ten(50)})
    data = opened(files, "fit", only_classes=[SORTED[2]], images_per_class=2)
    assert data.classes == (SORTED[2],)
    assert [sample["path"] for sample in data.datasets["train"]] == ["train/2", "train/5"]
    assert {sample["label"] for sample in data.datasets["val"]} == {0}


def test_slices_of_a_split(tmp_path):
    files = parquet(tmp_path / "hub", {"train": ten()})
    data = opened(files, "fit", train_split="train[:80%]", val_split="train[80%:]")
    assert (len(data.datasets["train"]), len(data.datasets["val"])) == (8, 2)


def test_other_columns_and_text_labels(tmp_path):
    text = [(image, ("zebra", "ant", "bee")[label]) for image, label in ten()]
    files = parquet(tmp_path / "hub", {"train": text[:9], "valid": text[:2]}, datasets.Value("string"), ("img", "what"))
    data = opened(files, "fit", "validate", image_column="img", label_column="what")
    assert data.classes == ("ant", "bee", "zebra")
    assert [sample["label"] for sample in data.datasets["val"]] == [2, 0]


def test_text_outside_the_classes_is_named_unless_all_are_given(tmp_path):
    text = [(image, ("zebra", "ant", "bee")[label]) for image, label in ten()]
    files = parquet(
        tmp_path / "hub", {"train": text, "valid": text, "test": [(text[0][0], "wasp")]}, datasets.Value("string")
    )
    with pytest.raises(ValueError, match=r"row test/0: expected one of 3 classes as label, got 'wasp': set classes"):
        opened(files, "test", test_split="test")
    data = opened(files, "test", test_split="test", classes=["wasp", "zebra", "bee", "ant"])
    assert data.classes == ("wasp", "zebra", "bee", "ant")
    assert [sample["label"] for sample in data.datasets["test"]] == [0]


def test_numbers_need_their_classes(tmp_path):
    files = parquet(tmp_path / "hub", {"valid": ten()}, datasets.Value("int64"))
    with pytest.raises(ValueError, match="column 'label' of parquet does not name its classes: set classes"):
        opened(files, "validate")
    data = opened(files, "validate", classes=["x", "y", "z"])
    assert data.classes == ("x", "y", "z")
    assert [sample["label"] for sample in data.datasets["val"]] == [k % 3 for k in range(10)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("value", "row"), [(3, 2), (7, 2), (-2, 2)])
def test_labels_outside_the_classes_are_named(tmp_path, value, row, streaming):
    """Labels from 1 to 3 for three names, for example: the last one must not be taken for unknown."""
    rows = [(picture(k), label) for k, label in enumerate([1, 2, value])]
    files = parquet(tmp_path / "hub", {"valid": rows}, datasets.Value("int64"))
    with pytest.raises(ValueError, match=rf"row.*{row}.*label.* {value}"):
        list(opened(files, "validate", classes=["x", "y", "z"], streaming=streaming).val_dataloader())


def test_missing_labels_are_unknown_and_fractions_refused(tmp_path):
    files = parquet(tmp_path / "hub", {"valid": [(picture(0), None), (picture(1), 2)]}, datasets.Value("int64"))
    data = opened(files, "validate", classes=["x", "y", "z"])
    assert [sample["label"] for sample in data.datasets["val"]] == [-1, 2]
    files = parquet(tmp_path / "other", {"valid": [(picture(0), 0.5)]}, datasets.Value("float64"))
    with pytest.raises(ValueError, match=r"row valid/0: expected a whole number as label, got 0\.5"):
        opened(files, "validate", classes=["x", "y", "z"])


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_do_not_choose_files_outside_of_the_data(tmp_path, streaming):
    secret = tmp_path / "secret.png"
    picture(0, (16, 16)).save(secret)
    names = [str(secret), f"file://{secret}", "http://127.0.0.1:9/a.png", "hub/../secret.png"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(SORTED))})
    for k, name in enumerate(names):
        table = {"image": [{"bytes": None, "path": name}], "label": [0]}
        file = str(tmp_path / f"{k}.parquet")
        # The library's own writer would store the file's content.
        pyarrow.parquet.write_table(datasets.Dataset.from_dict(table, features=features).data.table, file)
        data = opened({"valid": file}, "validate", streaming=streaming)
        with pytest.raises(ValueError, match=r"row valid/0 names .*, which is outside the data"):
            next(iter(data.datasets["val"]))


def test_linked_folders_that_the_library_leaves_out_are_refused(tmp_path):
    for name in ("photos/validation/ant/1.png", "store/bee/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(tmp_path / name)
    (tmp_path / "photos" / "validation" / "bee").symlink_to(tmp_path / "store" / "bee")
    with pytest.raises(ValueError, match=r"validation/bee is a linked folder, .* use --data ImageFolder"):
        HubDataset(str(tmp_path / "photos"), val_split="validation", preprocessing=PLAIN).prepare_data()


def test_expected_classes_are_checked(tmp_path):
    files = parquet(tmp_path / "hub", {"valid": ten()})
    opened(files, "validate", classes=SORTED)
    with pytest.raises(
        ValueError, match=r"expected 3, number 1 being \['n07920052'\], got 3, number 1 being \['n02124075'\]"
    ):
        opened(files, "validate", classes=[SORTED[0], SORTED[2], SORTED[1]])
    with pytest.raises(ValueError, match=r"expected 2, number 2 being \[\], got 3, number 2 being"):
        opened(files, "validate", classes=SORTED[:2])


def test_unsorted_classes_are_reported(tmp_path, caplog):
    files = parquet(tmp_path / "hub", {"valid": ten()}, datasets.ClassLabel(names=["b", "a", "c"]))
    assert opened(files, "validate").classes == ("b", "a", "c")
    assert "not sorted" in caplog.text


def test_gray_and_unlabeled(tmp_path):
    files = parquet(tmp_path / "hub", {"valid": [(Image.new("L", (20, 16), 51), -1)]})
    sample = opened(files, "predict").datasets["predict"][0]
    assert sample["label"] == -1
    assert torch.allclose(sample["image"], torch.full((3, 16, 16), 0.2))


def test_image_folder_of_the_library(tmp_path):
    for name in ("train/cat/1.png", "train/ant/2.png", "validation/cat/3.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(tmp_path / "photos" / name)
    data = HubDataset(str(tmp_path / "photos"), val_split="validation", preprocessing=PLAIN, num_workers=0)
    data.setup("fit")
    assert data.classes == ("ant", "cat")
    assert [sample["label"] for sample in data.datasets["train"]] in ([0, 1], [1, 0])
    assert data.datasets["val"][0]["path"].endswith("3.png")


def test_what_is_wrong_is_named(tmp_path):
    files = parquet(tmp_path / "hub", {"train": ten()})
    with pytest.raises(ValueError, match=r"split 'valid' of 'parquet' \(.*\) cannot be loaded: .*\['train'\]"):
        opened(files)
    with pytest.raises(ValueError, match="'parquet': unknown column 'picture': choose from image, label"):
        opened(files, val_split="train", image_column="picture")
    with pytest.raises(OSError, match=r"dataset '.*absent' cannot be loaded"):
        HubDataset(str(tmp_path / "absent"), preprocessing=PLAIN).prepare_data()
    damaged = opened(parquet(tmp_path / "bad", {"valid": [(b"text", 0)]}), "predict").datasets["predict"]
    with pytest.raises(ValueError, match="image valid/0 cannot be read"):
        damaged[0]


def streamed(files, stage, rank=0, world_size=1, workers=0, max_steps=100, **options):
    data = HubDataset("parquet", data_files=files, preprocessing=PLAIN, num_workers=workers, streaming=True, **options)
    data.trainer = trainer(world_size, rank)
    data.trainer.max_steps = max_steps
    data.prepare_data()
    data.setup(stage)
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_evaluation_sees_every_row_once(tmp_path, workers):
    files = parquet(tmp_path / "hub", {"train": ten(), "valid": ten(50)})
    local = opened(files, "predict").datasets["predict"]
    found = {}
    for rank in range(2):
        data = streamed(files, "predict", rank, 2, workers, batch_size=2)
        for batch in data.predict_dataloader():
            for index, image, label in zip(
                batch["index"].tolist(), batch["image"], batch["label"].tolist(), strict=True
            ):
                assert index not in found
                found[index] = label
                assert torch.equal(image, local[index]["image"])
    assert found == {k: k % 3 for k in range(10)}


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_training_is_shuffled_shared_and_augmented(tmp_path, workers):
    rows = [(Image.fromarray(np.full((16, 16, 3), k, np.uint8)), k % 3) for k in range(40)]
    files = parquet(tmp_path / "hub", {"train": rows, "valid": rows[:3]})
    plain = Augmentation(scale=(1, 1), horizontal_flip=0)
    epochs = []
    ranks = [streamed(files, "fit", rank, 2, workers, batch_size=1, augmentation=plain, seed=4) for rank in range(2)]
    loaders = [data.train_dataloader() for data in ranks]
    for _ in range(2):
        # on several ranks a stream has no end
        orders = [
            [round(batch["image"][0, 0, 0, 0].item() * 255) for batch in islice(loader, 20)] for loader in loaders
        ]
        assert sorted(orders[0] + orders[1]) == list(range(40))
        epochs.append(orders)
    assert epochs[0] != epochs[1]
    assert epochs[0][0] != sorted(epochs[0][0])


def test_streamed_classes_can_be_chosen_but_not_counted(tmp_path):
    files = parquet(tmp_path / "hub", {"train": ten(), "valid": ten(50)})
    data = streamed(files, "predict", only_classes=[SORTED[1]])
    assert [(sample["label"], sample["index"]) for sample in data.datasets["predict"]] == [(0, 1), (0, 4), (0, 7)]
    with pytest.raises(ValueError, match="images_per_class cannot be used with streamed"):
        streamed(files, "fit", images_per_class=1)


def test_streamed_text_labels(tmp_path):
    text = [(image, ("zebra", "ant", "bee")[label]) for image, label in ten()]
    files = parquet(tmp_path / "hub", {"train": text, "valid": text[:3]}, datasets.Value("string"))
    data = streamed(files, "validate", classes=["zebra", "ant", "bee"])
    assert [sample["label"] for sample in data.datasets["val"]] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"expected one of 2 classes as label, got 'zebra'"):
        list(streamed(files, "validate", classes=["ant", "bee"]).datasets["val"])
    with pytest.raises(ValueError, match="does not name its classes: set classes"):
        streamed(files, "validate")


@pytest.mark.parametrize("workers", [0, 2])
def test_no_rank_runs_out_of_a_stream_first(tmp_path, workers):
    rows = [(Image.fromarray(np.full((16, 16, 3), k, np.uint8)), k % 3) for k in range(7)]
    files = parquet(tmp_path / "hub", {"train": rows, "valid": rows[:3]})
    for rank, share in ((0, 4), (1, 3)):
        loader = streamed(files, "fit", rank, 2, workers, batch_size=1).train_dataloader()
        indices = [batch["index"].item() // (2 * max(1, workers)) for batch in islice(loader, 9)]
        assert indices == [k % share for k in range(9)]


def test_a_stream_without_end_needs_a_limit(tmp_path):
    files = parquet(tmp_path / "hub", {"train": ten(), "valid": ten(50)})
    with pytest.raises(ValueError, match=r"no end on 2 ranks, .*--trainer\.max_steps, or --trainer\.limit_train"):
        streamed(files, "fit", world_size=2, max_steps=-1).train_dataloader()
    data = streamed(files, "fit", world_size=2, max_steps=-1)
    data.trainer.limit_train_batches = 3
    data.train_dataloader()
    assert len(list(streamed(files, "fit", max_steps=-1, batch_size=4).train_dataloader())) == 2


def test_schedule_of_a_streamed_run_needs_a_number_of_steps(tmp_path):
    files = parquet(tmp_path / "hub", {"train": ten(), "valid": ten(50)})

    def fit(**limits):
        run = quiet_trainer(tmp_path, enable_checkpointing=False, **limits)
        optimizer = Optimization(lr=1e-3)
        network = ViTClassifier("test_vit", 3, 32, pretrained=False, model_args={"depth": 2}, optimizer=optimizer)
        run.fit(network, HubDataset("parquet", data_files=files, num_workers=0, batch_size=4, streaming=True))
        return run

    run = fit(max_steps=3)
    assert run.global_step == 3
    # two thirds down the half cosine
    assert run.callback_metrics["train/lr"].item() == pytest.approx(0.25e-3)
    with pytest.raises(ValueError, match=r"streamed data has no length and needs --trainer\.max_steps"):
        fit(max_epochs=2)


def test_files_that_rows_name_below_a_folder_of_data(tmp_path):
    """Relative to the folder, with all links resolved, and from nowhere else."""
    picture(0, (16, 16)).save(tmp_path / "secret.png")
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    picture(1, (16, 16)).save(folder / "images" / "1.png")
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    names = [
        "images/1.png",
        str(folder / "images" / "1.png"),
        "../secret.png",
        "images/link.png",
        "/etc/hostname",
        None,
    ]
    images = [name and {"bytes": None, "path": name} for name in names]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(SORTED))})
    table = {"image": images, "label": [0] * len(names)}
    # The library's own writer would store the files' content.
    pyarrow.parquet.write_table(
        datasets.Dataset.from_dict(table, features=features).data.table, folder / "train.parquet"
    )
    data = HubDataset(str(folder), val_split="train", preprocessing=PLAIN, num_workers=0)
    data.setup("validate")
    dataset = data.datasets["val"]
    expected = torch.from_numpy(np.array(picture(1, (16, 16)))).permute(2, 0, 1) / 255
    assert torch.allclose(dataset[0]["image"], expected)
    assert torch.allclose(dataset[1]["image"], expected)
    for row in (2, 3, 4):
        with pytest.raises(ValueError, match=rf"row train/{row} names .*, which is outside the data"):
            dataset[row]
    with pytest.raises(ValueError, match="row train/5: expected an image"):
        dataset[5]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", ["cut", "text", "pipe"])
def test_damaged_data_files_are_named(tmp_path, damage, streaming):
    files = parquet(tmp_path / "hub", {"valid": ten()})
    path = tmp_path / "hub" / "valid.parquet"
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b"text")
    with pytest.raises((ValueError, OSError), match=r"valid\.parquet"):
        list(opened(files, "validate", streaming=streaming).datasets["val"])


def test_results_and_pipes_below_a_local_folder_are_refused(tmp_path):
    for name in ("validation/ant/1.png", "validation/bee/2.png", "results/overlays/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(tmp_path / name)
    data = HubDataset(str(tmp_path), val_split="validation", preprocessing=PLAIN)
    (tmp_path / "results" / "run.json").touch()
    with pytest.raises(ValueError, match="results holds the results of a predict run, not images"):
        data.prepare_data()
    (tmp_path / "results" / "run.json").unlink()
    os.mkfifo(tmp_path / "validation" / "ant" / "4.png")
    with pytest.raises(ValueError, match=r"ant/4\.png is a named pipe"):
        data.setup("validate")


@pytest.mark.parametrize("streaming", [False, True])
def test_training_images_need_labels(tmp_path, streaming):
    files = parquet(tmp_path / "hub", {"train": [*ten(), (picture(3), -1)], "valid": ten()})
    with pytest.raises(ValueError, match=r"row .*(has no label|expected a label)"):
        list(opened(files, "fit", streaming=streaming, batch_size=1).train_dataloader())


def test_streamed_images_are_not_explained_before_anything_is_written(tmp_path):
    class Explaining(L.LightningModule):
        def predict_step(self, batch, batch_idx):
            raise AssertionError

    files = parquet(tmp_path / "hub", {"valid": ten()})
    data = HubDataset("parquet", data_files=files, preprocessing=PLAIN, num_workers=0, streaming=True)
    run = quiet_trainer(tmp_path, callbacks=[ExplanationWriter(tmp_path / "results")])
    with pytest.raises(ValueError, match=r"streamed images have no numbers .*--data\.streaming false"):
        run.predict(Explaining(), data, return_predictions=False)
    assert not (tmp_path / "results").exists()


def test_shuffle_buffer_out_of_range():
    with pytest.raises(ValueError, match=r"^data: shuffle_buffer: expected a number of at least 1, got 0"):
        HubDataset(shuffle_buffer=0)


def test_paths_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HUB", "hub")
    parquet(tmp_path / "hub", {"valid": ten()})
    files = {"valid": "$HOME/${HUB}/valid.parquet"}
    assert len(opened(files, "validate", cache_dir="~/other").datasets["val"]) == 10
    assert (tmp_path / "other").is_dir()
