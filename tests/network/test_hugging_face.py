import json

import pytest
import torch
from timm.data import resolve_model_data_config

from gmarpp.network.files.load import load_model
from gmarpp.network.files.save import save_weights


def hugging_face_folder(folder, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, patch_size=8, **options
    )
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # the default initialization hides swapped biases and norms
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 32, "id2label": {0: "ant", 1: "bee", 2: "cat"}},
        {"image_size": 48, "num_labels": 7, "qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 0.1},
    ],
)
def test_hugging_face_folder_gives_equal_logits(tmp_path, options):
    source = hugging_face_folder(tmp_path, **options)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "size": 32})
    )
    loaded = load_model(tmp_path)
    image = torch.randn(2, 3, options["image_size"], options["image_size"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), source(pixel_values=image).logits, rtol=1e-4, atol=1e-5)
    assert loaded.class_names[:2] == (("ant", "bee") if "id2label" in options else ("LABEL_0", "LABEL_1"))
    config = resolve_model_data_config(loaded)
    assert (config["mean"], config["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 1.0)
    assert config["crop_mode"] == "squash"


def test_hugging_face_import_survives_an_export(tmp_path):
    hugging_face_folder(tmp_path / "source", image_size=32, layer_norm_eps=0.1)
    loaded = load_model(tmp_path / "source")
    save_weights(loaded, tmp_path / "export.safetensors")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_model(tmp_path / "export.safetensors")(image), loaded(image))


def test_folders_without_a_classifier_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors, .*index\.json"):
        load_model(tmp_path)
