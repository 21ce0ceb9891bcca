import json

import pytest
import torch
from malformed import CLASSES, CONFIG, HYPER_PARAMETERS, PREPROCESSOR, TINY, as_hugging_face
from safetensors import safe_open
from safetensors.torch import save_file

from gmarpp.network.build import build_model
from gmarpp.network.files.save import save_weights


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = build_model("vit_tiny_patch16_224", 3, 32, TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.classes = model.class_names = tuple(CLASSES)
    return model


@pytest.fixture
def write(network, tmp_path):
    """Writes one of the formats, with its description or state dict changed."""

    def write(kind, change=lambda description, state: None):
        state = {key: value.clone() for key, value in network.state_dict().items()}
        if kind == "safetensors":
            save_weights(network, tmp_path / "x.safetensors")
            with safe_open(tmp_path / "x.safetensors", "pt") as file:
                metadata = {
                    key: value for key, value in file.metadata().items() if key not in ("content_sha256", "digest")
                }
            change(metadata, state)
            save_file(state, tmp_path / "x.safetensors", metadata=metadata)
            return tmp_path / "x.safetensors"
        if kind == "ckpt":
            options = json.loads(json.dumps(HYPER_PARAMETERS))
            content = {"hyper_parameters": options, "classes": list(CLASSES), "class_names": list(CLASSES)}
            change({"content": content, **options}, state)
            content["state_dict"] = {f"model.{key}": value for key, value in state.items()}
            torch.save(content, tmp_path / "x.ckpt")
            return tmp_path / "x.ckpt"
        if kind == "pth":
            torch.save({"arch": "vit_tiny_patch16_224", "state_dict": state}, tmp_path / "x.pth")
            return tmp_path / "x.pth"
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        config, preprocessor = json.loads(json.dumps([CONFIG, PREPROCESSOR]))
        theirs = as_hugging_face(state)
        change({"config": config, "preprocessor": preprocessor}, theirs)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        save_file(theirs, folder / "model.safetensors")
        return folder

    return write
