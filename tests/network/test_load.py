import hashlib
import json
import os
from argparse import Namespace

import pytest
import timm
import torch
from full_disk import no_file_larger_than
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from tiny_network import TINY, tiny

from gmarpp.export import main as export_main
from gmarpp.network.build import build_model
from gmarpp.network.files.formats import read_weights
from gmarpp.network.files.load import complete, load_model, load_pretrained, load_weights
from gmarpp.network.files.save import save_weights
from gmarpp.network.files.weights import Weights
from gmarpp.network.preprocessing import set_preprocessing

PREPROCESSING = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear", "crop_pct": 1.0}


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path):
    model = tiny()
    set_preprocessing(model, PREPROCESSING)
    model.classes, model.class_names = ("n1", "n2", "n3"), ("ant", "bée", "cat")
    save_weights(model, tmp_path / "tiny.safetensors", notes={"recipe": "none"})
    return model, tmp_path / "tiny.safetensors"


def test_safetensors_round_trip_keeps_everything(saved, images):
    model, path = saved
    loaded = load_model(path)
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))
    assert loaded.classes == ("n1", "n2", "n3")
    assert loaded.class_names == ("ant", "bée", "cat")
    config = resolve_model_data_config(loaded)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.4, 0.5, 0.6)
    assert config["std"] == (0.1, 0.2, 0.3)
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 1.0)
    with safe_open(path, "pt") as file:
        assert file.metadata()["recipe"] == "none"
        assert "/" not in file.metadata()["architecture"]


def test_half_precision_file_loads_as_float32(tmp_path):
    model = tiny()
    save_weights(model, tmp_path / "half.safetensors", dtype=torch.float16)
    assert {value.dtype for value in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    assert {value.dtype for value in load_model(tmp_path / "half.safetensors").parameters()} == {torch.float32}


def test_metadata_without_own_options_loads_as_timm_writes_it(tmp_path):
    # the layout of a file made by hand: no model_args, crop_pct or class names
    source = timm.create_model("test_vit", img_size=32, num_classes=2).eval()
    metadata = {
        "architecture": "test_vit",
        "img_size": "32",
        "num_classes": "2",
        "classes": '["a", "b"]',
        "mean": "[0.485,0.456,0.406]",
        "std": "[0.229,0.224,0.225]",
        "interpolation": "bilinear",
    }
    save_file(source.state_dict(), tmp_path / "plain.safetensors", metadata=metadata)
    loaded = load_model(tmp_path / "plain.safetensors")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(image), source(image))
    assert (loaded.classes, loaded.class_names) == (("a", "b"), ())
    assert resolve_model_data_config(loaded)["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("content", ["plain", "nested"])
def test_pth_needs_an_architecture_and_gets_its_size_from_the_weights(tmp_path, content):
    source = timm.create_model("test_vit", img_size=48, num_classes=4).eval()
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict() if content == "plain" else {"state_dict": source.state_dict(), "epoch": 3}, path)
    with pytest.raises(ValueError, match="does not name its architecture"):
        load_model(path)
    loaded = load_model(path, architecture="test_vit")
    image = torch.randn(1, 3, 48, 48)
    assert torch.equal(loaded(image), source(image))


def test_advice_for_a_file_without_architecture_can_be_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = timm.create_model("test_vit", img_size=48, num_classes=4).eval()
    torch.save(source.state_dict(), "weights.pth")
    with pytest.raises(ValueError, match=r"python -m gmarpp\.export --ckpt_path weights\.pth --architecture") as raised:
        load_model("weights.pth")
    command = str(raised.value).partition("python -m gmarpp.export ")[2].replace("vit_base_patch16_224", "test_vit")
    export_main(command.split())
    image = torch.randn(1, 3, 48, 48)
    assert torch.equal(load_model("named.safetensors")(image), source(image))


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        *((prefix, ".pth") for prefix in ("module.", "_orig_mod.", "model.", "backbone.")),
        *(("module._orig_mod.", ".safetensors"), ("model.net.", ".ckpt")),
    ],
)
def test_what_wrappers_put_before_all_names_is_taken_off(tmp_path, prefix, suffix):
    source = timm.create_model("test_vit", img_size=32, num_classes=4).eval()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.6"}, path)
    loaded = load_model(path, architecture="test_vit")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(image), source(image))


def test_best_file_of_timms_training_script(tmp_path):
    source = timm.create_model("test_vit", img_size=32, num_classes=4).eval()
    content = {"epoch": 3, "arch": "test_vit", "state_dict": source.state_dict(), "args": Namespace(lr=0.1, data="x")}
    torch.save(content, tmp_path / "model_best.pth.tar")
    loaded = load_model(tmp_path / "model_best.pth.tar")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(image), source(image))


def test_folder_of_a_timm_network_from_the_hub(tmp_path):
    source = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, num_classes=3, global_pool="avg", class_token=False, fc_norm=False, depth=2
    ).eval()
    source.pretrained_cfg = {**source.pretrained_cfg, "input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3), "tag": "x"}
    options = {"global_pool": "avg", "class_token": False, "fc_norm": False, "depth": 2}
    labels = {"label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "ant", "n2": "bee", "n3": "cat"}}
    save_for_hf(source, tmp_path, model_config={"model_args": options, **labels})
    loaded = load_model(tmp_path)
    image = torch.randn(1, 3, 48, 48)
    assert torch.equal(loaded(image), source(image))
    assert (loaded.classes, loaded.class_names) == (("n1", "n2", "n3"), ("ant", "bee", "cat"))
    assert resolve_model_data_config(loaded)["mean"] == (0.1, 0.2, 0.3)


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*absent\.safetensors"):
        load_model(tmp_path / "absent.safetensors")
    (tmp_path / "weights.onnx").touch()
    with pytest.raises(ValueError, match="unknown kind: expected"):
        load_model(tmp_path / "weights.onnx")


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pth"])
def test_truncated_file_is_named(saved, tmp_path, suffix):
    model, path = saved
    file = tmp_path / f"file{suffix}"
    if suffix == ".safetensors":
        file = path
    else:
        torch.save({"state_dict": model.state_dict()}, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged or incomplete"):
        load_model(file)


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder-was-here",)


def test_code_in_a_file_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Intruder()}, "evil.pth")
    with pytest.raises(ValueError, match="unpickling can run code"):
        load_model("evil.pth", architecture="test_vit")
    assert not (tmp_path / "intruder-was-here").exists()
    for option, value in (
        ("checkpoint_path", "evil.pth"),
        ("pretrained", True),
        ("pretrained_cfg", {"file": "evil.pth"}),
        ("pretrained_cfg_overlay", {"url": "http://localhost/evil.pth"}),
        ("cache_dir", "."),
    ):
        parts = {"architecture": "test_vit", "num_classes": 2, "model_args": {option: value}}
        metadata = {name: part if isinstance(part, str) else json.dumps(part) for name, part in parts.items()}
        save_file({"x": torch.zeros(1)}, "evil.safetensors", metadata={**metadata, "img_size": "32"})
        torch.save(
            {"state_dict": {}, "hyper_parameters": {**parts, "image_size": 32, "preprocessing": {}}}, "evil.ckpt"
        )
        for file in ("evil.safetensors", "evil.ckpt"):
            with pytest.raises(ValueError, match=f"model_args holds {option}, which would read other files"):
                load_model(file)
    assert not (tmp_path / "intruder-was-here").exists()


def test_weights_of_another_shape_are_named(saved):
    _, path = saved
    state = load_file(path)
    state.pop("norm.weight")
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(7)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for key in ("content_sha256", "digest"):
        metadata.pop(key)
    save_file(state, path, metadata=metadata)
    with pytest.raises(
        ValueError, match=r"1 missing \(norm\.weight\); blocks\.0\.mlp\.fc1\.bias: expected \(128,\), got \(7,\)"
    ):
        load_model(path)


def test_start_weights_resample_the_position_embedding_and_drop_a_foreign_head(saved):
    source, path = saved
    target = tiny(num_classes=5, image_size=64)
    head = target.head.weight.clone()
    assert not load_weights(target, read_weights(path))
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])
    # bicubic resampling from 4 x 4 to 8 x 8 keeps the mean of the grid about
    torch.testing.assert_close(target.pos_embed[:, 1:].mean(1), source.pos_embed[:, 1:].mean(1), rtol=0, atol=5e-3)
    assert target.pos_embed.shape[1] == 65


def test_weights_of_a_wide_network_are_loaded_as_they_are(tmp_path):
    """16 tokens, which are 2 x 8 here, could be a square's 4 x 4: resampled they would be others."""
    source = tiny(image_size=[16, 64])
    torch.nn.init.normal_(source.pos_embed)
    save_weights(source, tmp_path / "wide.safetensors")
    assert torch.equal(load_model(tmp_path / "wide.safetensors").pos_embed, source.pos_embed)
    target = tiny(image_size=[16, 64])
    load_weights(target, read_weights(tmp_path / "wide.safetensors"))
    assert torch.equal(target.pos_embed, source.pos_embed)


def test_a_network_is_not_built_before_its_weights_are_known_to_fit(saved, monkeypatch):
    _, path = saved
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for key in ("content_sha256", "digest"):
        metadata.pop(key)
    huge = json.dumps({**TINY, "embed_dim": 60_000, "num_heads": 1})
    save_file(load_file(path), path, metadata={**metadata, "model_args": huge})
    built = []
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: built.append(layer.weight.device.type))
    with pytest.raises(ValueError, match=r"attn\.proj\.bias: expected \(60000,\), got \(32,\)"):
        load_model(path)
    assert set(built) == {"meta"}


@pytest.mark.parametrize(
    ("classes", "kept"), [((), True), (("n1", "n2", "n3"), True), (("n1", "n3", "n2"), False), (("x", "y", "z"), False)]
)
def test_head_is_used_only_for_the_same_classes(saved, classes, kept):
    source, path = saved
    target = tiny()
    torch.nn.init.ones_(target.head.weight)
    assert load_weights(target, read_weights(path), classes) is kept
    assert torch.equal(target.head.weight, source.head.weight) is kept


@pytest.mark.parametrize(("num_classes", "kept"), [(1000, True), (3, False)])
def test_head_of_pretrained_weights_is_used_only_for_as_many_classes(monkeypatch, num_classes, kept):
    target, source = (build_model("test_vit", num_classes, 32) for _ in range(2))
    head = target.head.weight.clone()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: source)
    assert load_pretrained(target, "test_vit") is kept
    assert torch.equal(target.head.weight, source.head.weight if kept else head)
    assert torch.equal(target.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


def test_start_weights_of_another_network_are_refused(saved):
    _, path = saved
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(tiny(depth=3), read_weights(path))


def test_failed_write_leaves_the_old_file(saved):
    model, path = saved
    before = path.read_bytes()
    with no_file_larger_than(1000), pytest.raises(OSError, match=r"cannot write: File too large: .*tiny\.safetensors"):
        save_weights(model, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_weights_carry_the_digest_of_what_was_read(saved, tmp_path):
    _, path = saved
    assert read_weights(path).path == str(path)
    assert read_weights(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    source = timm.create_model("test_vit", num_classes=3, img_size=32)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").sha256 == hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()
    save_for_hf(source, tmp_path / "hub")
    lines = [
        f"{hashlib.sha256((tmp_path / 'hub' / name).read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(file.name for file in (tmp_path / "hub").iterdir())
    ]
    assert read_weights(tmp_path / "hub").sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 4}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_little_patch16_reg4_gap_256", {}),
        ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": False}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_the_size_is_read_off_the_position_embedding(architecture, options, tmp_path):
    shape = {"embed_dim": 96, "depth": 1, "num_heads": 2, **options}
    side = 4 * options.get("patch_size", timm.create_model(architecture, **shape).patch_embed.patch_size[0])
    model = build_model(architecture, 3, side, shape)
    weights = complete(Weights(model.state_dict(), architecture, None, 3, shape))
    # BEiT has no position embedding, so that the size is the architecture's own.
    assert weights.image_size == (None if "beit" in architecture else (side, side))
