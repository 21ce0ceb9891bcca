import re

import lightning as L
import pytest
from squares import Squares

from gmarpp.callbacks import ProgressLines
from gmarpp.training.module import ViTClassifier


@pytest.fixture
def module():
    return ViTClassifier("test_vit", num_classes=3, image_size=32, pretrained=False, model_args={"depth": 1})


def trainer(tmp_path, seconds, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=[ProgressLines(seconds)],
        **{**quiet, "enable_progress_bar": False, "max_epochs": 2, **options},
    )  # fmt: skip


def test_every_stage_says_how_far_it_is(tmp_path, module, capsys):
    run = trainer(tmp_path, 0.0)
    run.fit(module, Squares())
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("fit: step")]
    assert [line.split(",")[0] for line in steps] == [f"fit: step {step} of 6" for step in range(1, 7)]
    assert all(
        re.fullmatch(r"fit: step . of 6, loss [\d.]+, [\d.]+ images/s, \d:\d\d:\d\d left", line) for line in steps
    )
    assert steps[-1].endswith("0:00:00 left")
    for stage, loop in (("validate", run.validate), ("test", run.test)):
        loop(module, Squares(), verbose=False)
        last = capsys.readouterr().out.splitlines()[-1]
        assert re.fullmatch(rf"{stage}: batch 3 of 3, [\d.]+ images/s, 0:00:00 left", last)
    module.explainer = lambda model, batch: None
    run.predict(module, datamodule=Squares())
    assert "predict: batch 3 of 3, " in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"seconds": 3600.0}, {"seconds": 0.0, "enable_progress_bar": True}])
def test_no_line_before_its_time_or_beside_a_bar(tmp_path, module, capsys, options):
    trainer(tmp_path, **options).fit(module, Squares())
    assert "fit: step" not in capsys.readouterr().out
