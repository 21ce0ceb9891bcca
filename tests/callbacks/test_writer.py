"""What a predict run writes."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from fake_run import METHODS, FakeExplaining, Squares, SquaresData, predict
from PIL import Image
from signed_method import Downwards
from torch.utils.data import DataLoader

import gmarpp
from gmarpp.callbacks import ExplanationWriter
from gmarpp.data import ImageFolder, Preprocessing
from gmarpp.run.reader import load_explanations


def test_a_run_writes_everything_that_is_promised(tmp_path):
    predict(tmp_path / "run", shard_size=4, figure_formats=["png", "svg"])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    tables = {"explanations.csv", "summary.csv", "run.json", "report.html"}
    figures = {"comparison.png", "comparison.svg", "curves.png", "curves.svg"}
    assert names == tables | figures | {"maps", "images", "overlays"}
    assert len(list((tmp_path / "run" / "maps").glob("*.safetensors"))) == 3
    with (tmp_path / "run" / "explanations.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 11 * 2
    assert [row["index"] for row in table[::2]] == [str(index) for index in range(11)]
    for row in table:
        with (
            Image.open(tmp_path / "run" / row["overlay"]) as overlay,
            Image.open(tmp_path / "run" / row["image"]) as image,
        ):
            assert image.size == (24, 16)
            assert overlay.size == (24 * 7, 16 * 7)
    assert len({row["overlay"] for row in table}) == len(table)
    assert table[0]["label"] == ""
    assert table[6]["target_name"] == "dog"


def test_what_is_read_back_is_what_was_explained(tmp_path):
    data = SquaresData()
    predict(tmp_path / "run", data)
    explanations = load_explanations(tmp_path / "run")
    images = data.dataset.images
    assert torch.equal(explanations.maps("rollout"), images[:, 1, ::4, ::4])
    assert explanations.rows[3]["path"] == "x" * 300
    insertion, deletion = explanations.mean_curves()
    assert insertion["gmarpp_l1"].mean == pytest.approx(images[:, 0, :5, 0].mean(0).numpy(), rel=1e-5)
    assert deletion["rollout"].mean == pytest.approx(images[:, 1, 0, :5].mean(0).numpy(), rel=1e-5)


def test_run_json_describes_the_run(tmp_path):
    module = FakeExplaining()
    module.checkpoint_path, module.checkpoint_sha256 = "checkpoints/x.ckpt", "ab" * 32
    predict(tmp_path / "run", module=module)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "complete"
    assert run["explained"] == run["data"]["images"] == 11
    assert run["checkpoint"] == {"path": "checkpoints/x.ckpt", "sha256": "ab" * 32}
    assert run["explainer"]["methods"] == list(METHODS)
    assert run["class_names"] == ["cat, moggy", "dog"]
    assert set(run["versions"]) >= {"gmarpp", "torch", "lightning", "timm", "python"}


class ForAndAgainst(FakeExplaining):
    """Its second method is signed: for the class on the left, against it on the right."""

    def __init__(self):
        super().__init__(methods=("rollout", "downwards"))

    def predict_step(self, batch, batch_idx):
        explained = super().predict_step(batch, batch_idx)
        signs = torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0, -1.0]).expand(len(explained.index), 4, 6)
        return replace(explained, maps={**explained.maps, "downwards": signs})


def test_signed_methods_are_drawn_and_recorded_as_such(tmp_path):
    gmarpp.register_method(Downwards())
    folder = tmp_path / "run"
    predict(folder, SquaresData(count=3), ForAndAgainst())
    run = json.loads((folder / "run.json").read_text())
    assert (run["signed_methods"], run["writer"]["signed_maps"]) == (["downwards"], "diverging")
    stored = load_explanations(folder)
    assert stored.signed_methods == ("downwards",)
    assert '"signed":true' in (folder / "report.html").read_text()
    with Image.open(stored.overlay_path(0, "downwards")) as picture:
        left, middle, right = (
            picture.getpixel((x, picture.height // 2)) for x in (0, picture.width // 2, picture.width - 1)
        )
    assert left[0] > left[2] + 50
    assert middle[0] == middle[1] == middle[2]
    assert right[2] > right[0] + 50
    with pytest.raises(ValueError, match=r"writer\.signed_maps was 'diverging' and is 'positive'"):
        predict(folder, SquaresData(count=3), ForAndAgainst(), resume=True, signed_maps="positive")


def test_maps_alone_need_no_metrics(tmp_path):
    predict(tmp_path / "run", module=FakeExplaining(metrics=()), overlays=False, report=False, figure_images=0)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"explanations.csv", "run.json", "maps", "images"}


def test_metrics_of_objects_need_objects(tmp_path):
    with pytest.raises(ValueError, match=r"explain\.metrics: iou compare.*neither boxes nor masks"):
        predict(tmp_path / "run", module=FakeExplaining(metrics=("insertion_auc", "iou")))
    assert list(tmp_path.iterdir()) == []


def test_a_box_that_no_reader_would_take_is_refused_at_once(tmp_path):
    class Boxed(FakeExplaining):
        def predict_step(self, batch, batch_idx):
            return replace(
                super().predict_step(batch, batch_idx), boxes=torch.full((len(batch["index"]), 4), torch.nan)
            )

    with pytest.raises(ValueError, match=r"rows\[0\]\.box: expected four finite numbers"):
        predict(tmp_path / "run", module=Boxed())
    assert list(tmp_path.iterdir()) == []


def test_the_data_module_is_left_as_it_was(tmp_path):
    data = SquaresData()
    predict(tmp_path / "run", data)
    with pytest.raises(RuntimeError):
        predict(tmp_path / "other", data, FakeExplaining(stop_at=2))
    assert "predict_dataloader" not in vars(data)
    own = data.predict_dataloader = lambda: DataLoader(data.dataset, batch_size=3)
    predict(tmp_path / "third", data)
    assert vars(data)["predict_dataloader"] is own


def test_a_limit_is_meant_for_each_rank(tmp_path):
    data = SquaresData()
    trainer = SimpleNamespace(
        datamodule=data,
        world_size=2,
        precision="32-true",
        limit_predict_batches=2,
        is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda error: error),
    )
    batches = ExplanationWriter(tmp_path / "run")._pending(trainer, FakeExplaining(), data.predict_dataloader())
    assert batches == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_an_index_that_is_not_the_position_is_refused(tmp_path):
    class Renumbered(Squares):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "index": index + 5}

    data = SquaresData()
    data.dataset = Renumbered(11)
    with pytest.raises(
        ValueError, match=r"index: expected the positions of the images in the data set, \[0, 1\], got \[5, 6\]"
    ):
        predict(tmp_path / "run", data)


def test_data_loaders_alone_can_be_explained_but_not_resumed(tmp_path):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=[ExplanationWriter(tmp_path / "run")], **options)
    trainer.predict(FakeExplaining(), DataLoader(Squares(3), batch_size=2), return_predictions=False)
    assert len(load_explanations(tmp_path / "run")) == 3
    trainer = L.Trainer(callbacks=[ExplanationWriter(tmp_path / "run", resume=True)], **options)
    with pytest.raises(ValueError, match="resume needs a data module"):
        trainer.predict(FakeExplaining(), DataLoader(Squares(3), batch_size=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colormap": "rainbow"}, "rainbow.*inferno"),
        ({"figure_formats": ["bmp"]}, "bmp.*png, pdf, svg"),
        ({"opacity": 50}, "opacity: expected 0 to 1, got 50"),
        ({"signed_maps": "both"}, "unknown signed_maps 'both': choose from diverging, positive"),
        ({"shard_size": 0}, r"write\.shard_size: expected a number of at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ExplanationWriter("out", **options)


def test_overlays_lie_on_the_original_where_preprocessing_took_the_image_from(tmp_path):
    (tmp_path / "photos").mkdir()
    rng, shapes = np.random.default_rng(0), {"wide": (128, 240), "tall": (256, 128)}
    pictures = {name: rng.integers(0, 256, (*shape, 3), np.uint8) for name, shape in shapes.items()}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / "photos" / f"{name}.png")
    preprocessing = Preprocessing((16, 16), (0, 0, 0), (1, 1, 1), crop_pct=0.5)
    data = ImageFolder(str(tmp_path / "photos"), preprocessing=preprocessing, num_workers=0)
    predict(tmp_path / "run", data, overlays="original")
    explanations = load_explanations(tmp_path / "run")
    for row in explanations.rows:
        with Image.open(explanations.overlay_path(row["index"], "rollout")) as overlay:
            drawn = np.asarray(overlay).astype(int)
        before = pictures[row["path"].removesuffix(".png")]
        assert drawn.shape == before.shape, "its own aspect and resolution"
        changed = (drawn != before).any(axis=2)
        # At crop_pct 0.5 the network sees the central square of half the short side.
        height, width = before.shape[:2]
        side = min(height, width) // 4
        expected = np.zeros((height, width), dtype=bool)
        expected[height // 2 - side : height // 2 + side, width // 2 - side : width // 2 + side] = True
        assert not changed[~expected].any()
        assert changed[expected].mean() > 0.9
    assert json.loads((tmp_path / "run" / "run.json").read_text())["writer"]["overlays"] == "original"


def test_originals_of_a_foreign_data_set_are_not_guessed(tmp_path):
    with pytest.raises(ValueError, match=r"write\.overlays original: expected .* got a Squares"):
        predict(tmp_path / "run", SquaresData(), overlays="original")
    assert not (tmp_path / "run").exists()
