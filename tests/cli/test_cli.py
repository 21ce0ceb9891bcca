import csv
import json
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from full_disk import no_file_larger_than
from lightning.pytorch.loggers import Logger
from noise import write_noise
from PIL import Image
from small_model import MODEL
from squares import Squares
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmarpp import command
from gmarpp.cli.explain import explain_main
from gmarpp.cli.train import train_main
from gmarpp.data import ImageDataModule
from gmarpp.explainer import FAITHFULNESS_METRICS
from gmarpp.network.files.load import load_model
from gmarpp.network.files.save import save_weights
from gmarpp.run.reader import load_explanations

ROOT = Path(__file__).parents[2]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
FIT = ["fit", "--data=Squares", *MODEL, *QUIET, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"]


class DamagedSquares(Squares):
    def train_dataloader(self):
        loader = super().train_dataloader()
        if self.trainer.current_epoch == 0:
            loader.dataset.images[23] = float("nan")
        return loader


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert Squares  # its short name exists by being imported
    return tmp_path


@pytest.fixture
def checkpoint(folder):
    train_main([*FIT, "--trainer.logger=false"])
    return folder / "logs" / "checkpoints" / "last.ckpt"


def failure(main, arguments, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("every", [4, 100])
def test_the_end_of_a_run_is_kept_also_between_checkpoints(folder, every):
    train_main([*FIT, "--trainer.logger=false", f"--last_checkpoint.every_n_train_steps={every}"])
    last = folder / "logs/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6
    resumed = train_main([*FIT, "--trainer.logger=false", "--trainer.max_epochs=4", f"--ckpt_path={last}"])
    assert resumed.trainer.global_step == 12


def test_fit_logs_and_keeps_best_and_last(folder):
    run = train_main(FIT)
    files = {str(path.relative_to(folder / "logs")) for path in (folder / "logs").rglob("*") if path.is_file()}
    kept = {f"version_0/checkpoints/{name}" for name in ("best.ckpt", "best.md", "last.ckpt")}
    assert kept | {"version_0/config.yaml"} <= files
    events = EventAccumulator(str(folder / "logs/version_0")).Reload()
    best = run.trainer.checkpoint_callback.best_model_score
    assert [each.value for each in events.Scalars("best/val/accuracy")] == [best]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert run.trainer.checkpoint_callback.monitor == "val/accuracy"
    assert torch.load(folder / "logs/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    config = yaml.safe_load((folder / "logs/version_0/config.yaml").read_text())
    assert config["seed_everything"] == 0
    assert "  class_path: squares.Squares\n" in (folder / "logs/version_0/checkpoints/best.md").read_text()
    assert train_main(["fit", "--config", "logs/version_0/config.yaml"]).trainer.global_step == 6


def test_best_holds_weights_alone(folder, capsys):
    run = train_main([*FIT, "--trainer.logger=false"])
    best, last = (folder / f"logs/checkpoints/{name}.ckpt" for name in ("best", "last"))
    assert best.stat().st_size < last.stat().st_size / 2
    assert "optimizer_states" not in torch.load(best, weights_only=True)
    known = {name: float(value) for name, value in run.trainer.callback_metrics.items() if name.startswith("val/")}
    again = train_main(["validate", "--data=Squares", *QUIET, f"--ckpt_path={best}"]).trainer.callback_metrics
    assert again["val/accuracy"] == known["val/accuracy"]
    message = failure(train_main, [*FIT, "--trainer.logger=false", f"--ckpt_path={best}"], capsys)
    assert f"{best} holds weights alone" in message
    assert f"--model.weights {best}" in message


def test_resume_continues_and_takes_the_models_options_from_the_checkpoint(checkpoint, recwarn):
    run = train_main([*FIT, "--trainer.max_epochs=3", "--ckpt_path", str(checkpoint), "--model.optimizer.lr=0.5"])
    assert run.trainer.global_step == 9
    assert run.model.optimization.lr == pytest.approx(2.5e-4)
    assert [str(w.message) for w in recwarn if "is not used" in str(w.message)] == [
        "--model.optimizer.lr 0.5 is not used: the checkpoint was trained with 0.00025"
    ]


def test_last_and_best_are_the_newest_of_all_versions(folder):
    train_main(FIT)
    train_main([*FIT, "--trainer.max_epochs=1"])
    # the older version is the one that was written last
    os.utime(folder / "logs/version_0/checkpoints/last.ckpt")
    run = train_main([*FIT, "--trainer.max_epochs=3", "--ckpt_path=last"])
    assert run.trainer.global_step == 9
    assert run.trainer.ckpt_path == "logs/version_0/checkpoints/last.ckpt"
    os.utime(folder / "logs/version_1/checkpoints/best.ckpt")
    run = train_main(["validate", "--data=Squares", *QUIET, "--ckpt_path=best"])
    assert run.model.checkpoint_path == "logs/version_1/checkpoints/best.ckpt"


def test_failed_start_leaves_the_checkpoint_that_was_there(checkpoint, capsys, monkeypatch):
    before = checkpoint.read_bytes()
    connector = "lightning.pytorch.trainer.connectors.checkpoint_connector._CheckpointConnector"

    def fail(*_):
        raise ValueError("optimizers cannot be restored")

    monkeypatch.setattr(f"{connector}.restore_optimizers_and_schedulers", fail)
    options = [*FIT, "--trainer.logger=false", "--trainer.max_epochs=4", f"--ckpt_path={checkpoint}"]
    assert "cannot be restored" in failure(train_main, options, capsys)
    assert checkpoint.read_bytes() == before


def test_resume_takes_the_machines_options_from_the_command_line(folder, recwarn):
    options = [*FIT, "--trainer.logger=false"]
    train_main([*options, "--model.execution.channels_last=true"])
    resumed = [f"--ckpt_path={folder}/logs/checkpoints/last.ckpt", "--trainer.max_epochs=3"]
    run = train_main([*options, *resumed, "--model.execution.gradient_checkpointing=true"])
    assert run.trainer.global_step == 9
    assert run.model.execution.gradient_checkpointing
    assert not run.model.execution.channels_last
    assert not [w for w in recwarn if "is not used" in str(w.message)]


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_validate_a_checkpoint(checkpoint, folder, suffix):
    if suffix == ".safetensors":
        save_weights(load_model(checkpoint), checkpoint.with_suffix(suffix))
        checkpoint = checkpoint.with_suffix(suffix)
    (folder / "logs" / "config.yaml").unlink()
    run = train_main(["validate", "--data=Squares", *QUIET, "--ckpt_path", str(checkpoint), "--trainer.logger=false"])
    assert not (folder / "logs" / "config.yaml").exists()
    assert run.model.class_names == ("Color 0", "Color 1", "Color 2")
    assert set(run.trainer.callback_metrics) == {
        "val/loss",
        "val/accuracy",
        "val/accuracy_top5",
        "val/calibration_error",
    }


def test_validate_start_weights_with_their_head(checkpoint):
    save_weights(load_model(checkpoint), "start.safetensors")
    options = [*MODEL, *QUIET, "--data=Squares", "--trainer.logger=false"]
    run = train_main(["validate", *options, "--model.weights=start.safetensors"])
    assert torch.equal(run.model.model.head.weight, load_model(checkpoint).head.weight)


@pytest.mark.parametrize(("value", "batches"), [("1", 1), ("1.0", 3), ("2", 2)])
def test_a_limit_of_1_is_one_batch(value, batches):
    run = train_main(
        [*FIT, "--trainer.logger=false", "--trainer.max_epochs=1", f"--trainer.limit_train_batches={value}"]
    )
    assert run.trainer.global_step == batches


def test_callbacks_and_checkpoints_are_configurable(folder):
    (folder / "ema.yaml").write_text("trainer: {callbacks+: [{class_path: AveragedWeights}]}")
    run = train_main(
        [*FIT, "--config=ema.yaml", "--checkpoint.monitor=val/loss", "--checkpoint.mode=min",
         "--checkpoint.model_card=false"]
    )  # fmt: skip
    assert run.trainer.checkpoint_callback.mode == "min"
    assert not list(folder.rglob("best.md"))
    assert "AveragedWeights" in {type(callback).__name__ for callback in run.trainer.callbacks}
    run = train_main(
        [*FIT, "--trainer.enable_checkpointing=false", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=csv"]
    )
    assert run.trainer.checkpoint_callback is None
    assert list(folder.glob("csv/**/metrics.csv"))


def test_interrupted_run_leaves_the_last_state(folder, capsys):
    message = failure(
        train_main, [*FIT, "--data=DamagedSquares", "--trainer.logger=false", "--data.batch_size=2"], capsys
    )
    assert "the loss is not finite at step" in message
    assert "square023.png" in message


def test_full_disk_leaves_the_last_state(checkpoint, capsys):
    before = checkpoint.read_bytes()
    resume = [*FIT, "--trainer.logger=false", "--trainer.max_epochs=3", f"--ckpt_path={checkpoint}"]
    with no_file_larger_than(100_000):
        message = failure(train_main, resume, capsys)
    assert "cannot write: File too large" in message
    assert ".ckpt" in message
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob(".*"))
    assert train_main(resume).trainer.global_step == 9


def test_best_by_an_attribution_metric_in_a_table(folder):
    (folder / "monitor.yaml").write_text(
        "trainer: {callbacks+: [{class_path: AttributionMonitor, init_args: {images: 3, explainer: "
        "{methods: [rollout], metrics: [insertion_auc], steps: 2}}}]}"
    )
    name = "attribution/rollout/insertion_auc"
    parts = ["--config=monitor.yaml", f"--config={ROOT}/configs/logger/csv.yaml", f"--checkpoint.monitor={name}"]
    best = train_main([*FIT, *parts]).trainer.checkpoint_callback.best_model_score
    with (folder / "logs/version_0/metrics.csv").open() as table:
        logged = [float(row[name]) for row in csv.DictReader(table) if row[name]]
    assert len(logged) == 2
    assert max(logged) == pytest.approx(best.item())
    assert (folder / "logs/version_0/checkpoints/best.ckpt").is_file()


class Database(Logger):
    """Without a folder, as MLflow's."""

    name = version = "database"

    def log_hyperparams(self, params): ...

    def log_metrics(self, metrics, step=None): ...


def test_logger_without_a_folder(folder):
    train_main([*FIT, "--trainer.logger=test_cli.Database"])
    assert "class_path: test_cli.Database" in (folder / "logs/config.yaml").read_text()
    assert (folder / "logs/database/database/checkpoints/best.ckpt").is_file()


def test_start_says_the_effective_batch_size_and_no_warning(caplog, recwarn):
    with caplog.at_level("INFO"):
        train_main(
            [*FIT, "--trainer.enable_model_summary=true", "--trainer.max_epochs=-1", "--trainer.max_steps=1",
             "--trainer.precision=bf16-mixed"]
        )  # fmt: skip
    assert "Effective batch size 8 = 8 x 1 devices" in caplog.text
    assert not [warning for warning in recwarn if "summary" in str(warning.message)]


def test_explain_writes_with_the_checkpoints_network_alone(checkpoint, folder):
    run = explain_main(
        ["predict", "--ckpt_path", str(checkpoint), "--data=Squares", *QUIET, "--explain.methods=[rollout]",
         "--explain.metrics=[]", "--trainer.limit_predict_batches=1"]
    )  # fmt: skip
    assert run.model.classes == ("class0", "class1", "class2")
    assert (folder / "results" / "last").is_dir()
    assert run.model.explainer.methods == ("rollout",)


def test_a_wrong_option_leaves_no_folder_and_the_corrected_command_runs(checkpoint, folder, monkeypatch, capsys):
    predict = [
        "predict", "--ckpt_path", str(checkpoint), "--data=Squares", *QUIET, "--explain.methods=[rollout]",
        "--explain.metrics=[]", "--trainer.limit_predict_batches=1", "--output=$HERE/out",
    ]  # fmt: skip
    monkeypatch.setenv("HERE", str(folder))
    for option, message in (
        ("--explain.target=clas1", "unknown class 'clas1': did you mean class1"),
        ("--explain.target=7", "targets: expected 0 to 2 for 3 classes, got 7 to 7"),
        ("--explain.metrics=[iou]", "explain.metrics: iou compare maps with an object"),
        ("--output=$UNKNOWN_NAME/out", "$UNKNOWN_NAME, which is not set"),
    ):
        assert message in failure(explain_main, [*predict, option], capsys)
        assert not (folder / "out").exists()
    explain_main(predict)
    assert "replace it with --overwrite" in failure(explain_main, predict, capsys)
    explain_main([*predict, "--overwrite", "--explain.target=class1"])
    assert load_explanations(folder / "out").rows[0]["target"] == 1


def test_a_run_says_how_many_images_were_explained_at_a_time(checkpoint, folder, monkeypatch):
    write_noise(folder / "noise")
    monkeypatch.setattr(ImageDataModule, "_suitable_batch_size", lambda self: 5)
    predict = ["predict", f"--ckpt_path={checkpoint}", "--data=ImageFolder", "--data.root=noise/train", *QUIET]
    run = explain_main([*predict, "--data.num_workers=0", "--explain.methods=[rollout]", "--explain.metrics=[]"])
    assert [len(batch["index"]) for batch in run.datamodule.predict_dataloader()] == [5, 5, 5, 5, 4]
    assert json.loads((folder / "results/last/run.json").read_text())["data"]["options"]["batch_size"] == 5


def test_masks_add_their_metrics_and_a_run_remembers_its_data(checkpoint, folder, capsys):
    write_noise(folder / "noise")
    for masks in ("masks", "others"):
        for name in "abc":
            (folder / masks / name).mkdir(parents=True)
            Image.new("L", (40, 40), 255).save(folder / masks / name / "0.png")
    predict = [
        "predict", "--ckpt_path", str(checkpoint), *QUIET, "--data=ImageFolder", "--data.root=noise/val",
        "--data.num_workers=0", "--data.masks=masks", "--explain.methods=[rollout]", "--explain.steps=2",
        "--output=out",
    ]  # fmt: skip
    run = explain_main(predict)
    assert run.model.explainer.metrics == (*FAITHFULNESS_METRICS, "pixel_accuracy", "iou", "average_precision")
    with (folder / "out/explanations.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [float(row["iou"]) for row in rows if row["method"] == "rollout"]
    described = json.loads((folder / "out/run.json").read_text())
    assert described["trainer"] == {"precision": "32-true"}
    options = described["data"]["options"]
    assert (options["root"], options["masks"], options["labelled"]) == ("noise/val", "masks", False)
    assert options["augmentation"]["policy"] == "none"

    explain_main([*predict, "--resume", "--data.batch_size=2"])
    for option, message in (
        ("--data.masks=others", "data.options.masks was 'masks' and is 'others'"),
        ("--trainer.precision=bf16-true", "trainer.precision was '32-true' and is 'bf16-true'"),
    ):
        assert message in failure(explain_main, [*predict, "--resume", option], capsys)
    run = explain_main([*predict, "--explain.metrics=[average_drop]", "--output=asked"])
    assert run.model.explainer.metrics == ("average_drop",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--ckpt_path is missing"),
        (["--ckpt_path=gone.ckpt"], "there is no checkpoint gone.ckpt"),
        (["--ckpt_path=broken.ckpt"], "broken.ckpt is damaged or incomplete"),
        (["--ckpt_path=gone.ckpt", "--explain.methods=[gradcamm]"], "gradcamm"),
        (["--ckpt_path=gone.ckpt", "--explain.stepz=3"], "stepz"),
        (["--ckpt_path=gone.ckpt", "--model.optimizer.lr=3"], "unrecognized arguments: --optimizer.lr=3"),
    ],
)
def test_mistakes_in_explain_end_with_one_line(folder, capsys, arguments, message):
    (folder / "broken.ckpt").write_bytes(b"PK\x03\x04 no more")
    assert message in failure(explain_main, ["predict", "--data=Squares", *arguments], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*FIT, "--model.optimizer.lr=0"], "--model.optimizer.lr: expected a number above 0, got 0"),
        (
            [*FIT, "--trainer.gradient_clip_val=-1"],
            "--trainer.gradient_clip_val: expected a number of at least 0, got -1",
        ),
        ([*FIT, "--trainer.accumulate_grad_batches=0"], "--trainer.accumulate_grad_batches: expected"),
        ([*FIT, "--trainer.val_check_interval=0"], "--trainer.val_check_interval: expected"),
        ([*FIT, "--trainer.check_val_every_n_epoch=0"], "--trainer.check_val_every_n_epoch: expected"),
        ([*FIT, "--trainer.devices=-1"], "--trainer.devices -1"),
        ([*FIT, "--trainer.max_time={hour: 1}"], "--trainer.max_time {'hour': 1}"),
        ([*FIT, "--seed_everything=-1"], "--seed_everything: expected a number in [0, 4294967295], got -1"),
        (
            [*FIT, "--checkpoint.monitor=val/acc"],
            "unknown metric 'val/acc' to monitor: choose from train/loss, train/lr, val/",
        ),
        ([*FIT, "--config=early.yaml"], "EarlyStopping: unknown metric 'val/acc' to monitor: choose from train/loss"),
        ([*FIT, "--config=average.yaml"], "AveragedWeights.decay: expected a number in [0, 1), got 2"),
        ([*FIT, "--config=broken.yaml"], "--config broken.yaml, line 2, column 1: "),
        ([*FIT, "--ckpt_path=last"], "--ckpt_path last: there is no last.ckpt below logs"),
        ([*FIT, "--ckpt_path=best"], "--ckpt_path best: there is no best.ckpt below logs"),
        (
            ["validate", "--data=Squares", *MODEL, "--ckpt_path=last"],
            "--ckpt_path last: there is no last.ckpt below logs",
        ),
        ([*FIT, "--model.optimizer.lrr=1"], "model.optimizer.lrr"),
        (
            [*FIT, "--model.lr=1", "--model.mixup=1"],
            "lr is --model.optimizer.lr now, --model.mixup is --model.mixing.mixup",
        ),
        ([*FIT, "--config=flat.yaml"], "option 'model.warmup'; --model.warmup is --model.optimizer.warmup now"),
        ([*FIT, "--config=empty.yaml"], "model.mixing: expected options of the group, got nothing: leave it out"),
        ([*FIT, "--config=unknown.yaml"], "trainer.max_epoch"),
        ([*FIT, "--trainer.strategy=fsdp"], "`fsdp` requires a GPU"),
        ([*FIT, "--data=Circles"], "Circles"),
        ([*FIT, "--config=gone.yaml"], "gone.yaml"),
        ([*FIT, "--model.architecture=vit_bse"], "unknown architecture 'vit_bse'"),
        ([*FIT, "--model.weights=gone.safetensors"], "there is no checkpoint gone.safetensors"),
        ([*FIT, "--data.num_classes=4"], "set --model.num_classes 4"),
        ([*FIT, "--ckpt_path=gone.ckpt", "--trainer.max_steps=9"], "not both: set one to -1"),
        ([*FIT, "--ckpt_path=gone.ckpt"], "there is no checkpoint gone.ckpt"),
        ([*FIT, "--ckpt_path=weights.safetensors"], "use --model.weights"),
        ([*FIT, "--trainer.max_epochs=-1"], "set --trainer.max_epochs"),
        (["validate", "--data=Squares", *MODEL], "--ckpt_path is missing: validate would evaluate a network of random"),
        (["test", "--data=Squares", *MODEL], "--ckpt_path is missing: test would evaluate a network of random"),
        (
            ["fit", "--data=ImageFolder", "--data.root=x", "--data.batch_size=0", *MODEL],
            "error: data: batch_size: expected a num",
        ),
        (["fat"], "fat"),
    ],
)
def test_mistakes_in_train_end_with_one_line(folder, capsys, arguments, message):
    (folder / "weights.safetensors").touch()
    (folder / "unknown.yaml").write_text("trainer: {max_epoch: 3}")
    (folder / "flat.yaml").write_text("model: {warmup: 0.2}")
    (folder / "empty.yaml").write_text("model:\n  mixing:\n    # mixup: 0.8")
    (folder / "broken.yaml").write_text("trainer:\n\tmax_epochs: 3")
    for name, callback, options in (
        ("early", "EarlyStopping", "{monitor: val/acc}"),
        ("average", "AveragedWeights", "{decay: 2}"),
    ):
        text = f"trainer: {{callbacks: [{{class_path: {callback}, init_args: {options}}}]}}"
        (folder / f"{name}.yaml").write_text(text)
    assert message in failure(
        train_main, [*arguments, "--trainer.logger=false"][: len(arguments) + (arguments != ["fat"])], capsys
    )


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_logger_that_is_not_installed_ends_with_one_line(capsys):
    assert "wandb" in failure(train_main, [*FIT, f"--config={ROOT}/configs/logger/wandb.yaml"], capsys)


def test_a_traceback_can_be_had(monkeypatch):
    monkeypatch.setenv("GMARPP_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"--model\.optimizer\.lr: expected"):
        train_main([*FIT, "--model.optimizer.lr=0"])


def test_an_error_in_a_loaders_worker_is_one_line():
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nValueError: photo.jpg is truncated: replace it\n'
    )
    assert command.one_line(error) == "photo.jpg is truncated: replace it"


@pytest.mark.parametrize(
    ("script", "offered", "other"), [("train.py", "validate", "predict"), ("explain.py", "predict", "validate")]
)
def test_scripts_offer_help(script, offered, other, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert offered in out
    assert other not in out
