import lightning as L
import pytest
import yaml
from quiet_trainer import quiet_trainer
from squares import Squares

from gmarpp.callbacks import AttributionMonitor, ModelCardCheckpoint
from gmarpp.explainer import Explainer
from gmarpp.network.files.load import load_model
from gmarpp.training.mixing import Mixing
from gmarpp.training.module import ViTClassifier


class Scores(L.Callback):
    """Logs a score of each validation, for a checkpoint to be chosen by."""

    def __init__(self, *scores):
        self.scores = iter(scores)

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pl_module.log("score", next(self.scores))


def fit(folder, *callbacks, epochs=2, resume=None, **options):
    network = ViTClassifier("test_vit", 3, 32, pretrained=False, model_args={"depth": 2}, mixing=Mixing(mixup=0.8))
    run = quiet_trainer(
        folder,
        max_epochs=epochs,
        callbacks=[*callbacks, ModelCardCheckpoint(dirpath=folder, filename="best", **options)],
    )
    run.fit(network, Squares(), ckpt_path=resume)
    return run


def front_and_text(path):
    _, front, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def cells(text, name):
    """The row of a table that begins with a name."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_card_says_what_the_run_was(tmp_path):
    monitor = AttributionMonitor(
        Explainer(methods=["gmarpp_l1", "rollout"], metrics=["insertion_auc", "deletion_auc"], steps=3), images=3
    )
    run = fit(tmp_path, monitor, epochs=1, monitor="attribution/gmarpp_l1/insertion_auc", mode="max")
    front, text = front_and_text(tmp_path / "best.md")
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    (result,) = front["model-index"][0]["results"]
    assert front["library_name"] == "timm"
    assert "base_model" not in front
    assert result["dataset"]["type"] == "Squares"
    assert result["metrics"] == [{"type": "accuracy", "value": pytest.approx(logged["val/accuracy"])}]
    assert "test_vit on Squares" in text
    assert "For 3 classes: Color 0, Color 1, Color 2." in text
    assert cells(text, "training") == ["24"]
    assert cells(text, "validation") == ["23"]
    assert float(cells(text, "accuracy")[0]) == pytest.approx(logged["val/accuracy"], rel=1e-3)
    assert float(cells(text, "loss")[0]) == pytest.approx(logged["val/loss"], rel=1e-3)
    head = cells(text, "method")
    for name, method in (("GMAR++ (L1)", "gmarpp_l1"), ("Rollout", "rollout")):
        for label, metric in (("Insertion AUC", "insertion_auc"), ("Deletion AUC", "deletion_auc")):
            value = float(cells(text, name)[head.index(label)])
            assert value == pytest.approx(logged[f"attribution/{method}/{metric}"], rel=1e-3)
    assert cells(text, "steps") == ["3"]
    assert cells(text, "mixing.mixup") == ["0.8"]
    assert cells(text, "start") == ["random weights"]
    assert cells(text, "lightning") == [L.__version__]
    assert load_model(tmp_path / "best.ckpt").class_names == ("Color 0", "Color 1", "Color 2")


def test_card_is_of_the_best_checkpoint(tmp_path):
    fit(tmp_path, Scores(1.0, 3.0, 2.0), epochs=3, monitor="score", mode="max")
    assert cells(front_and_text(tmp_path / "best.md")[1], "steps") == ["6"]
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "best.md"}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_best_is_remembered_by_a_run_that_goes_on_in_another_folder(tmp_path):
    def resumed(name, score):
        resume = {"epochs": 2, "resume": tmp_path / "last.ckpt", "monitor": "score", "mode": "max"}
        return fit(tmp_path / name, Scores(score), **resume).checkpoint_callback

    first = tmp_path / "first"
    fit(first, Scores(3.0), epochs=1, monitor="score", mode="max").save_checkpoint(tmp_path / "last.ckpt")
    worse = resumed("worse", 2.0)
    assert worse.best_model_score == 3
    assert worse.best_model_path == str(first / "best.ckpt")
    assert not list((tmp_path / "worse").glob("*"))
    better = resumed("better", 4.0)
    assert better.best_model_path == str(tmp_path / "better/best.ckpt")
    assert {path.name for path in first.iterdir()} == {"best.ckpt", "best.md"}
    (first / "best.ckpt").unlink()
    assert resumed("alone", 2.0).best_model_path == str(tmp_path / "alone/best.ckpt")


def test_card_goes_with_its_checkpoint(tmp_path):
    checkpoint = ModelCardCheckpoint(dirpath=tmp_path / "top", filename="{step}", monitor="score", mode="max")
    fit(tmp_path, Scores(1.0, 3.0, 2.0), checkpoint, epochs=3, model_card=False)
    assert {path.name for path in (tmp_path / "top").iterdir()} == {"step=6.ckpt", "step=6.md"}
    assert not list(tmp_path.glob("*.md")), "switched off"


def test_start_weights_are_named(tmp_path):
    run = fit(tmp_path, epochs=1)
    for options, start, base in (
        ({"pretrained": True}, "timm's test_vit", "timm/test_vit.r160_in1k"),
        ({"pretrained": True, "weights": "/home/me/start.safetensors"}, "start.safetensors", None),
    ):
        run.lightning_module.hparams.update(options)
        run.checkpoint_callback._save_checkpoint(run, str(tmp_path / "again.ckpt"))
        front, text = front_and_text(tmp_path / "again.md")
        assert front.get("base_model") == base
        assert cells(text, "start") == [start]
