"""Each logger gets the monitor's pictures in its own way: run by the real packages where they are installed."""

import json
import re
import zipfile
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, WandbLogger
from PIL import Image
from quiet_trainer import quiet_trainer
from squares import Squares

from gmarpp.callbacks import AttributionMonitor
from gmarpp.explainer import Explainer
from gmarpp.training.module import ViTClassifier

NAMES = ("attribution_maps/gmarpp_l1", "attribution_maps/rollout", "attribution/curves")


def monitored(folder, loggers):
    """Validate after two training batches, which is step 1, and after four, step 3."""
    L.seed_everything(0)
    explainer = Explainer(methods=["gmarpp_l1", "rollout"], metrics=["insertion_auc"], steps=2)
    monitor = AttributionMonitor(explainer, images=2, grid_images=2)
    run = quiet_trainer(
        folder, callbacks=[monitor], logger=loggers, max_epochs=2, enable_checkpointing=False, limit_train_batches=2
    )
    network = ViTClassifier("test_vit", num_classes=3, image_size=32, pretrained=False, model_args={"depth": 1})
    run.fit(network, Squares())


def pictures(folder):
    found = {}
    for path in sorted(folder.glob("attribution*/*/*.png")):
        name = path.parent.relative_to(folder).as_posix()
        found.setdefault(name, {})[int(path.stem)] = pixels(path)
    return found


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The pictures of a run without a logger."""
    folder = tmp_path_factory.mktemp("none")
    monitored(folder, False)
    return pictures(folder)


def same(found, expected):
    assert set(found) == set(expected) == {1, 3}
    return all((found[step] == expected[step]).all() for step in expected)


def test_without_a_logger_pictures_are_files_in_the_trainers_folder(expected):
    assert set(expected) == set(NAMES)
    grid = expected["attribution_maps/rollout"]
    assert not np.array_equal(grid[1], grid[3]), "the network learns"
    assert not np.array_equal(grid[1], expected["attribution_maps/gmarpp_l1"][1])


def test_csv_logs_have_them_beside_the_table(tmp_path, expected):
    logger = CSVLogger(tmp_path, name="csv", version="run")
    monitored(tmp_path, logger)
    found = pictures(tmp_path / "csv" / "run")
    assert all(same(found[name], expected[name]) for name in NAMES)
    lines = [line.split(",") for line in (tmp_path / "csv" / "run" / "metrics.csv").read_text().splitlines()]
    column = lines[0].index("attribution/rollout/insertion_auc")
    assert {int(line[lines[0].index("step")]) for line in lines[1:] if line[column]} == {1, 3}
    assert not list(tmp_path.glob("attribution*"))


def test_wandb_gets_images(tmp_path, expected, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monitored(tmp_path, WandbLogger(save_dir=tmp_path, offline=True))
    wandb.finish()
    (files,) = tmp_path.glob("wandb/offline-run-*/files/media/images")
    for name in NAMES:
        logged = sorted(files.glob(f"{name}_*.png"), key=wandb_step)
        assert all((pixels(path) == expected[name][step]).all() for path, step in zip(logged, (1, 3), strict=True))


def wandb_step(path):
    return int(path.stem.split("_")[-2])


def test_mlflow_gets_images_with_their_steps(tmp_path, expected, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("digits", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    monitored(tmp_path, logger)
    found = {}
    for path in (tmp_path / "mlruns").rglob("images/*.png"):
        # Separators differ with the version: `attribution_maps~rollout+step+3+timestamp+….png`.
        key, step = re.match(r"(.+?)[%+]step[%+](\d+)", path.name).groups()
        found.setdefault(re.sub("[#~]", "/", key), {})[int(step)] = pixels(path)
    assert all(same(found[name], expected[name]) for name in NAMES)


def test_comet_gets_images_with_their_steps(tmp_path, expected):
    comet_ml = pytest.importorskip("comet_ml")
    logger = CometLogger(online=False)
    # Lightning disables experiments that are offline.
    logger._experiment = comet_ml.OfflineExperiment(offline_directory=str(tmp_path), disabled=False)
    monitored(tmp_path, logger)
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    found = {}
    with zipfile.ZipFile(archive) as content:
        messages = [json.loads(line)["payload"] for line in content.read("messages.json").decode().splitlines()]
        for each in messages:
            about = each.get("additional_params") or {}
            name = about.get("figName", "")
            if name in NAMES:
                with content.open(Path(each["file_path"]).name) as file:
                    found.setdefault(name, {})[about["step"]] = pixels(file)
    assert all(same(found[name], expected[name]) for name in NAMES)
