"""Command lines that are unusual: nothing is lost, no option is ignored, and what cannot run says so in one line."""

import csv
import runpy
import sys

import lightning
import pytest
import torch
from noise import write_noise
from squares import Squares
from test_cli import FIT, QUIET, ROOT, failure

from gmarpp.cli.explain import explain_main
from gmarpp.cli.train import train_main


class Burst(lightning.Callback):
    """Gradients that overflow once, after a loss that is finite."""

    step = 4

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            for parameter in module.parameters():
                parameter.grad.fill_(torch.inf)


class BurstAtTheEnd(Burst):
    """The same in the last step before the epoch's checkpoint."""

    step = 5


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert Squares
    return tmp_path


@pytest.fixture
def predict(folder):
    train_main([*FIT, "--trainer.logger=false", "--trainer.max_epochs=1"])
    write_noise(folder / "photos")
    return ["predict", "--data=ImageFolder", "--data.root=photos/val", "--data.num_workers=0", *QUIET,
            "--ckpt_path=logs/checkpoints/last.ckpt", "--explain.methods=[rollout]",
            "--explain.metrics=[insertion_auc]", "--explain.steps=2"]  # fmt: skip


@pytest.mark.parametrize(("burst", "message"), [("Burst", "not finite at step 5"), ("BurstAtTheEnd", "not finite")])
def test_weights_that_are_not_finite_replace_no_checkpoint(folder, burst, message, capsys):
    options = [*FIT, "--trainer.max_epochs=3", "--trainer.logger=false"]
    assert message in failure(train_main, [*options, f"--trainer.callbacks+=test_unusual_runs.{burst}"], capsys)
    last = torch.load(folder / "logs/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    best = torch.load(folder / "logs/checkpoints/best.ckpt", weights_only=True)
    for each in (*last["state_dict"].values(), *best["state_dict"].values()):
        assert each.isfinite().all()
    assert train_main([*options, "--ckpt_path=last"]).trainer.global_step == 9


def test_the_trainers_folder_is_where_the_logs_are(folder):
    train_main([*FIT, "--trainer.max_epochs=1", "--trainer.default_root_dir=elsewhere"])
    assert (folder / "elsewhere/version_0/checkpoints/last.ckpt").is_file()
    assert list((folder / "elsewhere/version_0").glob("*tfevents*"))
    assert not (folder / "logs").exists()
    again = [*FIT, "--trainer.default_root_dir=elsewhere", "--ckpt_path=last"]
    assert train_main(again).trainer.ckpt_path == "elsewhere/version_0/checkpoints/last.ckpt"


def test_the_printed_configuration_runs(folder, predict, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        explain_main([*predict, "--output=out", "--print_config"])
    assert stop.value.code == 0
    (folder / "printed.yaml").write_text(capsys.readouterr().out)
    explain_main(["predict", "--config=printed.yaml"])
    assert (folder / "out/report.html").is_file()


def test_a_process_may_have_no_standard_output(folder, predict, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    explain_main([*predict, "--output=out"])
    assert (folder / "out/report.html").is_file()


def test_targets_that_are_the_same_count_once(folder, predict):
    explain_main([*predict, "--output=out", "--explain.target=[1,1,2]"])
    with (folder / "out/explanations.csv").open(newline="") as file:
        assert [row["target"] for row in csv.DictReader(file)] == ["1", "2"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--explain.target=[]"], "explain.target: expected at least one class, got none"),
        (["--trainer.limit_predict_batches=0"], "--trainer.limit_predict_batches is 0"),
        (["--explain.methods=rollout"], "Expected a list, '[rollout]', got rollout"),
        pytest.param(
            ["--trainer.accelerator=gpu"],
            "--trainer.accelerator gpu: No supported gpu backend found",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--explain.steps=0"], "explain.steps: expected a number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_explained_says_so(folder, predict, options, message, capsys):
    assert message in failure(explain_main, [*predict, "--output=out", *options], capsys)
    assert not (folder / "out").exists()


def test_nothing_to_train_on_says_so(capsys):
    assert "--trainer.limit_train_batches is 0" in failure(
        train_main, [*FIT, "--trainer.limit_train_batches=0"], capsys
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [("path,label\n", "t.csv has no rows"), ("path;label\na.png;b\n", "separate columns by commas")],
)
def test_tables_that_hold_nothing_say_so(folder, predict, text, message, capsys):
    (folder / "t.csv").write_text(text)
    of_table = {"--data=ImageFolder": "--data=Table", "--data.root=photos/val": "--data.table=t.csv"}
    command = [of_table.get(each, each) for each in predict]
    assert message in failure(explain_main, [*command, "--output=out"], capsys)


@pytest.mark.parametrize(("script", "command"), [("train.py", "fit"), ("explain.py", "predict")])
def test_scripts_show_the_short_help_of_a_command(script, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, command, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) < 50
