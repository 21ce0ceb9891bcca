"""Every way to load a checkpoint, tried with one that would make a folder if it were unpickled."""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from squares import Squares

from gmarpp import sanity
from gmarpp.cli.explain import explain_main
from gmarpp.cli.train import train_main
from gmarpp.export import main as export_main
from gmarpp.network.files.load import load_model
from gmarpp.training.checkpoint_io import AtomicCheckpointIO
from gmarpp.training.module import ViTClassifier
from gmarpp.training.network_choice import load_classifier
from gmarpp.training.trainer import Trainer

OPTIONS = {"architecture": "test_vit", "num_classes": 3, "image_size": 32, "pretrained": False}
SMALL = {"model_args": {"depth": 1}}
MODEL = [f"--model.{key}={value}" for key, value in OPTIONS.items()] + ["--model.model_args={depth: 1}"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
REFUSED = "holds more than tensors and plain values"


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder-was-here",)


def trainer(**options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(**{"max_steps": 1, "limit_val_batches": 1, "enable_checkpointing": False, **quiet, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of one step, and the same one with something to unpickle."""
    folder = tmp_path_factory.mktemp("trained")
    run = trainer(default_root_dir=folder)
    run.fit(ViTClassifier(**OPTIONS, **SMALL), Squares())
    run.save_checkpoint(folder / "good.ckpt")
    content = torch.load(folder / "good.ckpt", weights_only=True)
    torch.save({**content, "intruder": Intruder()}, folder / "evil.ckpt")
    return folder


@pytest.fixture(autouse=True)
def scene(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    # whoever sets it wants to read own old files; what a stranger's holds must not run for that
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("sys.argv", ["train.py"])
    for name in ("good.ckpt", "evil.ckpt"):
        (tmp_path / name).symlink_to(trained / name)
    yield
    assert not (tmp_path / "intruder-was-here").exists()


@pytest.fixture
def address(trained):
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=trained))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/evil.ckpt"
    server.shutdown()
    server.server_close()


def classifier():
    return ViTClassifier(**OPTIONS, **SMALL)


CALLS = {
    "fit": lambda path: trainer().fit(classifier(), Squares(), ckpt_path=path),
    "validate": lambda path: trainer().validate(classifier(), Squares(), ckpt_path=path),
    "test": lambda path: trainer().test(classifier(), Squares(), ckpt_path=path),
    "predict": lambda path: trainer().predict(classifier(), Squares(), ckpt_path=path),
    "asynchronous": lambda path: trainer(plugins=[AsyncCheckpointIO()]).fit(classifier(), Squares(), ckpt_path=path),
    "wrapped": lambda path: trainer(plugins=[AsyncCheckpointIO(TorchCheckpointIO())]).fit(
        classifier(), Squares(), ckpt_path=path
    ),
    "load_model": lambda path: load_model(path, "test_vit"),
    "load_classifier": load_classifier,
    "load_from_checkpoint": ViTClassifier.load_from_checkpoint,
    "weights": lambda path: ViTClassifier(**OPTIONS, **SMALL, weights=path),
    "plugin": lambda path: AtomicCheckpointIO().load_checkpoint(path),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_python_calls_run_no_code(call, address):
    with pytest.raises(ValueError, match=REFUSED):
        call("evil.ckpt")
    with pytest.raises(ValueError, match="is an address, expected a file: download it"):
        call(address)


def test_whoever_asks_for_code_is_refused():
    for load in (
        functools.partial(trainer().fit, classifier(), Squares(), ckpt_path="evil.ckpt"),
        functools.partial(ViTClassifier.load_from_checkpoint, "evil.ckpt"),
    ):
        with pytest.raises(ValueError, match="weights_only=False would run code"):
            load(weights_only=False)


@pytest.mark.parametrize("keyword", ["last", "best", "hpc"])
def test_keywords_run_no_code(keyword, tmp_path, trained):
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    callback = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "kept", filename="kept", save_last=True)
    run = trainer(callbacks=[callback], **options)
    run.fit(classifier(), Squares())
    for file in [*(tmp_path / "kept").glob("*.ckpt"), tmp_path / "hpc_ckpt_1.ckpt"]:
        shutil.copyfile(trained / "evil.ckpt", file)
    with pytest.raises(ValueError, match=REFUSED):
        run.fit(classifier(), Squares(), ckpt_path=keyword)


def test_slurm_resumes_without_code(tmp_path, trained, monkeypatch):
    """On such a cluster Lightning looks for a checkpoint by itself."""
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.checkpoint_connector.SLURMEnvironment.detect", lambda: True
    )
    shutil.copyfile(trained / "evil.ckpt", tmp_path / "hpc_ckpt_1.ckpt")
    with pytest.raises(ValueError, match=REFUSED):
        trainer(default_root_dir=tmp_path).fit(classifier(), Squares())


@pytest.mark.parametrize("path", ["evil.ckpt", "address", "hpc"])
@pytest.mark.parametrize("command", ["fit", "validate", "predict", "export", "sanity", "weights"])
def test_commands_run_no_code(command, path, address, tmp_path, trained, capsys):
    shutil.copyfile(trained / "evil.ckpt", tmp_path / "hpc_ckpt_1.ckpt")
    path = address if path == "address" else path
    run, arguments = {
        "fit": (train_main, ["fit", "--data=Squares", *MODEL, *QUIET, "--trainer.default_root_dir=."]),
        "validate": (train_main, ["validate", "--data=Squares", *MODEL, *QUIET]),
        "predict": (explain_main, ["predict", "--data=Squares", *QUIET]),
        "export": (export_main, ["--output=x.safetensors"]),
        "sanity": (sanity.main, ["--data=Digits", f"--data.root={tmp_path}"]),
        "weights": (train_main, ["fit", "--data=Squares", *MODEL, *QUIET, f"--model.weights={path}"]),
    }[command]
    if command != "weights":
        arguments = [*arguments, f"--ckpt_path={path}"]
    with pytest.raises(SystemExit):
        run(arguments)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    expected = {"evil.ckpt": REFUSED, address: "is an address", "hpc": "there is no checkpoint hpc"}[path]
    assert (REFUSED if path == "hpc" and command == "fit" else expected) in message


def test_good_checkpoints_load_by_all_calls(trained):
    for name, call in CALLS.items():
        if name != "weights":
            call(str(trained / "good.ckpt"))


@pytest.mark.parametrize(
    "part",
    [
        {"hyper_parameters": {"_instantiator": "os.mkdir", "path": "intruder-was-here"}},
        {
            "hyper_parameters": {
                **OPTIONS,
                "preprocessing": {},
                "model_args": {"class_path": "os.mkdir", "init_args": {"path": "intruder-was-here"}},
                "_instantiator": "lightning.pytorch.cli.instantiate_module",
                "_class_path": "os.mkdir",
            }
        },
    ],
)
def test_names_of_code_in_a_checkpoint_are_not_followed(part, trained):
    content = torch.load(trained / "good.ckpt", weights_only=True)
    torch.save({**content, **part}, "named.ckpt")
    for load in (ViTClassifier.load_from_checkpoint, load_classifier, load_model):
        with pytest.raises(ValueError, match=r"named\.ckpt"):
            load("named.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pytorch-lightning_version": 3}, "pytorch-lightning_version: expected str, got 3"),
        ({"pytorch-lightning_version": "new"}, "unknown version 'new'"),
        ({"loops": []}, r"loops: expected dict, got \[\]"),
        ({"optimizer_states": {}}, r"optimizer_states: expected list, got \{\}"),
        ({"state_dict": []}, r"state_dict: expected dict"),
    ],
)
def test_resuming_from_what_is_no_training_checkpoint(change, message, trained):
    torch.save({**torch.load(trained / "good.ckpt", weights_only=True), **change}, "odd.ckpt")
    with pytest.raises(ValueError, match=rf"odd\.ckpt is no training checkpoint: {message}"):
        trainer().fit(classifier(), Squares(), ckpt_path="odd.ckpt")


def test_resuming_from_a_flipped_bit(trained):
    raw = bytearray((trained / "good.ckpt").read_bytes())
    raw[len(raw) // 2] ^= 4
    Path("flipped.ckpt").write_bytes(raw)
    with pytest.raises(ValueError, match=r"flipped\.ckpt is damaged or incomplete \(the checksum of .* is wrong\)"):
        trainer().fit(classifier(), Squares(), ckpt_path="flipped.ckpt")


def test_home_and_variables_are_expanded(trained, monkeypatch):
    monkeypatch.setenv("HOME", str(trained))
    monkeypatch.setenv("RUNS", str(trained))
    for path in ("~/good.ckpt", "$RUNS/good.ckpt", "${RUNS}/good.ckpt"):
        assert load_classifier(path).checkpoint_sha256
        trainer().validate(classifier(), Squares(), ckpt_path=path, verbose=False)
        assert ViTClassifier(num_classes=3, image_size=32, weights=path).hparams["architecture"] == "test_vit"
