"""Other tasks and other data from the command line: trained, validated, explained, resumed."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from noise import write_noise

from gmarpp.cli.explain import explain_main
from gmarpp.cli.train import train_main
from gmarpp.metrics.functional import boxes_to_masks, pointing_game
from gmarpp.run.reader import load_explanations

ROOT = Path(__file__).parents[2]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = [
    *("--model.architecture=test_vit", "--model.image_size=32", "--model.pretrained=false"),
    *("--model.model_args={depth: 2}", "--model.preprocessing={crop_pct: 1.0}"),
]
LOADER = ["--data.num_workers=0", "--data.batch_size=4"]
FIT = ["fit", *SMALL, *QUIET, "--trainer.logger=false", "--trainer.max_epochs=2"]
PREDICT = ["predict", *QUIET, "--explain.methods=[gmarpp_l1,rollout]", "--explain.steps=2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return tmp_path


def records(output):
    with (Path(output) / "explanations.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def table(folder):
    root = write_noise(folder / "noise")
    rows = ["path,label,ripeness,split"]
    for split in ("train", "val"):
        for number, path in enumerate(sorted((root / split).rglob("*.png"))):
            label = {"a": "red|round", "b": "round", "c": ""}[path.parent.name]
            rows.append(f"{path.relative_to(folder)},{label},{number / 10},{split}")
    (folder / "fruit.csv").write_text("\n".join(rows))
    return "fruit.csv"


def test_labels_of_a_table_are_trained_and_explained(folder, table):
    data = ["--data=Table", f"--data.table={table}", "--data.separator=|", *LOADER]
    monitor = (
        "--trainer.callbacks+={class_path: AttributionMonitor, init_args: {images: 4, explainer: "
        "{methods: [rollout], metrics: [insertion_auc], steps: 2}}}"
    )
    task = ["--model.task=multilabel", "--model.num_classes=2", "--model.class_weights=balanced"]
    run = train_main([*FIT, *data, *task, monitor])
    assert run.trainer.checkpoint_callback.monitor == "val/average_precision"
    assert 0 < run.trainer.callback_metrics["attribution/rollout/insertion_auc"] < 1
    assert "val/average_precision" in (folder / "logs/checkpoints/best.md").read_text()
    checkpoint = "--ckpt_path=logs/checkpoints/best.ckpt"
    validated = train_main(["validate", *data, *QUIET, "--trainer.logger=false", checkpoint])
    assert set(validated.trainer.callback_metrics) == {"val/loss", "val/average_precision", "val/f1"}
    explain_main([*PREDICT, *data, checkpoint, "--output=all", "--explain.target=label"])
    rows = [record for record in records("all") if record["method"] == "rollout"]
    assert [(Path(row["path"]).parent.name, row["label_name"], row["target_name"]) for row in rows] == [
        ("a", "red", "red"), ("a", "round", "round"), ("b", "round", "round")
    ]  # fmt: skip
    model = load_explanations("all").run
    assert (model["explainer"]["score"], model["rows_per_image"], model["model"]["task"]) == (
        "sigmoid",
        2,
        "multilabel",
    )
    # photographs without labels, in two runs
    explain_main([*PREDICT, "--data=ImageFolder", "--data.root=noise/val", "--data.batch_size=1", "--output=part",
                  "--data.num_workers=0", checkpoint, "--trainer.limit_predict_batches=1"])  # fmt: skip
    first = records("part")
    explain_main([*PREDICT, "--data=ImageFolder", "--data.root=noise/val", "--data.batch_size=1", "--output=part",
                  "--data.num_workers=0", checkpoint, "--resume"])  # fmt: skip
    both = records("part")
    assert both[: len(first)] == first
    assert list(dict.fromkeys(row["path"] for row in both)) == ["a/0.png", "b/0.png", "c/0.png"]


def test_values_of_a_table_are_trained_and_explained(folder, table):
    data = ["--data=Table", f"--data.table={table}", "--data.value_columns=[ripeness]", *LOADER]
    run = train_main([*FIT, *data, "--model.task=regression"])
    assert (run.trainer.checkpoint_callback.monitor, run.trainer.checkpoint_callback.mode) == ("val/mae", "min")
    explain_main([*PREDICT, *data, "--ckpt_path=logs/checkpoints/best.ckpt", "--output=out"])
    rows = records("out")
    assert {(row["target_name"], row["target_probability"], row["label"]) for row in rows} == {("ripeness", "", "")}
    assert (folder / "out/report.html").is_file()


def test_two_classes_with_one_output(folder, table):
    data = ["--data=ImageFolder", "--data.root=noise", "--data.labelled=true", "--data.only_classes=[a,b]"]
    for split in ("train", "val"):
        (folder / "noise" / split / "c").rename(folder / f"{split}-c")
    data = [*data[:-1], *LOADER, "--data.balanced=true"]
    run = train_main([*FIT, *data, "--model.task=binary"])
    assert run.model.classes == ("b",)
    explain_main([*PREDICT, *data, "--ckpt_path=logs/checkpoints/best.ckpt", "--output=out", "--explain.target=label"])
    rows = [row for row in records("out") if row["method"] == "rollout"]
    assert [(Path(row["path"]).parent.name, row["target_name"], row["label_name"]) for row in rows] == [
        ("a", "b", ""), ("b", "b", "b")
    ]  # fmt: skip


def test_unreadable_images_are_skipped_and_counted(folder, table):
    data = ["--data=ImageFolder", "--data.root=noise", "--data.labelled=true", *LOADER]
    train_main([*FIT, *data, "--model.num_classes=3", "--trainer.max_epochs=1"])
    good = (folder / "noise/val/b/0.png").read_bytes()
    (folder / "noise/val/b/0.png").write_bytes(b"")
    data += ["--data.on_error=skip", "--ckpt_path=logs/checkpoints/best.ckpt", "--data.batch_size=1"]
    explain_main([*PREDICT, *data, "--output=out"])
    assert {row["path"] for row in records("out")} == {"val/a/0.png", "val/c/0.png"}
    run = json.loads((folder / "out/run.json").read_text())
    assert (run["skipped"], run["explained"], run["data"]["images"]) == (1, 2, 3)
    # once the image is there, the run takes it in
    (folder / "noise/val/b/0.png").write_bytes(good)
    explain_main([*PREDICT, *data, "--output=out", "--resume"])
    assert {row["path"] for row in records("out")} == {"val/a/0.png", "val/b/0.png", "val/c/0.png"}
    assert json.loads((folder / "out/run.json").read_text())["skipped"] == 0
    for path in (folder / "noise/val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit):
        explain_main([*PREDICT, *data, "--output=nothing"])
    assert not (folder / "nothing").exists()


def test_the_example_of_several_digits(folder, capsys):
    pytest.importorskip("sklearn")
    path = ROOT / "examples" / "multilabel_digits.py"
    specification = importlib.util.spec_from_file_location("multilabel_digits", path)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    example.main(folder / "digits", train=60, val=6, options=[*SMALL, *QUIET[:1], "--data.num_workers=0"])
    run = load_explanations(folder / "digits/explained")
    with (folder / "digits/pictures/digits.csv").open() as file:
        truth = [row for row in csv.DictReader(file) if row["split"] == "val"]
    expected = sorted((row["path"], example.NAMES.index(row["label"])) for row in truth)
    assert [(row["path"], row["target"]) for row in run.rows] == expected
    boxes = {(row["path"], row["label"]): [int(row[name]) / 2 for name in ("x0", "y0", "x1", "y1")] for row in truth}
    for row in run.rows:
        assert row["box"] == boxes[row["path"], run.class_name(row["target"])], "pictures of 64 pixels, seen at 32"
    maps = torch.stack([torch.as_tensor(np.array(run.map(row["index"], "rollout"))) for row in run.rows])
    masks = boxes_to_masks(torch.tensor([row["box"] for row in run.rows]), (32, 32))
    hits = pointing_game(maps, masks, reduction="none")
    np.testing.assert_allclose(run.values["rollout"]["pointing_game"], hits.numpy())
    last = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert last[0] == "all"
    assert int(last[1]) == len(truth)
    assert float(last[2 + run.methods.index("rollout")]) == pytest.approx(hits.mean().item(), abs=0.005)
