import json

import pytest
import torch

from gmarpp import export as export_file
from gmarpp.export import main, save_onnx
from gmarpp.network.build import build_model
from gmarpp.network.files.load import load_model
from gmarpp.network.files.save import save_weights
from gmarpp.network.preprocessing import set_preprocessing


@pytest.fixture
def network():
    torch.manual_seed(0)
    tiny = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    model = build_model("vit_tiny_patch16_224", 3, 32, tiny).eval()
    set_preprocessing(model, {"mean": [0.4, 0.5, 0.6], "interpolation": "bilinear"})
    model.classes, model.class_names = ("n1", "n2", "n3"), ("ant", "bée", "cat")
    return model


@pytest.fixture
def checkpoint(network, tmp_path):
    save_weights(network, tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


def test_onnx_says_what_the_network_says_for_any_batch(network, checkpoint, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "new" / "vit.onnx"
    main(["--ckpt_path", checkpoint, "--output", str(path)])
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), network(images).detach(), rtol=1e-4, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == ["ant", "bée", "cat"]
    assert json.loads(metadata["classes"]) == ["n1", "n2", "n3"]
    assert json.loads(metadata["mean"]) == [0.4, 0.5, 0.6]
    assert (metadata["interpolation"], metadata["img_size"]) == ("bilinear", "32")
    assert [file.name for file in path.parent.iterdir()] == ["vit.onnx"]


def test_safetensors_is_what_load_model_reads(network, checkpoint, tmp_path):
    main(["--ckpt_path", checkpoint, "--output", str(tmp_path / "again.safetensors")])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path / "again.safetensors")(images), network(images))


def test_what_onnx_needs_is_named(network, tmp_path, monkeypatch):
    monkeypatch.setattr(export_file, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ModuleNotFoundError, match=r"ONNX needs onnxscript: pip install 'gmarpp\[onnx\]'"):
        save_onnx(network, tmp_path / "vit.onnx")


def test_network_larger_than_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export_file, "find_spec", lambda name: name)
    with torch.device("meta"):
        giant = build_model("vit_giant_patch14_dinov2", 0, 28)
    with pytest.raises(ValueError, match=r"ONNX files hold up to 2 GiB: expected fewer weights, got 4\.2 GiB"):
        save_onnx(giant, tmp_path / "vit.onnx")


@pytest.mark.parametrize(
    ("checkpoint", "output", "message"),
    [
        ("gone.ckpt", "vit.onnx", "there is no checkpoint gone.ckpt"),
        ("gone.ckpt", "vit.pt", "--output vit.pt: expected the suffix"),
    ],
)
def test_mistakes_end_with_one_line(checkpoint, output, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--ckpt_path", checkpoint, "--output", output])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err
