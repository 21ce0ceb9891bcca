"""Checkpoints that other libraries saved are explained from the command line, with the original code's outputs."""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import foreign_networks
import lightning as L
import numpy as np
import pytest
import timm
import torch
import transformers
from foreign_networks import Encoder, Module
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

import gmarpp
from gmarpp.cli import explain_main, main
from gmarpp.export import export

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
DATA = ["--data=ImageFolder", "--data.root=photos", "--data.num_workers=0"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
PREPARED = [f"--data.preprocessing={{size: [32, 32], mean: {MEAN}, std: {STD}}}"]
PREDICT = [
    "predict", *DATA, *QUIET, "--explain.methods=[rollout]", "--explain.metrics=[]", "--write.overlays=false",
    "--write.report=false", "--write.figure_images=0", "--output=out",
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["explain.py"])
    for index, picture in enumerate(pictures()):
        path = tmp_path / "photos" / f"class{index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return tmp_path


@pytest.fixture
def hub(folder, monkeypatch):
    """The Hub's cache, without a connection."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))


def pictures():
    """Three images as large as the networks take them, so that nothing is resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def normalized():
    pixels = np.stack([np.asarray(picture) for picture in pictures()]) / 255
    return torch.tensor((pixels - np.array(MEAN)) / np.array(STD), dtype=torch.float32).permute(0, 3, 1, 2)


def sharp(network):
    """Give a network weights that make its outputs differ."""
    torch.manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def save_lightning(module, path):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


class Wrapped(L.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.model = torch.compile(nn.DataParallel(network))
        self.teacher_head = nn.Linear(32, 3)


def own_module(folder):
    """The options that the checkpoint was trained with, not those of the class, make the network."""
    module = sharp(Module(pool="avg"))
    save_lightning(module, folder / "x.ckpt")
    return ["--model=foreign_networks.Module", "--ckpt_path=x.ckpt", *PREPARED], module.net, normalized()


def network_in_a_module(folder):
    module = Wrapped(timm.create_model("test_vit", img_size=32, num_classes=3))
    network = sharp(module.model._orig_mod.module)
    save_lightning(module, folder / "x.ckpt")
    return ["--model=test_vit", "--ckpt_path=x.ckpt", *PREPARED], network, normalized()


def one_of_several_networks(folder):
    network = sharp(foreign_networks.Students())
    torch.save({"state_dict": {f"model.{key}": value for key, value in network.state_dict().items()}}, "x.ckpt")
    options = ["--model=foreign_networks.Students", "--ckpt_path=x.ckpt", "--architecture=student", *PREPARED]
    return options, network, normalized()


def data_parallel(folder):
    network = sharp(timm.create_model("test_vit", img_size=32, num_classes=3))
    torch.save(nn.DataParallel(network).state_dict(), "x.pth")
    return ["--model=test_vit", "--ckpt_path=x.pth", *PREPARED], network, normalized()


def compiled_backbone(folder):
    network = sharp(timm.create_model("test_vit", img_size=32, num_classes=3))
    save_file({f"_orig_mod.backbone.{key}": value for key, value in network.state_dict().items()}, "x.safetensors")
    return ["--model=test_vit", "--ckpt_path=x.safetensors", *PREPARED], network, normalized()


def training_script(folder):
    network = sharp(Encoder(width=12, depth=1))
    optimizer = torch.optim.AdamW(network.parameters())
    torch.save({"epoch": 3, "net": network.state_dict(), "optimizer": optimizer.state_dict()}, "x.pt")
    options = ["--model=foreign_networks.Encoder", "--model.width=12", "--model.depth=1", "--ckpt_path=x.pt"]
    return [*options, "--architecture=foreign_networks.describe", *PREPARED], network, normalized()


def class_with_weights(folder):
    options = ["--model=foreign_networks.trained_encoder", "--architecture=foreign_networks.describe", *PREPARED]
    return options, foreign_networks.trained_encoder().eval(), normalized()


def timm_training(folder):
    """The average is what timm's script evaluates, and by what it chooses the best."""
    network = sharp(timm.create_model("test_vit", img_size=32, num_classes=3))
    average = ModelEmaV3(network)
    sharp(average.module).head.bias.data += 1
    options = Namespace(model="test_vit", img_size=32, mean=MEAN, std=STD, crop_pct=1.0, lr=0.1, gp=None, data_dir="x")
    saver = CheckpointSaver(
        nn.DataParallel(network), torch.optim.SGD(network.parameters(), 0.1), options, average, None,
        checkpoint_dir=".", recovery_dir=".",
    )  # fmt: skip
    saver.save_checkpoint(1, metric=0.5)
    return ["--ckpt_path=model_best.pth.tar"], average.module, normalized()


def timm_folder(folder):
    network = sharp(timm.create_model("test_vit", img_size=32, num_classes=3))
    prepared = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD, "crop_pct": 1.0}
    network.pretrained_cfg = {**network.pretrained_cfg, **prepared}
    save_for_hf(network, folder / "hub", model_config={"label_names": ["ant", "bee", "cat"]})
    return ["--ckpt_path=hub"], network, normalized()


HUGGING_FACE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
SQUASHED = {"size": {"height": 32, "width": 32}}
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}


def hugging_face(kind, processor, options, processing, **how):
    def save(folder):
        network = getattr(transformers, kind)
        config = network.config_class(**options, id2label={0: "ant", 1: "bee", 2: "cat"})
        model = sharp(network(config))
        prepare = getattr(transformers, processor)(**processing, image_mean=MEAN, image_std=STD)
        model.save_pretrained("hf", **how)
        prepare.save_pretrained("hf")
        return ["--ckpt_path=hf"], model, prepare(pictures(), return_tensors="pt").pixel_values

    return save


def sharded_pickles(folder):
    """As folders were before there was safetensors."""
    arguments, model, images = FOREIGN["deit"](folder)
    (folder / "hf/model.safetensors").unlink()
    names, files = sorted(model.state_dict()), ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    index = {name: files[place % 2] for place, name in enumerate(names)}
    for file in files:
        torch.save({name: model.state_dict()[name] for name in names if index[name] == file}, folder / "hf" / file)
    (folder / "hf/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return arguments, model, images


def from_the_hub(folder):
    """A repository in the Hub's cache, which is all that is read without a connection."""
    _, model, images = FOREIGN["dinov2"](folder)
    repository = folder / "cache/models--me--dino"
    shutil.copytree(folder / "hf", repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    return ["--model=hf-hub:me/dino"], model, images


BY_TWO = {"vision_config": HUGGING_FACE, "text_config": {"hidden_size": 24, "num_hidden_layers": 1, "vocab_size": 9}}
FOREIGN = {
    "own module": own_module,
    "in a module": network_in_a_module,
    "one of several": one_of_several_networks,
    "data parallel": data_parallel,
    "compiled": compiled_backbone,
    "script": training_script,
    "class": class_with_weights,
    "timm training": timm_training,
    "timm folder": timm_folder,
    "dinov2": hugging_face(
        "Dinov2ForImageClassification", "BitImageProcessor", HUGGING_FACE, CROPPED, max_shard_size="20KB"
    ),
    "deit": hugging_face("DeiTForImageClassificationWithTeacher", "DeiTImageProcessor", HUGGING_FACE, CROPPED),
    "deit in pickles": sharded_pickles,
    "beit": hugging_face("BeitForImageClassification", "BeitImageProcessor", HUGGING_FACE, SQUASHED),
    "clip": hugging_face("CLIPForImageClassification", "CLIPImageProcessor", BY_TWO, CROPPED),
    "siglip": hugging_face("SiglipForImageClassification", "SiglipImageProcessor", BY_TWO, SQUASHED),
    "swin": hugging_face("SwinForImageClassification", "ViTImageProcessor", SWIN, SQUASHED),
    "vit": hugging_face("ViTForImageClassification", "ViTImageProcessor", HUGGING_FACE, SQUASHED),
    "hub": from_the_hub,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_checkpoints_are_explained_with_the_original_codes_outputs(name, folder, hub):
    arguments, original, images = FOREIGN[name](folder)
    with torch.no_grad():
        output = original(images)
        run = explain_main([*PREDICT, *arguments])
        logits = getattr(output, "logits", output)
        torch.testing.assert_close(run.model(images), logits, rtol=0, atol=1e-5)
    assert logits.std() > 1e-3
    rows = gmarpp.load_explanations(folder / "out").rows
    probability = [row["predicted_probability"] for row in rows]
    assert probability == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-5)
    if hasattr(original, "config"):
        assert run.model.class_names == ("ant", "bee", "cat")


def test_networks_are_evaluated_by_their_names(folder):
    """Labels are folders; a network's own classes, in whatever order, decide which output each of them is."""
    network = sharp(timm.create_model("test_vit", img_size=32, num_classes=3))
    save_for_hf(network, folder / "hub", model_config={"label_names": ["class2", "class0", "class1"]})
    torch.save({"x": network.state_dict()}, "x.pth")
    with torch.no_grad():
        logits = network(normalized())
    for arguments, labels in ((["--ckpt_path=hub"], [1, 2, 0]), (["--model=test_vit", "--ckpt_path=x.pth"], [0, 1, 2])):
        options = [*DATA, *QUIET, "--data.labelled=true", *PREPARED, *arguments]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
        for command in ("validate", "test"):
            measured = explain_main([command, *options]).trainer.callback_metrics
            prefix = command.replace("validate", "val")
            assert measured[f"{prefix}/loss"].item() == pytest.approx(expected, abs=1e-5)
            right = (logits.argmax(1) == torch.tensor(labels)).float().mean().item()
            assert measured[f"{prefix}/accuracy"].item() == pytest.approx(right)
    # The door takes the same way where a folder of the Hub or --model says what the network is.
    with pytest.raises(SystemExit, match="1"):
        main(["validate", *options, "--data.root=photos/class0"])


def test_the_sanity_check_takes_a_class(folder):
    torch.save(sharp(Encoder()).state_dict(), "x.pth")
    explain_main(
        ["sanity", *DATA, *PREPARED, "--model=foreign_networks.Encoder", "--ckpt_path=x.pth", "--images=2",
         "--architecture=foreign_networks.describe", "--methods=[rollout]", "--output=out"]
    )  # fmt: skip
    header, values = (folder / "out/sanity.csv").read_text().splitlines()
    assert header == "method,trained,head,block 2,block 1,embedding"
    assert float(values.split(",")[2]) == 1 > float(values.split(",")[-1])


ENCODER = "--model=foreign_networks.Encoder"
MISTAKES = {
    ENCODER: "--ckpt_path is missing: 17 weights of Encoder are random (position, ",
    "--model=foreign_networks.Encodr": "module 'foreign_networks' has no attribute 'Encodr'",
    f"{ENCODER} --model.breadth=3": "Option 'breadth' is not accepted",
    "--model=foreign_networks.describe": "to be a function that returns Module",
    "--model=vit_bse": "unknown architecture 'vit_bse'; close names: ",
    "--model=hf-hub:me": "expected hf-hub:OWNER/NAME",
    "--model=hf-hub:me/gone": "hf-hub:me/gone could not be loaded from the Hugging Face Hub",
    "--model=hf-hub:me/dino --ckpt_path=x.pth": "brings its weights: leave --ckpt_path x.pth out",
    "--ckpt_path=x.pth": "does not name its architecture: pass timm's name of it as architecture=, on command lines ",
    "--model=test_vit --ckpt_path=x.pth": "missing (blocks.0.attn.proj.bias, ",
    f"{ENCODER} --model.depth=3 --ckpt_path=x.pth": (
        "x.pth does not fit Encoder: 12 missing (layers.layers.2.linear1.bias, layers.layers.2.linear1.weight, "
    ),
    f"{ENCODER} --model.width=12 --ckpt_path=x.pth": "embed.bias: expected (12,), got (24,)",
    f"{ENCODER} --ckpt_path=two.pth": "holds 2 networks that fit, under 'model.', 'ema.': save",
    f"{ENCODER} --ckpt_path=x.pth": "needs preprocessing=..., as --data.preprocessing '{size: ",
    f"{ENCODER} --ckpt_path=x.pth {PREPARED[0]}": "the patch grid of Encoder is not known",
    f"{ENCODER} --ckpt_path=x.pth {PREPARED[0]} --architecture=decoder": (
        "unknown architecture 'decoder': expected the name of a module inside Encoder, or the path of a function"
    ),
    f"{ENCODER} --ckpt_path=x.pth {PREPARED[0]} --architecture=foreign_networks.describe_nothing": (
        "expected a function from Encoder to gmarpp.Architecture, got one to NoneType"
    ),
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_end_with_one_line(arguments, folder, hub, capsys):
    state = Encoder().state_dict()
    torch.save(state, "x.pth")
    two = {f"{name}.{key}": value + len(name) for key, value in state.items() for name in ("model", "ema")}
    torch.save(two, "two.pth")
    assert_refused(arguments.split(" --"), MISTAKES[arguments], capsys)


def assert_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        explain_main([*PREDICT, *(f"--{each.removeprefix('--')}" for each in arguments)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert not Path("out").exists()


def test_folders_that_describe_another_network_are_refused_before_it_takes_memory(folder, capsys):
    config = transformers.Dinov2Config(**HUGGING_FACE, num_labels=3, architectures=["Dinov2ForImageClassification"])
    state = transformers.Dinov2ForImageClassification(config).state_dict()
    state["x"] = state.pop("classifier.bias")
    (folder / "hf").mkdir()
    save_file(state, folder / "hf/model.safetensors")
    (folder / "hf/config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(
        ValueError, match=r"hf holds a Dinov2ForImageClassification of transformers, .* not fine-tuned or"
    ):
        export("hf", "x.safetensors")
    for change, message in (
        ({}, "hf does not fit its configuration, Dinov2ForImageClassification: 1 missing (classifier.bias); 1 unknown"),
        ({"image_size": 40}, "1 of another shape (dinov2.embeddings.position_embeddings)"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "hf holds a CLIPModel, which is no classifier of"),
        (
            {"model_type": "siglip2", "architectures": None},
            "hf holds a Siglip2ForImageClassification, which takes patc",
        ),
        ({"num_hidden_layers": 10**6}, "it would have more than "),
        ({"hidden_size": 10**6}, "parameters, and the folder holds "),
        ({"quantization_config": {"load_in_8bit": True}}, "hf holds quantized weights"),
        ({"id2label": {"x": "ant"}}, "id2label: expected indices of classes, got 'x'"),
    ):
        (folder / "hf/config.json").write_text(json.dumps({**config.to_dict(), **change}))
        assert_refused(["ckpt_path=hf"], message, capsys)
