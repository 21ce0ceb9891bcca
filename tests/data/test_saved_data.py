"""Data sets that `save_to_disk` wrote, splits by any of their usual names, and streams with unreadable images."""

import datasets
import pytest
from miniature import PLAIN, picture
from PIL import Image

from gmarpp.data import HubDataset

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rows(count, start=0):
    table = {"image": [picture(start + k, (20, 20)) for k in range(count)], "label": [k % 2 for k in range(count)]}
    return datasets.Dataset.from_dict(table, features=FEATURES)


def opened(path, stage, **options):
    data = HubDataset(str(path), preprocessing=PLAIN, num_workers=0, batch_size=4, **options)
    data.prepare_data()
    data.setup(stage)
    return data


def test_saved_splits_are_found_by_their_usual_names(tmp_path):
    datasets.DatasetDict({"train": rows(6), "validation": rows(4, 100)}).save_to_disk(tmp_path / "saved")
    data = opened(tmp_path / "saved", "fit")
    assert data.classes == ("ant", "bee")
    assert [len(data.datasets[split]) for split in ("train", "val")] == [6, 4]
    sample = opened(tmp_path / "saved", "validate").datasets["val"][1]
    expected = picture(101, (20, 20)).resize((16, 16), Image.Resampling.BILINEAR)
    assert sample["label"] == 1
    assert abs(255 * sample["image"].mean() - sum(expected.convert("L").getdata()) / 256) < 10
    streamed = opened(tmp_path / "saved", "validate", streaming=True)
    assert [batch["label"].tolist() for batch in streamed.val_dataloader()] == [[0, 1, 0, 1]]
    with pytest.raises(ValueError, match="unknown split 'fold1': choose from train, validation"):
        opened(tmp_path / "saved", "validate", val_split="fold1")


def test_a_saved_data_set_without_splits_is_for_training(tmp_path):
    rows(4).save_to_disk(tmp_path / "saved")
    data = opened(tmp_path / "saved", "predict", val_split="train")
    assert len(data.datasets["predict"]) == 4
    with pytest.raises(ValueError, match="unknown split 'valid': choose from train"):
        opened(tmp_path / "saved", "validate")


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_data_files_are_found_by_their_usual_names(tmp_path, streaming):
    files = {}
    for name in ("train", "validation"):
        files[name] = str(tmp_path / f"{name}.parquet")
        rows(4).to_parquet(files[name])
    data = opened("parquet", "validate", data_files=files, streaming=streaming)
    assert sum(len(batch["image"]) for batch in data.val_dataloader()) == 4
    with pytest.raises(ValueError, match=r"split 'fold1' of .* cannot be loaded"):
        opened("parquet", "validate", data_files=files, streaming=streaming, val_split="fold1")


def test_a_stream_skips_what_cannot_be_read(tmp_path, caplog):
    images = [
        {"bytes": b"no image", "path": None},
        *rows(3).cast_column("image", datasets.Image(decode=False))["image"],
    ]
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features=FEATURES)
    files = {"valid": str(tmp_path / "valid.parquet"), "train": str(tmp_path / "valid.parquet")}
    table.to_parquet(files["valid"])
    options = {"data_files": files, "streaming": True}
    data = opened("parquet", "validate", on_error="skip", **options)
    (batch,) = data.val_dataloader()
    assert batch["index"].tolist() == [1, 2, 3]
    assert "skipped: image valid/0 cannot be read" in caplog.text
    with pytest.raises(ValueError, match="valid/0 cannot be read"):
        list(opened("parquet", "validate", **options).val_dataloader())
    with pytest.raises(ValueError, match="balanced cannot be used with streamed data"):
        opened("parquet", "fit", balanced=True, **options)
