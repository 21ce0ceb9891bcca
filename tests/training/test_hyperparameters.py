"""Options in groups, and checkpoints from before there were any."""

import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from squares import Squares

from gmarpp.cli.train import train_main
from gmarpp.network.files.load import describe_weights, load_model
from gmarpp.training.execution import Execution
from gmarpp.training.mixing import Mixing
from gmarpp.training.module import ViTClassifier
from gmarpp.training.network_choice import load_classifier
from gmarpp.training.optim import Optimization
from gmarpp.training.trainer import Trainer

# What the first version wrote for a run from the command line.
FLAT = {
    "architecture": "test_vit",
    "num_classes": 3,
    "image_size": [32, 32],
    "pretrained": False,
    "weights": None,
    "model_args": {"depth": 1},
    "preprocessing": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
    },
    "drop_path": 0.1,
    "label_smoothing": 0.2,
    "mixup": 0.8,
    "cutmix": 0.3,
    "head_only": False,
    "gradient_checkpointing": False,
    "compile": False,
    "channels_last": True,
    "lr": 0.003,
    "lr_batch_size": 16,
    "betas": [0.8, 0.99],
    "weight_decay": 0.07,
    "layer_decay": 0.6,
    "warmup": 0.4,
    "min_lr_ratio": 0.05,
    "_instantiator": "lightning.pytorch.cli.instantiate_module",
}
GROUPED = [
    "--model.architecture=test_vit", "--model.num_classes=3", "--model.image_size=32", "--model.pretrained=false",
    "--model.model_args={depth: 1}", "--model.drop_path=0.1", "--model.mixing.label_smoothing=0.2",
    "--model.mixing.mixup=0.8", "--model.mixing.cutmix=0.3", "--model.execution.channels_last=true",
    "--model.optimizer.lr=0.003", "--model.optimizer.lr_batch_size=16", "--model.optimizer.betas=[0.8, 0.99]",
    "--model.optimizer.weight_decay=0.07", "--model.optimizer.layer_decay=0.6", "--model.optimizer.warmup=0.4",
    "--model.optimizer.min_lr_ratio=0.05",
]  # fmt: skip
FIT = [
    "fit", "--data=Squares", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--trainer.logger=false", "--trainer.limit_val_batches=0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert Squares  # its short name exists by being imported
    return tmp_path


@pytest.fixture
def network():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3, img_size=32, depth=1).eval()


@pytest.fixture
def write(network):
    """Writes what the first version did, with some options changed, without any code of this one."""

    def write(options):
        content = {
            "pytorch-lightning_version": "2.6.6",
            "state_dict": {f"model.{key}": value for key, value in network.state_dict().items()},
            "hyper_parameters": options,
            "hparams_name": "kwargs",
            "classes": ["a", "b", "c"],
            "class_names": ["A", "B", "C"],
            "seed": 0,
        }
        torch.save(content, "flat.ckpt")

    return write


def test_checkpoints_without_groups_are_read(write, network):
    write(FLAT)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model("flat.ckpt")(images), network(images))
    for load in (load_classifier, ViTClassifier.load_from_checkpoint):
        module = load("flat.ckpt").eval()
        torch.testing.assert_close(module(images), network(images))
        assert module.classes == ("a", "b", "c")
        assert module.optimization == Optimization(0.003, 16, [0.8, 0.99], 0.07, 0.6, 0.4, 0.05)
        assert module.mixing == Mixing(mixup=0.8, cutmix=0.3, label_smoothing=0.2)
        assert module.execution == Execution(channels_last=True)
        assert module.mix.label_smoothing == 0.2
        assert module.hparams["drop_path"] == 0.1
    other = ViTClassifier.from_weights(describe_weights("flat.ckpt"), optimizer=Optimization(lr=1.0))
    assert (other.optimization.lr, other.mixing.mixup) == (1.0, 0.8)


def test_a_run_without_groups_is_resumed(recwarn):
    train_main([*FIT, *GROUPED, "--trainer.max_steps=2"])
    content = torch.load("logs/checkpoints/last.ckpt", weights_only=True)
    assert not content["hyper_parameters"].keys() & {"lr", "betas", "mixup", "label_smoothing", "channels_last"}
    assert content["hyper_parameters"]["optimizer"]["layer_decay"] == 0.6
    ends = []
    for options in (content["hyper_parameters"], FLAT):
        torch.save({**content, "hyper_parameters": options}, "half.ckpt")
        resume = ["--ckpt_path=half.ckpt", "--trainer.max_steps=4", "--model.optimizer.lr=0.5"]
        run = train_main([*FIT, *resume, "--model.execution.channels_last=false"])
        assert run.trainer.global_step == 4
        assert run.model.optimization.lr == 0.003
        assert not run.model.execution.channels_last, "the machine's options are the command line's"
        assert (
            torch.load("logs/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]["mixing"]["cutmix"] == 0.3
        )
        ends.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
    assert torch.equal(*ends)
    unused = [str(warning.message) for warning in recwarn if "is not used" in str(warning.message)]
    assert unused == 2 * ["--model.optimizer.lr 0.5 is not used: the checkpoint was trained with 0.003"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "fast"}, r"--model\.optimizer\.lr: expected a number above 0, got fast"),
        ({"mixup": -1}, r"--model\.mixing\.mixup: expected a number of at least 0, got -1"),
        ({"momentum": 0.9}, "momentum"),
        ({"optimizer": {"lr": 1e-3}}, "'label_smoothing'"),
    ],
)
def test_wrong_options_in_a_checkpoint_are_named(write, options, message):
    write({**FLAT, **options})
    with pytest.raises(ValueError, match=rf"flat\.ckpt has options .* not know or accept: .*{message}"):
        load_classifier("flat.ckpt")


@pytest.mark.parametrize("group", [3, "fast", [], {"lrr": 1}, {"lr": [1, 0]}])
def test_a_damaged_group_in_a_checkpoint_is_named(write, group):
    flat = {key: FLAT[key] for key in ("architecture", "num_classes", "image_size", "model_args", "preprocessing")}
    write({**flat, "optimizer": group})
    with pytest.raises(ValueError, match=r"flat\.ckpt has options .*(optimizer|lrr)"):
        load_classifier("flat.ckpt")


def test_a_group_is_no_dict():
    with pytest.raises(TypeError, match=r"optimizer: expected an instance of Optimization, got \{'lr': 1\}"):
        ViTClassifier("test_vit", 3, 32, pretrained=False, optimizer={"lr": 1})


class Subclass(ViTClassifier):
    def __init__(self, temperature: float = 1.0, **options):
        super().__init__(**options)
        self.save_hyperparameters()


def test_checkpoints_of_a_subclass_that_saves_its_options_are_read():
    network = {"architecture": "test_vit", "num_classes": 3, "image_size": 32, "model_args": {"depth": 1}}
    module = Subclass(2.0, **network, pretrained=False, optimizer=Optimization(lr=0.01), mixing=Mixing(cutmix=0.5))
    run = Trainer(accelerator="cpu", max_steps=1, logger=False, limit_val_batches=0, enable_model_summary=False)
    run.fit(module, Squares())
    run.save_checkpoint("run.ckpt")
    loaded = Subclass.load_from_checkpoint("run.ckpt")
    assert loaded.hparams["temperature"] == 2.0
    assert (loaded.optimization, loaded.mixing) == (Optimization(0.01, betas=[0.9, 0.999]), Mixing(cutmix=0.5))


def test_options_are_logged_as_plain_yaml():
    run = train_main([*FIT[:5], *GROUPED, "--trainer.max_steps=1", "--trainer.logger=CSVLogger",
                      "--trainer.logger.save_dir=csv", "--trainer.limit_val_batches=0"])  # fmt: skip
    logged = yaml.safe_load(Path(run.trainer.logger.log_dir, "hparams.yaml").read_text())
    assert logged["optimizer"]["betas"] == [0.8, 0.99]
    assert logged["mixing"] == {"mixup": 0.8, "cutmix": 0.3, "label_smoothing": 0.2}
