"""Methods and metrics of one's own by the commands, without a line of the package changed."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_code import MODULE, install_package
from small_model import MODEL
from squares import Squares

import gmarpp
from gmarpp.attribution import registry
from gmarpp.cli import main
from gmarpp.cli.explain import explain_main
from gmarpp.network.files.save import save_weights
from gmarpp.training.module import ViTClassifier

ROOT = Path(__file__).parents[2]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
METHODS = (
    "[{class_path: my_own_code.Center, init_args: {width: 2}}, "
    "{class_path: gmarpp.FunctionMethod, init_args: "
    "{name: saliency, function: my_own_code.saliency, label: Saliency, color: '#17a2a2'}}, "
    "{class_path: gmarpp.attribution.GMARPlusPlus, init_args: "
    "{name: late, label: Late, alpha: 0.5, norm: 2, start_layer: 1}}, "
    "brightness, rollout]"
)
NAMES = ["center", "saliency", "late", "brightness", "rollout"]
PREDICT = ["predict", "--ckpt_path=vit.safetensors", "--data=squares.Squares", "--data.count=4", *QUIET, "--output=out"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a checkpoint and a module; a package that announces more is installed."""
    torch.manual_seed(0)
    classifier = ViTClassifier("test_vit", 3, 32, pretrained=False, model_args={"depth": 2})
    save_weights(classifier.model, tmp_path / "vit.safetensors")
    (tmp_path / "my_own_code.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gmarpp"])
    monkeypatch.setattr(sys, "path", [str(install_package(tmp_path / "installed", f"own_{tmp_path.name}")), *sys.path])
    monkeypatch.delitem(sys.modules, "my_own_code", raising=False)
    return tmp_path


def failure(capsys, run, arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    assert stop.value.code
    return capsys.readouterr().err.splitlines()[-1]


def test_predict_takes_them_from_the_command_line(folder):
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), str(folder / "installed")))
    command = [sys.executable, str(ROOT / "explain.py"), *PREDICT, f"--explain.methods={METHODS}"]
    command += ["--explain.metrics=[insertion_auc, peak]", "--explain.steps=2"]
    run = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    stored = gmarpp.load_explanations(folder / "out")
    assert (list(stored.methods), stored.signed_methods) == (NAMES, ("brightness",))

    squares = Squares(count=4).val_dataloader().dataset
    images = torch.stack([squares[index]["image"] for index in range(3)])
    with (folder / "out/explanations.csv").open() as table:
        rows = [row for row in csv.DictReader(table) if row["method"] == "brightness"]
    bright = torch.nn.functional.adaptive_avg_pool2d(images.mean(1), stored.maps("brightness").shape[1:])
    assert [float(row["peak"]) for row in rows] == pytest.approx(bright.flatten(1).amax(1).tolist(), rel=1e-4)
    assert all(len(list((folder / "out/overlays" / name).iterdir())) == 3 for name in NAMES)

    described = json.loads((folder / "out/run.json").read_text())["explainer"]
    assert described["methods"] == NAMES
    own = described["own_code"]
    assert own["methods"]["center"] == {"class": "my_own_code.Center", "options": {"width": 2.0}}
    assert own["methods"]["saliency"]["options"]["function"] == "my_own_code.saliency"
    assert own["methods"]["late"]["options"]["start_layer"] == 1
    assert own["metrics"]["peak"].endswith(".Peak")
    report = (folder / "out/report.html").read_text()
    assert '"label":"Center first","color":"#123456"' in report
    assert '"label":"Saliency","color":"#17a2a2"' in report
    assert '"name":"peak","label":"Peak value","higher":false' in report


def test_a_run_is_resumed_with_the_same_options_alone(folder, capsys):
    one = [
        *PREDICT,
        "--explain.metrics=[]",
        "--explain.methods=[{class_path: my_own_code.Center, init_args: {width: %s}}]",
    ]
    explain_main([each.replace("%s", "2") for each in one])
    explain_main([each.replace("%s", "2") for each in [*one, "--resume"]])
    registry._OWN.clear()  # as in a process of its own
    error = failure(capsys, explain_main, [each.replace("%s", "3") for each in [*one, "--resume"]])
    center = "{'center': {'class': 'my_own_code.Center', 'options': {'width': 2.0}}}"
    assert f"explainer.own_code was {{'methods': {center}}} and is {{" in error


def test_the_sanity_check_takes_them(folder):
    main(
        ["sanity", "--ckpt_path=vit.safetensors", "--data=Digits", "--data.root=data", "--data.train_images=2",
         "--data.val_images=1", "--data.num_workers=0", "--images=3", f"--methods={METHODS}", "--output=out"]
    )  # fmt: skip
    with (folder / "out/sanity.csv").open() as table:
        rows = {row["method"]: row for row in csv.DictReader(table)}
    assert list(rows) == NAMES
    assert float(rows["center"]["embedding"]) == 1
    assert float(rows["saliency"]["embedding"]) < 0.9


def test_the_monitor_takes_them_from_a_file(folder):
    (folder / "own.yaml").write_text(
        "trainer:\n  callbacks:\n  - class_path: AttributionMonitor\n    init_args:\n      images: 3\n"
        f"      explainer: {{steps: 2, metrics: [insertion_auc, peak], methods: {METHODS}}}\n"
    )
    main(
        ["fit", "--config=own.yaml", "--data=squares.Squares", *MODEL, *QUIET, "--trainer.enable_model_summary=false",
         "--trainer.logger=false", "--trainer.max_epochs=1", "--checkpoint.monitor=attribution/saliency/peak"]
    )  # fmt: skip
    best = torch.load(folder / "logs/checkpoints/best.ckpt", weights_only=True)
    assert "attribution/saliency/peak" in (folder / "logs/checkpoints/best.md").read_text()
    assert best["global_step"] == 3


def test_the_overview_lists_what_packages_announce(folder, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "random, brightness" in text
    assert "sparseness, peak" in text


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("[{class_path: my_own_code.Missing}]", "module 'my_own_code' has no attribute 'Missing'"),
        ("[{class_path: my_own_code.Center, init_args: {wide: 2}}]", "Option 'wide' is not accepted"),
        (
            "[{class_path: gmarpp.attribution.Rollout, init_args: {alpha: 2}}]",
            "'rollout' is the name of another method",
        ),
        (
            "[{class_path: gmarpp.attribution.Rollout, init_args: {alpha: -2}}]",
            "error: rollout: alpha: expected 0 or more, got -2.0",
        ),
        (
            "[{class_path: gmarpp.FunctionMethod, init_args: {name: mine, function: my_own_code.none}}]",
            "no attribute 'none'",
        ),
        (
            "[{class_path: torch.nn.Linear, init_args: {in_features: 2, out_features: 2}}]",
            "torch.nn.Linear does not correspond to a subclass of AttributionMethod",
        ),
        ("[brightnes]", "unknown method 'brightnes': choose from "),
    ],
)
def test_mistakes_end_with_one_line(folder, capsys, methods, message):
    line = failure(capsys, explain_main, [*PREDICT, f"--explain.methods={methods}", "--explain.metrics=[]"])
    assert line.startswith("error: ")
    assert message in line
    assert not (folder / "out").exists()
