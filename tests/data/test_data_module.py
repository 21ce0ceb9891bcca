import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from miniature import PLAIN, tiny_imagenet, trainer

from gmarpp.data import Augmentation, ImageDataModule, Preprocessing, TinyImageNet
from gmarpp.data.chosen_batches import chosen_batches
from gmarpp.data.dataset import Record


class Points:
    def read(self, row):
        return Record(torch.full((3, 16, 16), row, dtype=torch.uint8), str(row))


class PointData(ImageDataModule):
    """Twelve samples of three classes in turn."""

    def read_classes(self):
        return ("ant", "bee", "cat"), ("Ant", "Bee", "Cat")

    def read_split(self, split):
        return Points(), np.arange(12) % 3


def points(stage="fit", attached=None, **options):
    data = PointData(**{"preprocessing": PLAIN, "num_workers": 0, "batch_size": 4, **options})
    data.trainer = attached
    data.setup(stage)
    return data


def pairs(dataset):
    """Labels and paths, by path."""
    return sorted((int(sample["path"]), sample["label"]) for sample in (dataset[k] for k in range(len(dataset))))


def test_batch():
    batch = next(iter(points("predict").predict_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].tolist() == [0, 1, 2, 0]
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert batch["path"] == ["0", "1", "2", "3"]
    assert set(batch) == {"image", "label", "index", "path"}


@pytest.mark.parametrize(
    ("device", "given", "expected"), [("cpu", None, 32), ("cuda", None, 2**24 // (3 * 16 * 16)), ("cuda", 4, 4)]
)
def test_a_gpu_explains_as_many_images_at_a_time_as_suit_it_unless_told(monkeypatch, device, given, expected):
    gpu = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    strategy = SimpleNamespace(root_device=torch.device(device), broadcast=lambda size: size)
    run = SimpleNamespace(strategy=strategy, world_size=1, global_rank=0, num_devices=1, lightning_module=None)
    data = points("predict", attached=run, batch_size=given)
    assert data.predict_dataloader().batch_size == expected
    assert data.batch_size == (given or 32)


class CustomLoader(PointData):
    def predict_dataloader(self):
        return torch.utils.data.DataLoader(self.datasets["predict"], batch_size=12)


@pytest.mark.parametrize("kind", [PointData, CustomLoader])
def test_predicted_images_come_in_chosen_batches(kind):
    data = kind(preprocessing=PLAIN, num_workers=0, batch_size=4)
    data.setup("predict")
    before, asked = dict(vars(data)), []

    def choose(loader):
        asked.append(len(loader.dataset))
        return [[7, 2], [11]]

    with chosen_batches(data, choose):
        assert asked == [], "what to load is chosen when the loader is asked for"
        batches = [batch["path"] for batch in data.predict_dataloader()]
        assert (batches, asked) == ([["7", "2"], ["11"]], [12])
    assert vars(data) == before
    assert len(data.predict_dataloader().dataset) == 12
    assert next(iter(data.predict_dataloader()))["path"][:2] == ["0", "1"]


def test_only_classes_are_renumbered():
    data = points(only_classes=["cat", "ant"])
    assert (data.classes, data.class_names) == (("ant", "cat"), ("Ant", "Cat"))
    assert pairs(data.datasets["val"]) == [(k, k % 3 // 2) for k in range(12) if k % 3 != 1]
    assert points(only_classes=2).classes == ("ant", "bee")


def test_images_per_class_limits_training_only():
    data = points(images_per_class=2)
    assert pairs(data.datasets["train"]) == [(k, k % 3) for k in range(6)]
    assert len(data.datasets["val"]) == 12


def test_first_selection_images_are_of_many_classes():
    class Sorted(PointData):
        def read_split(self, split):
            return Points(), np.repeat([0, 1, 2], 100)

    data = Sorted(preprocessing=PLAIN, num_workers=0)
    data.setup("fit")
    assert set(data.datasets["val"].labels[:16]) == {0, 1, 2}
    data.setup("validate")
    assert set(data.datasets["val"].labels[:16]) == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only_classes": ["ant", "bees"]}, r"no class 'bees'; the closest of its ids is 'bee'"),
        ({"only_classes": 4}, r"only_classes=4, but the data has 3 classes"),
        ({"batch_size": 0}, r"batch_size"),
        ({"images_per_class": 0}, r"images_per_class"),
        ({"preprocessing": None}, r"PointData needs preprocessing="),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        points(**options)


def test_preprocessing_is_the_networks():
    other = Preprocessing((8, 8), (0, 0, 0), (1, 1, 1))
    data = points(attached=trainer(preprocessing=other), preprocessing=None)
    assert data.datasets["val"][0]["image"].shape == (3, 8, 8)
    data.trainer = trainer(preprocessing=PLAIN)
    data.setup("fit")
    assert data.datasets["val"][0]["image"].shape == (3, 16, 16)
    data = points(attached=trainer(preprocessing=other), preprocessing=PLAIN)
    assert data.datasets["val"][0]["image"].shape == (3, 16, 16)


def test_labels_follow_the_classes_that_the_network_knows():
    network = trainer(classes=("zebra", "cat", "ant", "bee"), class_names=("Zebra", "Cat", "Ant", "Bee"))
    data = points("predict", attached=network, only_classes=["ant", "cat"])
    assert data.classes == ("zebra", "cat", "ant", "bee")
    assert data.class_names == ("Zebra", "Cat", "Ant", "Bee")
    assert pairs(data.datasets["predict"]) == [(k, {0: 2, 2: 1}[k % 3]) for k in range(12) if k % 3 != 1]


def test_class_unknown_to_the_network():
    with pytest.raises(ValueError, match=r"does not know class 'bee' of the data \(1 of 3 are unknown"):
        points(attached=trainer(classes=("ant", "cat"), class_names=("Ant", "Cat")))


def test_number_of_classes_must_be_the_networks():
    points(attached=trainer(model=torch.nn.Identity()))
    network = torch.nn.Identity()
    network.num_classes = 3
    points(attached=trainer(model=network))
    with pytest.raises(ValueError, match="the data has 2 classes, but the network has 3 outputs"):
        points(attached=trainer(model=network), only_classes=2)


def test_class_without_training_images_is_named(monkeypatch):
    monkeypatch.setattr(PointData, "read_split", lambda self, split: (Points(), np.arange(12) % 2))
    with pytest.raises(ValueError, match=r"no training image of 1 of its 3 classes, the first of them 'cat': add"):
        points()
    assert points("validate").classes == ("ant", "bee", "cat")
    assert points(only_classes=2).classes == ("ant", "bee")
    # a network of more classes may be trained on some of them
    assert points(only_classes=2, attached=trainer(classes=("ant", "bee", "cat"))).classes == ("ant", "bee", "cat")


def test_fewer_images_than_ranks():
    points(attached=trainer(world_size=12))
    with pytest.raises(ValueError, match="12 images for train, fewer than the 13 ranks"):
        points(attached=trainer(world_size=13))


def test_ranks_share_the_images():
    def seen(name, world_size):
        loaders = []
        for rank in range(world_size):
            data = points("fit", attached=trainer(world_size, rank))
            loaders.append(getattr(data, f"{name}_dataloader")())
        return sorted(index for loader in loaders for batch in loader for index in batch["index"].tolist())

    for world_size in (1, 2, 5):
        assert seen("val", world_size) == list(range(12))
    assert seen("train", 3) == list(range(12))
    # shares of two images, the last two of the shuffle being left out
    assert len(set(seen("train", 5))) == 10


def test_incomplete_training_batches_are_left_out_unless_nothing_else_is_there():
    assert [len(batch["label"]) for batch in points(batch_size=5).train_dataloader()] == [5, 5]
    assert [len(batch["label"]) for batch in points(batch_size=64).train_dataloader()] == [12]


def test_epochs_differ_in_order_and_seeds_too():
    def order(epoch, seed):
        loader = points(seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [index for batch in loader for index in batch["index"].tolist()]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(epoch, seed)) for epoch in (0, 1) for seed in (1, 2)}) == 4


def test_seed_everything_decides_without_a_seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert points().order_seed == 17
    assert points(seed=3).order_seed == 3


def test_augmentation_does_not_depend_on_the_number_of_processes(tmp_path):
    tiny_imagenet(tmp_path)

    def images(workers):
        data = TinyImageNet(
            str(tmp_path),
            preprocessing=PLAIN,
            augmentation=Augmentation(policy="randaugment", erasing=0.5),
            num_workers=workers,
            batch_size=3,
            seed=5,
        )
        data.setup("fit")
        return [batch["image"] for batch in data.train_dataloader()]

    torch.manual_seed(1)
    alone = images(0)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(alone, images(2), strict=True))


def test_datasets_are_picklable(tmp_path):
    tiny_imagenet(tmp_path)
    data = TinyImageNet(str(tmp_path), preprocessing=PLAIN)
    for stage in ("fit", "predict"):
        data.setup(stage)
    for dataset in data.datasets.values():
        assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["image"], dataset[0]["image"])


@pytest.mark.parametrize("name", ["TinyImageNet", "Digits", "ImageFolder", "HubDataset"])
def test_command_line_sets_all_options(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    root = ["--data.root", "photos"] if name == "ImageFolder" else []
    options = parser.parse_args(
        [
            *("--data", f"gmarpp.data.{name}", *root),
            *("--data.only_classes", "[a, b]", "--data.batch_size", "7"),
            *("--data.augmentation.scale", "[0.5, 0.75]", "--data.augmentation.policy", "trivialaugment"),
            *("--data.preprocessing", '{"size": [32, 48], "mean": [0, 0, 0], "std": [1, 1, 1]}'),
        ]
    )
    data = parser.instantiate(options).data
    assert type(data).__name__ == name
    assert data.augmentation == Augmentation(scale=(0.5, 0.75), policy="trivialaugment")
    assert data.preprocessing == Preprocessing((32, 48), (0, 0, 0), (1, 1, 1))
    assert (data.only_classes, data.batch_size) == (["a", "b"], 7)
    given = options.data.init_args.as_dict()
    told = data.options
    assert told.keys() == given.keys() | ({"download", "extract_to", "selection_seed"} if name == "Digits" else set())
    resolved = {"root", "preprocessing", "augmentation", "test_split", "predict_split"}
    assert all(told[key] == given[key] for key in given.keys() - resolved)


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", -1), ("num_workers", -1), ("images_per_class", -3), ("seed", -1), ("seed", 2**32)],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=rf"^data: {option}: expected a number .*, got {value}"):
        PointData(preprocessing=PLAIN, **{option: value})


@pytest.mark.parametrize("value", [0, -1, []])
def test_no_classes_at_all(value):
    with pytest.raises(ValueError, match="only_classes: expected"):
        PointData(preprocessing=PLAIN, only_classes=value)


def labelled(monkeypatch, labels):
    monkeypatch.setattr(PointData, "read_split", lambda self, split: (Points(), np.array(labels)))


def test_labels_that_count_from_one(monkeypatch):
    labelled(monkeypatch, [1, 2, 3, 3])
    message = r"row 2 of val has the label 3, expected 0 to 2 .*\(2 of 4 labels are outside, and seem to count from 1\)"
    with pytest.raises(ValueError, match=message):
        points("validate")


def test_missing_labels_are_for_predicting_only(monkeypatch):
    labelled(monkeypatch, [0, 1, 2, -1])
    for stage in ("validate", "test", "predict"):
        assert len(points(stage).datasets[stage.replace("validate", "val")]) == 4
    with pytest.raises(ValueError, match=r"row 3 of train has no label, as 1 of 4"):
        points("fit")
    labelled(monkeypatch, [-1, -1, -1])
    with pytest.raises(ValueError, match=r"no image of val has a label, so there is nothing to measure"):
        points("validate")
    assert len(points("predict").datasets["predict"]) == 3


def test_classes_of_the_same_name(monkeypatch):
    monkeypatch.setattr(PointData, "read_classes", lambda self: (("ant", "bee", "ant"), ("Ant", "Bee", "Ant")))
    with pytest.raises(ValueError, match="PointData has class 'ant' twice"):
        points()
