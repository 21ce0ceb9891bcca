"""A checkpoint is opened once, and one network is built of it."""

import sys

import lightning as L
import pytest
import timm
import torch
from opened import opens_of
from safetensors.torch import load_file, save_file
from squares import Squares

from gmarpp.cli.explain import explain_main
from gmarpp.cli.train import train_main
from gmarpp.network.files.load import load_model
from gmarpp.network.files.save import save_weights
from gmarpp.training.module import ViTClassifier
from gmarpp.training.network_choice import load_classifier

OPTIONS = {"architecture": "test_vit", "num_classes": 3, "image_size": 32, "pretrained": False}
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A training checkpoint, a safetensors file that does not tell the network's size, and one by `torch.save`."""
    folder = tmp_path_factory.mktemp("files")
    network = ViTClassifier(**OPTIONS, model_args={"depth": 2})
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(max_steps=1, enable_checkpointing=False, default_root_dir=folder, **options)
    run.fit(network, Squares())
    run.save_checkpoint(folder / "x.ckpt")
    save_weights(network.model, folder / "full.safetensors")
    about = {"architecture": "test_vit", "model_args": '{"depth": 2}'}
    save_file(load_file(folder / "full.safetensors"), folder / "x.safetensors", metadata=about)
    return folder


@pytest.fixture
def built(monkeypatch):
    """The networks that take memory: what is built on the meta device to check a description takes none."""
    networks, create = [], timm.create_model

    def count(*arguments, **options):
        network = create(*arguments, **options)
        networks.extend([network] if next(network.parameters()).device.type != "meta" else [])
        return network

    monkeypatch.setattr(timm, "create_model", count)
    return networks


def evaluate(path):
    train_main(["validate", "--data=Squares", *QUIET, f"--ckpt_path={path}"])


def resume(path):
    train_main(["fit", "--data=Squares", *QUIET, "--trainer.max_steps=2", f"--ckpt_path={path}"])


def predict(path):
    explain_main(["predict", "--data=Squares", *QUIET, "--output=results", f"--ckpt_path={path}"])


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("load", [load_model, load_classifier, evaluate, predict])
def test_one_read_and_one_network(load, suffix, files, built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with opens_of(files / f"x{suffix}") as opens:
        load(files / f"x{suffix}")
    assert (len(opens), len(built)) == (1, 1)


def test_resuming_reads_the_options_and_then_the_state(files, built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with opens_of(files / "x.ckpt") as opens:
        resume(files / "x.ckpt")
    assert (len(opens), len(built)) == (2, 1)


def test_training_reads_its_start_weights_once(files, built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    start = [f"--model.weights={files / 'full.safetensors'}", "--model.architecture=test_vit", "--model.num_classes=3"]
    depth = ["--model.model_args={depth: 2}", "--model.image_size=32", "--trainer.enable_checkpointing=false"]
    with opens_of(files / "full.safetensors") as opens:
        train_main(["fit", "--data=Squares", *QUIET, "--trainer.max_steps=1", *start, *depth])
    assert (len(opens), len(built)) == (1, 1)


def test_loading_from_a_checkpoint_by_lightnings_name(files, built):
    with opens_of(files / "x.ckpt") as opens:
        loaded = ViTClassifier.load_from_checkpoint(files / "x.ckpt")
    assert (len(opens), len(built)) == (1, 1)
    stored = torch.load(files / "x.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in loaded.state_dict().items())


def test_opens_are_counted_by_whatever_code_they_are(files):
    with opens_of(files / "x.safetensors") as opens:
        load_file(files / "x.safetensors")
        (files / "x.safetensors").read_bytes()
    assert len(opens) == 2
