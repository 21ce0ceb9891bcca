"""The monitor in other people's LightningModules, with other people's data."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from callbacks import foreign
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from quiet_trainer import quiet_trainer
from small_networks import vit
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets, transforms

import gmarpp
from gmarpp.attribution import UnsupportedNetworkError
from gmarpp.callbacks import AttributionMonitor
from gmarpp.explainer import Explainer
from gmarpp.metrics.functional import average_drop, deletion_auc, insertion_auc, pointing_game
from gmarpp.perturbation import score_perturbations

METHODS = ("gmarpp_l1", "rollout")
EXPLAINER = Explainer(methods=METHODS, metrics=["average_drop", "insertion_auc", "deletion_auc"], steps=3)


def by_hand(network, images, architecture=None):
    """What the metrics are, from the public functions alone."""
    e = gmarpp.explain(network, images, METHODS, architecture=architecture)
    scores = score_perturbations(network, images, e.maps, e.target, steps=3)
    expected = {}
    for method in METHODS:
        tag = f"attribution/{method}/"
        expected[tag + "average_drop"] = average_drop(scores.full, scores.kept[method]).item()
        expected[tag + "insertion_auc"] = insertion_auc(scores.fractions, scores.insertion[method]).item()
        expected[tag + "deletion_auc"] = deletion_auc(scores.fractions, scores.deletion[method]).item()
    return expected


def monitor(**options):
    return AttributionMonitor(EXPLAINER, **{"images": 4, "batch_size": 3} | options)


def trainer(folder, *callbacks, **options):
    return quiet_trainer(
        folder, callbacks=list(callbacks), **{"enable_checkpointing": False, "max_epochs": 1} | options
    )


def loader(**options):
    return DataLoader(TensorDataset(*foreign.samples()), 4, **options)


@pytest.mark.parametrize(
    ("setting", "sanity_steps"),
    [*((each, 1) for each in foreign.SETTINGS), (foreign.dataclasses, 0), (foreign.streamed, 0)],
)
def test_logs_what_the_functions_say_by_hand(tmp_path, setting, sanity_steps):
    module, loaders, network, images = setting(tmp_path)
    run = trainer(tmp_path, monitor(), num_sanity_val_steps=sanity_steps)
    run.fit(module, loaders[0] if isinstance(loaders, list) else loaders, loaders)
    assert module.trained > 0
    for tag, value in by_hand(network, images).items():
        assert run.callback_metrics[tag].item() == pytest.approx(value, rel=1e-4), tag


def test_validates_without_training(tmp_path):
    module, loaders, network, images = foreign.torchvision_folder(tmp_path)
    run = trainer(tmp_path, monitor())
    run.validate(module, loaders, verbose=False)
    for tag, value in by_hand(network, images).items():
        assert run.callback_metrics[tag].item() == pytest.approx(value, rel=1e-4), tag


def test_a_network_is_named_where_there_are_several(tmp_path):
    class Distilled(foreign.OwnNet):
        def __init__(self):
            super().__init__()
            self.teacher = nn.ModuleDict({"net": vit(num_heads=4)})

    for name, network in (("net", lambda module: module.net), ("teacher.net", lambda module: module.teacher["net"])):
        module, run = Distilled(), trainer(tmp_path, monitor(network=name))
        run.validate(module, loader(), verbose=False)
        for tag, value in by_hand(network(module), foreign.samples()[0][[0, 3, 6, 9]]).items():
            assert run.callback_metrics[tag].item() == pytest.approx(value, rel=1e-4), tag


class OwnLog(foreign.OwnNet):
    """Puts a function of its own in the place of `log`."""

    def __init__(self):
        super().__init__()
        self.logged = []
        self.log = self.note

    def note(self, name, value, **options):
        self.logged.append(name)
        return super().log(name, value, **options)


def test_a_modules_own_log_is_left_to_it(tmp_path):
    module, run = OwnLog(), trainer(tmp_path, monitor(), max_epochs=2, num_sanity_val_steps=0)
    run.fit(module, loader(), loader())
    assert module.logged.count("val/loss") == 2 * len(loader())
    assert module.log == module.note
    assert "attribution/rollout/average_drop" in run.callback_metrics


class Unknown(nn.Module):
    """Of no known family."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, stride=8)
        layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(24, 5)

    def forward(self, images):
        return self.fc(self.layers(self.embed(images).flatten(2).mT).mean(dim=1))


def described(network):
    return gmarpp.Architecture(lambda *size: (size[0] // 8, size[1] // 8), 0, network.layers.layers)


def test_a_network_of_no_known_family_is_described(tmp_path):
    torch.manual_seed(0)
    module = foreign.OwnNet(Unknown())
    with pytest.raises(UnsupportedNetworkError, match="the patch grid of Unknown is not known"):
        trainer(tmp_path, monitor()).fit(module, loader(), loader())
    run = trainer(tmp_path, monitor(architecture=described))
    run.validate(module, loader(), verbose=False)
    expected = by_hand(module.net, foreign.samples()[0][[0, 3, 6, 9]], described(module.net))
    for tag, value in expected.items():
        assert run.callback_metrics[tag].item() == pytest.approx(value, rel=1e-4), tag


class Logging(foreign.BackboneAndHead):
    def forward(self, images):
        self.log_dict({"images": float(len(images))}, on_step=False, on_epoch=True, reduce_fx="sum")
        return super().forward(images)


@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_what_a_forward_logs_is_the_same_with_it_and_without(tmp_path, sanity_steps):
    logged = []
    for callbacks in ((), (monitor(),)):
        run = trainer(tmp_path, *callbacks, num_sanity_val_steps=sanity_steps)
        run.fit(Logging(), loader(), loader())
        logged.append(run.callback_metrics["images"].item())
        run.validate(Logging(), loader(), verbose=False)
        logged.append(run.callback_metrics["images"].item())
    assert logged == [12, 12, 12, 12]


class Noisy(TensorDataset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + torch.randn(3, 32, 32), label


@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_training_is_the_same_with_it_and_without(tmp_path, sanity_steps):
    weights, modes = [], []
    for callbacks in ((), (monitor(),)):
        torch.manual_seed(0)
        module = foreign.BackboneAndHead()
        data = Noisy(*foreign.samples())
        run = trainer(tmp_path, *callbacks, max_epochs=2, num_sanity_val_steps=sanity_steps)
        run.fit(module, DataLoader(data, 4, shuffle=True), DataLoader(data, 4))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
        assert all(parameter.requires_grad for parameter in module.parameters())

        modes.append([each.training for each in module.modules()])
    assert torch.equal(*weights)
    assert modes[0] == modes[1]


def test_explains_the_same_images_at_every_validation_of_random_data(tmp_path):
    class Frozen(foreign.OwnNet):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    values = []

    class Recorder(AttributionMonitor):
        def on_validation_epoch_end(self, trainer, pl_module):
            super().on_validation_epoch_end(trainer, pl_module)
            if not trainer.sanity_checking:
                values.append(trainer.callback_metrics["attribution/rollout/insertion_auc"].item())

    data = DataLoader(Noisy(*foreign.samples()), 4)
    trainer(tmp_path, Recorder(EXPLAINER, images=4), max_epochs=3).fit(Frozen(), data, data)
    assert len(values) == 3
    assert len(set(values)) == 1


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("transform", {}),
        ("option", {"normalization": ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])}),
        ("network", {}),
    ],
)
def test_images_are_shown_as_they_were(tmp_path, drawn, source, options):
    data = foreign.image_folder(tmp_path / "images")
    module = foreign.OwnNet(vit(pretrained_cfg_overlay={"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}))
    if source != "network":
        module.net.pretrained_cfg = {}
    if source != "transform":
        normalize = foreign.NORMALIZE
        to_tensor = transforms.ToTensor()
        data.transform = lambda image: normalize(to_tensor(image))
    run = trainer(tmp_path, monitor(images=3, **options), logger=TensorBoardLogger(tmp_path))
    run.validate(module, DataLoader(data, 4), verbose=False)
    pictures, names = drawn
    expected = [transforms.functional.to_tensor(data.loader(data.samples[index][0])) for index in (0, 4, 8)]
    torch.testing.assert_close(torch.stack(pictures), torch.stack(expected), rtol=0, atol=1e-6)
    assert set(names) <= {"class0", "class1", "class2", "3", "4"}


def test_images_of_unknown_normalization_are_stretched_and_it_says_so(tmp_path, drawn):
    module, loaders, _, images = foreign.hugging_face(tmp_path)
    with pytest.warns(UserWarning, match=r"AttributionMonitor\(normalization=\(mean, std\)\)") as warned:
        trainer(tmp_path, monitor(), max_epochs=2, logger=TensorBoardLogger(tmp_path)).fit(module, loaders, loaders)
    assert sum("normalization=" in str(each.message) for each in warned) == 1
    for picture, image in zip(drawn[0], images, strict=True):
        torch.testing.assert_close(picture, (image - image.min()) / (image.max() - image.min()))


@pytest.fixture
def drawn(monkeypatch):
    """Pictures and names of the last grid that was drawn."""
    seen = ([], [])

    def figure(images, names, **options):
        seen[0][:], seen[1][:] = images, names
        return comparison_figure(images=images, names=names, **options)

    comparison_figure = gmarpp.callbacks.monitor.comparison_figure
    monkeypatch.setattr(gmarpp.callbacks.monitor, "comparison_figure", figure)
    return seen


class TakesBatches(foreign.OwnNet):
    def forward(self, batch):
        return self.net(batch["image"])

    def loss(self, batch):
        return super().loss(({"image": batch[0]}, batch[1]))


def convolutional():
    return foreign.OwnNet(timm.create_model("test_resnet", num_classes=5))


UNLABELED = TensorDataset(foreign.samples()[0], *[torch.zeros(12)] * 2)


class Unsupervised(foreign.OwnNet):
    def loss(self, batch):
        return self(batch[0]).square().mean()


BYTES = TensorDataset(foreign.samples()[0].byte(), foreign.samples()[1])


class Bytes(foreign.OwnNet):
    def forward(self, images):
        return super().forward(images / 255)


@pytest.mark.parametrize(
    ("module", "data", "options", "message"),
    [
        (foreign.OwnNet, None, {"network": "nets"}, "unknown module 'nets' of OwnNet: choose from net"),
        (TakesBatches, None, {}, r"write a forward .*AttributionMonitor\(network='net'\)"),
        (convolutional, None, {}, r"The monitor explains ResNet: name another .*AttributionMonitor\(network="),
        (Unsupervised, UNLABELED, {"explainer": Explainer(target="label")}, "target is label, but image 0 has none"),
        (
            foreign.OwnNet,
            None,
            {"explainer": Explainer(metrics=["pointing_game"])},
            "pointing_game cannot be monitored",
        ),
        (foreign.HuggingFace, foreign.Columns(), {"explainer": Explainer(baseline="black")}, "baseline 'black' needs"),
        (Bytes, BYTES, {}, r"expected one floating-point tensor of images .* got 0: torch.uint8 \(4, 3, 32, 32\)"),
        (foreign.OwnNet, None, {"normalization": ([0.5] * 4, [0.5] * 4)}, "deviation of 3 channels, got 4 and 4"),
    ],
)
@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_what_cannot_be_monitored_is_said_before_training(tmp_path, module, data, options, message, sanity_steps):
    trained, batches = module(), loader() if data is None else DataLoader(data, 4)
    run = trainer(tmp_path, AttributionMonitor(**{"images": 4} | options), num_sanity_val_steps=sanity_steps)
    with pytest.raises((ValueError, UnsupportedNetworkError), match=message):
        run.fit(trained, batches, batches)
    assert trained.trained == 0


def test_training_without_validation_is_refused_unless_it_is_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"give trainer.fit\(..., val_dataloaders=...\)"):
        trainer(tmp_path, monitor()).fit(foreign.OwnNet(), loader())
    trainer(tmp_path, monitor(), limit_val_batches=0).fit(foreign.OwnNet(), loader(), loader())
    trainer(tmp_path, monitor(images=0)).fit(foreign.OwnNet(), loader())


def test_a_network_that_is_shared_out_among_devices_is_refused():
    run = SimpleNamespace(strategy=FSDPStrategy(), world_size=1)
    with pytest.raises(ValueError, match="FSDPStrategy shares the network out among the devices"):
        monitor().setup(run, foreign.OwnNet(), "fit")
    monitor(images=0).setup(run, foreign.OwnNet(), "fit")


def test_normalization_is_mean_and_standard_deviation():
    for wrong in (([0.5, 0.5, 0.5],), ([0.5], [0.0])):
        with pytest.raises(
            ValueError, match=r"AttributionMonitor\.normalization: expected mean and standard deviation"
        ):
            monitor(normalization=wrong)


class Boxed(TensorDataset):
    """Dictionaries with a box."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"image": image, "label": label, "box": torch.tensor([0.0, 0.0, 28.0, 20.0])}


class GeoImages(datasets.ImageFolder):
    """As torchgeo's classification data sets: dictionaries of pixels 0 to 255 and a label tensor, by `transforms`."""

    def __init__(self, root, transforms):
        super().__init__(root)
        self.transforms = transforms

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)
        return self.transforms({"image": pixels, "label": torch.tensor(label)})


def test_geographic_data_are_dictionaries_with_classes_in_targets(tmp_path):
    class Dictionaries(foreign.OwnNet):
        def loss(self, batch):
            return super().loss((batch["image"], batch["label"]))

    foreign.image_folder(tmp_path / "images")
    data = GeoImages(tmp_path / "images", lambda sample: {**sample, "image": sample["image"] / 255})
    module, run = Dictionaries(), trainer(tmp_path, monitor(images=3))
    run.validate(module, DataLoader(Subset(data, range(11, -1, -1)), 4), verbose=False)
    # The first of each class in the part's order, which is reversed.
    images = torch.stack([data[index]["image"] for index in (3, 7, 11)])
    for tag, value in by_hand(module.net, images).items():
        assert run.callback_metrics[tag].item() == pytest.approx(value, rel=1e-4), tag


def test_boxes_of_dictionaries_are_measured_against(tmp_path):
    class Dictionaries(foreign.OwnNet):
        def loss(self, batch):
            return super().loss((batch["image"], batch["label"]))

    module, data = Dictionaries(), DataLoader(Boxed(*foreign.samples()), 4)
    explainer = Explainer(methods=METHODS, metrics=["pointing_game"])
    run = trainer(tmp_path, AttributionMonitor(explainer, images=12))
    run.validate(module, data, verbose=False)
    maps = gmarpp.explain(module.net, foreign.samples()[0], METHODS).maps
    objects = torch.zeros(12, 32, 32, dtype=torch.bool)
    objects[:, :20, :28] = True
    for method in METHODS:
        logged = run.callback_metrics[f"attribution/{method}/pointing_game"].item()
        assert 0 < logged < 1
        assert logged == pytest.approx(pointing_game(maps[method], objects).item())
